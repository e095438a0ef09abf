"""How results look: JSON for programs, tables and short numbers for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import show

if TYPE_CHECKING:
    from rich.console import Console


def print_json(value: Any) -> None:
    """Print on stdout; NaN and infinities, which JSON lacks, become null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value


def console() -> Console:
    """Where results go: stdout, in colour on a terminal, as wide as they need to be elsewhere."""
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 240, highlight=False, markup=False)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table on stdout. A column whose head starts with ``>`` is right-aligned."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title_justify="left")
    table.title = None if title is None else Text(title, style="bold")
    for column in columns:
        right = column.startswith(">")
        table.add_column(Text(column.lstrip(">")), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out = console()
    with out.capture() as capture:
        out.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()), end="\n\n")


def print_pairs(pairs: Mapping[str, str]) -> None:
    """Lines ``name  value`` on stdout, names padded to one width."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        print(f"{name:{width}}  {value}")


def plain(name: object) -> str:
    """A name out of a file, escaped, without the quotes."""
    return show(name)[1:-1]


def size(nbytes: float) -> str:
    """Decimal bytes, as disks are sold: ``4.43 GB``."""
    return _scaled(nbytes, ("B", "kB", "MB", "GB", "TB"))


def count(number: float) -> str:
    """A short count: ``1.10 B`` parameters."""
    return _scaled(number, ("", "k", "M", "B", "T")).rstrip()


def _scaled(number: float, units: Sequence[str]) -> str:
    power = 0
    while abs(number) >= 1000 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {units[power]}" if power else f"{number:.0f} {units[0]}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
