"""Amounts of bytes as people write them."""

from __future__ import annotations

import re
from decimal import Decimal

from ..errors import UsageError, show

_FACTORS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,6})?)\s*([A-Za-z]*)")


def parse_size(size: str | int) -> int:
    """Bytes: 5000, "5GB" (10^9), "512 MiB" (2^20), "1.5GiB". UsageError for anything else, or less than one byte."""
    match = _SIZE.fullmatch(str(size).strip())
    factor = _FACTORS.get(match[2].upper(), 0) if match else 0
    amount = Decimal(match[1]) * factor if match else Decimal(0)
    if amount < 1 or amount % 1:
        raise UsageError(f"{show(size)} is not a size: write a number of bytes, or for example 5GB or 512MiB")
    return int(amount)
