"""What runs that were killed have left behind: found, described, and removed when that is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import storage
from ..errors import InputRejected, OperationFailed, UsageError, show
from .journal import NAME as JOURNAL
from .journal import recorded
from .publish import SUFFIX, claim, work_folder


@dataclass(frozen=True)
class Leftover:
    """A work folder. ``tensors``: how many the next run of the same plan would find finished, at most."""

    path: Path
    out: Path
    nbytes: int
    modified: float  # seconds since 1970
    tensors: int
    running: bool

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path), "out": str(self.out), "bytes": self.nbytes, "modified": self.modified,
            "tensors": self.tensors, "running": self.running,
        }  # fmt: skip


def leftovers(places: Sequence[str | Path] = (".",)) -> list[Leftover]:
    """The work folders in some folders, or of some destinations, or themselves; those of running merges too.

    Raises UsageError for a place that is neither there nor the destination of an unfinished run.
    """
    return [_described(folder) for place in places for folder in _found(Path(place))]


def remove_leftovers(places: Sequence[str | Path]) -> list[Leftover]:
    """Remove what :func:`leftovers` finds, and return it. OperationFailed for what a running merge has in use."""
    found = leftovers(places)
    for leftover in found:
        try:
            with claim(leftover.out) as work:
                for name in set(storage.listdir(work)) - {storage.LOCK}:
                    storage.remove_tree(work / name)
        except InputRejected as error:
            raise OperationFailed(*error.problems) from error
    return found


def _found(place: Path) -> Iterator[Path]:
    if place.name.endswith(SUFFIX) and storage.is_folder(place):
        yield place
        return
    inside = storage.listdir(place) if storage.is_folder(place) else []
    folders = [place / name for name in inside if name.endswith(SUFFIX)]
    folders += [work_folder(place)] if storage.is_folder(work_folder(place)) else []
    if not folders and not storage.is_folder(place):
        raise UsageError(f"{show(place)}: no such folder, and nothing is left of a run that was to write it")
    yield from folders


def _described(work: Path) -> Leftover:
    attempts = [work / name for name in storage.listdir(work) if name != storage.LOCK]
    journals = [attempt / JOURNAL for attempt in attempts if storage.exists(attempt / JOURNAL)]
    tensors = max((len(recorded(journal)[0]) for journal in journals), default=0)
    return Leftover(
        work, work.with_name(work.name.removesuffix(SUFFIX)), storage.allocated(work),
        max(map(storage.modified, (work, *attempts, *journals))), tensors, storage.is_locked(work),
    )  # fmt: skip
