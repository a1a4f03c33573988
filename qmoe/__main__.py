"""``python -m qmoe``, and where the command ``qmoe`` begins."""

from __future__ import annotations

from qmoe.start import start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and exit."""
    start("qmoe", "qmoe.cli.main")


if __name__ == "__main__":
    main()
