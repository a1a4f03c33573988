"""Sizes as they are printed and read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmoe.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.5, "1 kB"),
        (1000, "1 kB"),
        (1001, "1.01 kB"),
        (1_234_567, "1.24 MB"),
        (196_608, "197 kB"),
        (999_900_000, "1 GB"),
        (30_500_000_000, "30.5 GB"),
        (3e15, "3000 TB"),
    ],
)
def test_printed(num_bytes: float, text: str) -> None:
    assert format_size(num_bytes) == text


@given(st.integers(1, 1 << 60))
def test_a_printed_size_is_enough(num_bytes: int) -> None:
    assert num_bytes <= parse_size(format_size(num_bytes)) <= max(num_bytes + 1, num_bytes * 1.011)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        *(("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2**31), (" 2 gib ", 2**31)),
        *((7, 7), ("12", 12), ("12B", 12), ("1.5kB", 1500), (".5kB", 500), ("1.GiB", 2**30)),
        ("9007199254740993", 2**53 + 1),
        *(("0.29kB", 290), ("16G", 16 * 10**9), ("1.5k", 1500)),
    ],
)
def test_read(text: str | int, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    "text",
    [
        *("", "GB", "5 parsecs", "-1GB", "0", "0GB", "1e9GB", "0.1", "1.5", "0.1B"),
        *(-1, 1.5, 2.0, True, None),
    ],
)
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)  # type: ignore[arg-type]
