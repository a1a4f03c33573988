"""``python -m qmoe_convert``, and where the command ``convert-checkpoint`` begins."""

from __future__ import annotations

from typing import NoReturn

from qmoe.exits import start


def main() -> NoReturn:
    """Run the command line and exit."""
    start("convert-checkpoint", "qmoe_convert.cli")


if __name__ == "__main__":
    main()
