"""``python -m qmoe``, and where the command ``qmoe`` begins."""

from __future__ import annotations

from typing import NoReturn

from qmoe.exits import start


def main() -> NoReturn:
    """Run the command line and exit."""
    start("qmoe", "qmoe.cli.main")


if __name__ == "__main__":
    main()
