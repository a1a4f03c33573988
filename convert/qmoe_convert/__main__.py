"""``python -m qmoe_convert``, and where the command ``convert-checkpoint`` begins."""

from __future__ import annotations

from qmoe.start import start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and exit."""
    start("convert-checkpoint", "qmoe_convert.cli")


if __name__ == "__main__":
    main()
