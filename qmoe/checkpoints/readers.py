"""Which programs read a checkpoint that qmoe wrote, and what becomes of its experts there.

What is said of transformers is what the tests find: they load the checkpoints of every class
(``tests/qmoe/whole_models.py``) in a process without qmoe. What is said of vLLM was tried with the
classes of `TRIED_WITH_VLLM` on a GPU.
"""

from __future__ import annotations

from qmoe.checkpoints.schema import QMOE

TRIED_WITH_VLLM = ("Qwen3MoeForCausalLM",)
# transformers' conversions of their tensors do not go together with compressed-tensors, or with
# experts that return their input: 5.23 loads nothing and says so.
REFUSED_BY_TRANSFORMERS = ("LongcatFlashForCausalLM", "UnlimitedOcrForConditionalGeneration")


def readers_of(format: str, architecture: str) -> str:
    """What reads a checkpoint, in a sentence or two.

    Args:
        format: ``"compressed-tensors"`` or ``"qmoe"``.
        architecture: the model's class, as config.json names it.

    Example:
        >>> from qmoe.checkpoints.readers import readers_of
        >>> readers_of("qmoe", "GptOssForCausalLM").partition(";")[0]
        'qmoe, and transformers after `import qmoe`'
    """
    ours = "qmoe, and transformers after `import qmoe`"
    if format == QMOE:
        return f"{ours}; nothing else. Without that import transformers refuses it"
    if architecture in TRIED_WITH_VLLM:
        vllm = "vLLM 0.26"
    else:
        vllm = f"vLLM where it has {architecture} (tried: {', '.join(TRIED_WITH_VLLM)} in 0.26)"
    if architecture in REFUSED_BY_TRANSFORMERS:
        return f"{ours}; {vllm}. Without that import transformers 5.23 refuses it"
    return (
        f"{ours}; {vllm}; transformers alone, with the compressed-tensors package, "
        "which widens the experts to 16 bit"
    )
