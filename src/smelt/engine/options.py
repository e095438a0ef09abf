"""The options of a run, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import UsageError
from ..recipe import parse_size
from .execute import usable_cores

#: Memory that Python, numpy and the compiler take before any weight is read.
BASELINE = 192 << 20

#: Bytes per weight file when neither the caller nor the recipe says.
SHARD_SIZE = 5 * 10**9

#: The least ``--memory``.
LEAST_MEMORY = 256 << 20


@dataclass(frozen=True)
class Options:
    """What the caller chose. ``memory`` bounds the whole process."""

    device: str = "cpu"
    threads: int = 1
    memory: int = 1 << 30
    seed: int | None = None
    shard_size: int | None = None
    on_extra: Literal["error", "copy", "drop", "merge"] = "error"
    on_nonfinite: Literal["error", "warn", "allow"] = "error"
    force: bool = False
    strict: bool = False
    card: bool = True
    raw: bool = False
    stages: Path | None = None
    truncate_embeddings: bool = False
    allow_pickle: bool = False
    overwrite: bool = False
    resume: bool | None = None
    save_state: bool = False


def options_of(
    *, device: str = "cpu", threads: int | None = None, memory: str | int = "1GiB", seed: int | None = None,
    shard_size: str | int | None = None, on_extra: str = "error", on_nonfinite: str = "error", force: bool = False,
    strict: bool = False, card: bool = True, raw: bool = False, stages: str | Path | None = None,
    truncate_embeddings: bool = False, allow_pickle: bool = False, overwrite: bool = False,
    resume: bool | None = None, save_state: bool = False,
) -> Options:  # fmt: skip
    """Check every option; UsageError with all that is wrong."""
    problems = []
    if threads is not None and threads < 1:
        problems.append(f"threads must be at least 1, not {threads}")
    if on_extra not in ("error", "copy", "drop", "merge"):
        problems.append(f"on_extra must be error, copy, drop or merge, not {on_extra!r}")
    if on_nonfinite not in ("error", "warn", "allow"):
        problems.append(f"on_nonfinite must be error, warn or allow, not {on_nonfinite!r}")
    if device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", device):
        problems.append(f"device must be cpu, cuda or cuda:N, not {device!r}")
    budget = _size(memory, "memory", problems)
    shard = None if shard_size is None else _size(shard_size, "shard_size", problems)
    if budget < LEAST_MEMORY and not problems:
        problems.append(f"memory must be at least 256MiB, not {memory}")
    UsageError.gather(problems)
    return Options(
        device, threads or usable_cores(), budget, seed, shard, on_extra, on_nonfinite, force, strict, card, raw,  # type: ignore[arg-type]
        None if stages is None else Path(stages), truncate_embeddings, allow_pickle, overwrite, resume, save_state,
    )  # fmt: skip


def _size(value: str | int, name: str, problems: list[str]) -> int:
    """Bytes; what is wrong is appended to ``problems``."""
    try:
        return parse_size(value)
    except UsageError as error:
        problems.append(f"{name}: {error}")
        return 1
