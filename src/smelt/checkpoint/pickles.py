"""Pickles read as data: an interpreter of the part of the pickle language that makes numbers, texts and containers.

Python's own would look up and call whatever the file names. This one imports nothing and calls nothing but what
its caller hands over; an instruction that is not in the table ends the reading. Memory and time are bounded by
the number of bytes and instructions.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, Any

#: Instructions: some thirty for each tensor.
MAX_INSTRUCTIONS = 20_000_000

#: Only these are keys: to hash what is nested deeply would overflow the stack.
_KEYS = (str, int, float, bool, type(None))


@dataclass(frozen=True, eq=False)
class Known:
    """Stands for a name whose meaning is known: what it makes of arguments, which are data, in constant time."""

    make: Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Inert:
    """Stands for an object of a class, or the class itself, that is not loaded."""

    name: str


class _Mark:
    pass


_MARK = _Mark()


class Unpickler:
    """Reads one pickle of at most ``limit`` bytes.

    ``named(module, name)`` gives what stands for a global: a :class:`Known`, an :class:`Inert`, or data.
    ``stored`` gives what a persistent id refers to.
    """

    def __init__(
        self, data: IO[bytes], limit: int, named: Callable[[str, str], Any], stored: Callable[[Any], Any]
    ) -> None:
        self._data, self._left, self._named, self._stored = data, limit, named, stored
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """What was pickled. Raises ValueError, TypeError, KeyError, IndexError or struct.error when it is malformed."""
        for _ in range(MAX_INSTRUCTIONS):
            code = self._bytes(1)
            if code == b".":
                return self._stack.pop()
            instruction = _TABLE.get(code)
            if instruction is None:
                raise ValueError(f"its pickle holds the instruction {code!r}, which torch does not write")
            instruction(self)
        raise ValueError(f"its pickle holds more than {MAX_INSTRUCTIONS} instructions")

    # --- reading ----------------------------------------------------------------------------------------

    def _bytes(self, count: int) -> bytes:
        self._left -= count
        data = self._data.read(count) if self._left >= 0 else b""
        if len(data) < count:
            raise ValueError("its pickle ends early")
        return data

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _line(self) -> str:
        line = self._data.readline(1000)
        self._left -= len(line)
        return line.rstrip(b"\n").decode("utf-8")

    # --- the stack --------------------------------------------------------------------------------------

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _since_mark(self) -> list[Any]:
        """What was pushed since the last mark, taken off with it."""
        place = next((i for i in range(len(self._stack) - 1, -1, -1) if self._stack[i] is _MARK), None)
        if place is None:
            raise ValueError("its pickle lacks a mark")
        found = self._stack[place + 1 :]
        del self._stack[place:]
        return found

    def _last(self, count: int) -> None:
        """The last values as a tuple."""
        if count > len(self._stack):
            raise ValueError("its pickle takes more than there is")
        values = tuple(self._stack[len(self._stack) - count :])
        del self._stack[len(self._stack) - count :]
        self._push(values)

    # --- containers -------------------------------------------------------------------------------------

    def _extend(self, values: Iterable[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target |= {_key(value) for value in values}
        elif not isinstance(target, Inert):
            raise TypeError("its pickle appends to what is no list")

    def _set(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            target.update((_key(key), value) for key, value in zip(pairs[::2], pairs[1::2], strict=True))
        elif not isinstance(target, Inert):
            raise TypeError("its pickle sets items of what is no dictionary")

    # --- names ------------------------------------------------------------------------------------------

    def _global(self, module: str, name: str) -> None:
        self._push(self._named(module, name))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("its pickle names something by what is no text")
        self._global(module, name)

    def _call(self) -> None:
        """What stands for a call: of what we know, or of nothing."""
        arguments, function = self._stack.pop(), self._stack.pop()
        if isinstance(function, Inert):
            self._push(function)
        elif isinstance(function, Known) and isinstance(arguments, tuple):
            self._push(function.make(*arguments))
        else:
            raise TypeError("its pickle calls what is no function")

    def _build(self) -> None:
        """Attributes of an object: none of ours has any that matter."""
        self._stack.pop()
        if not isinstance(self._stack[-1], Inert | dict):
            raise TypeError("its pickle gives attributes to what has none")

    def _remember(self, place: int) -> None:
        self._memo[place] = self._stack[-1]


def _key(value: Any) -> Any:
    if not isinstance(value, _KEYS):
        raise TypeError(f"its pickle has a key that is a {type(value).__name__}, expected text or a number")
    return value


def _text(form: str) -> Callable[[Unpickler], None]:
    return lambda machine: machine._push(machine._bytes(machine._number(form)).decode("utf-8", "surrogatepass"))


def _raw(form: str) -> Callable[[Unpickler], None]:
    return lambda machine: machine._push(machine._bytes(machine._number(form)))


def _constant(make: Callable[[], Any]) -> Callable[[Unpickler], None]:
    return lambda machine: machine._push(make())


def _value(form: str) -> Callable[[Unpickler], None]:
    return lambda machine: machine._push(machine._number(form))


def _put(form: str) -> Callable[[Unpickler], None]:
    return lambda machine: machine._remember(machine._number(form))


def _get(form: str) -> Callable[[Unpickler], None]:
    return lambda machine: machine._push(machine._memo[machine._number(form)])


def _tuple(count: int) -> Callable[[Unpickler], None]:
    return lambda machine: machine._last(count)


#: The instructions that torch's files consist of, and those of newer protocols for the same things.
_TABLE: dict[bytes, Callable[[Unpickler], None]] = {
    b"\x80": lambda machine: None if machine._number("B") <= 5 else _newer(),
    b"\x95": lambda machine: machine._number("<Q"),  # the length of a frame, which tells nothing
    b"(": _constant(lambda: _MARK),
    b"0": lambda machine: machine._stack.pop(),
    b"N": _constant(lambda: None), b"\x88": _constant(lambda: True), b"\x89": _constant(lambda: False),
    b"J": _value("<i"), b"K": _value("B"), b"M": _value("<H"), b"G": _value(">d"),
    b"\x8a": lambda machine: machine._push(int.from_bytes(machine._bytes(machine._number("B")), "little", signed=True)),
    b"X": _text("<I"), b"\x8c": _text("B"), b"U": _text("B"), b"T": _text("<I"),
    b"B": _raw("<I"), b"C": _raw("B"),
    b")": _constant(tuple), b"]": _constant(list), b"}": _constant(dict), b"\x8f": _constant(set),
    b"\x85": _tuple(1), b"\x86": _tuple(2), b"\x87": _tuple(3),
    b"t": lambda machine: machine._push(tuple(machine._since_mark())),
    b"l": lambda machine: machine._push(machine._since_mark()),
    b"a": lambda machine: machine._extend([machine._stack.pop()]),
    b"e": lambda machine: machine._extend(machine._since_mark()),
    b"\x90": lambda machine: machine._extend(machine._since_mark()),
    b"s": lambda machine: machine._set([machine._stack.pop(), machine._stack.pop()][::-1]),
    b"u": lambda machine: machine._set(machine._since_mark()),
    b"q": _put("B"), b"r": _put("<I"), b"\x94": lambda machine: machine._remember(len(machine._memo)),
    b"h": _get("B"), b"j": _get("<I"),
    b"c": lambda machine: machine._global(machine._line(), machine._line()),
    b"\x93": lambda machine: machine._stack_global(),
    b"R": lambda machine: machine._call(), b"\x81": lambda machine: machine._call(),
    b"b": lambda machine: machine._build(),
    b"Q": lambda machine: machine._push(machine._stored(machine._stack.pop())),
}  # fmt: skip


def _newer() -> None:
    raise ValueError("its pickle is of a newer protocol than this version reads")
