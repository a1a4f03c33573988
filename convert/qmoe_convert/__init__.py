"""Convert Mixture-of-Experts checkpoints to 8-bit experts: map, plan, write, verify."""


class ConversionError(ValueError):
    """A conversion that cannot be done or went wrong.

    The message is one line that names the file or tensor and says what to do.
    """


class SourceError(ConversionError):
    """A checkpoint that has to change before it can be converted."""
