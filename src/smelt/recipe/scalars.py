"""Scalars of a recipe as numbers, integers, booleans and words.

The rules are those users know from mergekit's files: a quoted number is a number, and a boolean may be
written 1/0, yes/no, on/off or true/false. Beyond YAML 1.1, ``1e-3`` (no dot) is a number too.
"""

from __future__ import annotations

import math
import re
from typing import TypeGuard

from ..errors import show
from .nodes import Scalar

_NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?")
_INTEGER = re.compile(r"[-+]?\d{1,300}")
_TRUE, _FALSE = {"1", "true", "yes", "on", "t", "y"}, {"0", "false", "no", "off", "f", "n"}


def number_in(text: str) -> int | float | None:
    """The number that ``text`` spells, or None. Integers stay exact."""
    text = text.strip()
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else None


def is_number(value: Scalar) -> TypeGuard[int | float]:
    """Whether ``value`` is a number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def convert(value: Scalar, kind: str) -> bool | int | float | str:
    """``value`` as a parameter of ``kind`` (float, int, bool, str) wants it.

    Raises ValueError saying what was expected and found.
    """
    if kind == "bool":
        return _boolean(value)
    if kind == "str":
        if not isinstance(value, str):
            raise ValueError(f"expected text, found {_spelt(value)} (quote it to make it text)")
        return value
    return _integer(value) if kind == "int" else _number(value)


def _number(value: Scalar) -> int | float:
    found = number_in(value) if isinstance(value, str) else value
    if not isinstance(found, int | float) or isinstance(found, bool):
        raise ValueError(f"expected a number, found {_spelt(value)}")
    if not is_finite(found):
        raise ValueError(f"expected a finite number, found {_spelt(value)}")
    return found


def is_finite(value: int | float) -> bool:
    """Neither NaN nor infinite, and an integer not beyond what a float can hold."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _integer(value: Scalar) -> int:
    found = _number(value)
    if found != int(found):
        raise ValueError(f"expected a whole number, found {_spelt(value)}")
    return int(found)


def _boolean(value: Scalar) -> bool:
    word = value.lower() if isinstance(value, str) else value
    if word in _TRUE or word == 1:
        return True
    if word in _FALSE or word == 0:
        return False
    raise ValueError(f"expected true or false, found {_spelt(value)}")


def _spelt(value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "nothing" if value is None else show(value, 60) if isinstance(value, str) else f"{value!r:.60}"
