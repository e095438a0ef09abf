"""What making an adapter would read, hold and write, told by headers alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .report import Stored


@dataclass(frozen=True)
class Outlook:
    """What will be stored of one module: ``rank`` and ``nbytes`` are the most that can be.

    ``computed``: so many of the bytes wait on the disk until all modules are done.
    """

    module: str
    stored: Stored
    rank: int = 0
    nbytes: int = 0
    computed: int = 0
    why: str = ""


@dataclass(frozen=True)
class AdapterPlan:
    """A dry run. Sizes in bytes; what is written is an upper bound, since ranks follow from the weights.

    ``peak_memory``: the process itself, and the ``threads`` modules that are worked on at once.
    """

    inputs: list[str]
    bytes_read: int
    bytes_written: int
    disk_needed: int
    peak_memory: int
    threads: int
    notices: list[str]
    modules: list[Outlook]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return asdict(self)
