"""``python -m tests.faults [EXPERIMENT]...``: the whole campaign, or some experiments of it, as a table."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.faults import campaign
from tests.faults.campaign import Result
from tests.faults.scene import Scene, scene

Experiment = Callable[[Scene], Result]


def experiments() -> dict[str, list[Experiment]]:
    """Number -> what is run, with as many trials as are asked for."""
    both = (False, True)
    return {
        "1": [partial(campaign.kills_at_random, trials=500, overwrite=way) for way in both],
        "2": [partial(campaign.kills_at_points, trials=20, overwrite=way) for way in both],
        "3": [partial(campaign.operations_fail, trials=None, overwrite=way) for way in both],
        "4": [partial(campaign.below_python, trials=200, overwrite=way) for way in both],
        "5": [partial(campaign.short_transfers, trials=1000)],
        "6": [partial(campaign.full_disk, trials=20)],
        "7": [partial(campaign.syncs_fail, trials=None, overwrite=way) for way in both],
        "8": [partial(campaign.power_fails, trials=1000, overwrite=way) for way in both],
        "10": [partial(campaign.inputs_change, trials=200)],
        "12": [partial(campaign.rivals, trials=100, overwrite=way) for way in both],
        "13": [*(partial(campaign.signals, trials=200, overwrite=way) for way in both),
               *(partial(campaign.signals_at_places, trials=None, overwrite=way) for way in both),
               partial(campaign.surroundings, trials=36)],
        "17": [partial(campaign.bit_rot, trials=1000)],
    }  # fmt: skip


@contextlib.contextmanager
def place_for(number: str, folder: Path) -> Iterator[Scene | None]:
    """A scene of its own; None where the experiment cannot be made here."""
    library = campaign.shim(folder) if number == "4" else None
    if number == "4" and library is None:
        yield None
        return
    with scene(folder, **({"LD_PRELOAD": str(library)} if library else {})) as place:
        yield place


def main(wanted: Sequence[str]) -> int:
    known, failed = experiments(), False
    print("| experiment | trials | violations | seconds | what happened |\n| --- | --- | --- | --- | --- |")
    for number in wanted or known:
        with tempfile.TemporaryDirectory() as folder, place_for(number, Path(folder)) as place:
            for experiment in known[number] if place is not None else ():
                began = time.monotonic()
                result = experiment(place)
                failed |= bool(result.problems)
                seconds = round(time.monotonic() - began)
                counts = ", ".join(f"{count} {what}" for what, count in sorted(result.counts.items()))
                print(
                    f"| {result.name} | {result.trials} | {len(result.problems)} | {seconds} | {counts} |", flush=True
                )
                print(*result.problems[:20], sep="\n", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
