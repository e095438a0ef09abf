"""The experiments. Each takes how many trials to make, and tells how many there were and what did not hold."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tests.faults.checker import state_of, violations
from tests.faults.power import crash
from tests.faults.scene import Scene, make_inputs

T = TypeVar("T")

CODES = ("ENOSPC", "EIO", "EDQUOT", "EROFS", "EMFILE", "EINTR", "ENOMEM")


@dataclass(frozen=True)
class Share:
    """Part ``number`` of ``count`` of an experiment whose trials are in no order."""

    number: int = 0
    count: int = 1

    def of(self, trials: Sequence[T]) -> Sequence[T]:
        return trials[self.number :: self.count]


WHOLE = Share()


@dataclass
class Result:
    """``counts``: how the trials ended, in words. ``seconds``: of one process."""

    name: str
    trials: int = 0
    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def judge(self, place: Scene, out: Path, overwrite: bool, code: int | None, what: str) -> str:
        """Check the invariants; the state of the destination."""
        self.trials += 1
        expected = place.expected(overwrite)
        self.problems += [f"{what}: {problem}" for problem in violations(out, expected, code)]
        state = state_of(out, expected)
        self.counts[f"destination {state}"] += 1
        return state

    def and_(self, other: Result) -> Result:
        """Both parts of one experiment."""
        trials, problems = self.trials + other.trials, self.problems + other.problems
        return Result(self.name, trials, problems, self.counts + other.counts, self.seconds + other.seconds)

    def resume(self, place: Scene, out: Path, overwrite: bool, what: str) -> None:
        """The same run again ends well, gives the same bytes and leaves nothing."""
        log = place.folder / "log"
        code = place.server.run(*place.arguments(out, *(["--overwrite"] if overwrite else [])), log=log)
        told = log.read_text()
        if code or state_of(out, place.expected(overwrite)) != "new":
            self.problems.append(f"{what}: run again: exit code {code}: {told}")
        if set(os.listdir(out.parent)) != {out.name}:
            self.problems.append(f"{what}: run again: {os.listdir(out.parent)} are there")
        self.counts["continued" if "continued a run" in told else "begun anew"] += 1
        self.counts["same bytes when run again"] += not code


def kills_at_random(place: Scene, trials: int, overwrite: bool) -> Result:
    """1: SIGKILL at any time of a run, then the run again."""
    result, luck = Result(f"1 SIGKILL at random times, {_way(overwrite)}"), random.Random(1)
    more = ["--overwrite"] if overwrite else []
    for trial in range(trials):
        with place.trial(overwrite=overwrite) as out:
            seconds = luck.uniform(0, place.seconds)
            code = place.server.killed(seconds, *place.arguments(out, *more))
            result.counts["killed" if code == -signal.SIGKILL else "ended before"] += 1
            state = result.judge(place, out, overwrite, None, f"trial {trial}")
            if state != "new":
                result.resume(place, out, overwrite, f"trial {trial}")
    return result


#: Where a run is killed: function of storage, whether after it, how many of its calls are tried.
POINTS = (
    ("lock_folder", True, 1), ("ensure_folder", True, 3), ("create", True, 3), ("reopen", True, 5),
    ("pwrite_all", False, 40), ("append", False, 8), ("append", True, 8), ("fsync", False, 30), ("fsync", True, 30),
    ("fsync_directory", False, 12), ("write_small", False, 5), ("write_small", True, 5),
    ("publish_directory", False, 1), ("_rename", False, 1), ("_rename", True, 1), ("_swap", False, 1),
    ("_swap", True, 1), ("publish_directory", True, 1), ("remove_tree", False, 1), ("remove_tree", True, 1),
    ("unlock_folder", False, 1), ("unlock_folder", True, 1),
)  # fmt: skip


def kills_at_points(place: Scene, trials: int, overwrite: bool) -> Result:
    """2: SIGKILL before or after each operation that matters, ``trials`` at each."""
    result, luck = Result(f"2 SIGKILL at named points, {_way(overwrite)}"), random.Random(2)
    more = ["--overwrite"] if overwrite else []
    for operation, after, calls in POINTS:
        for trial in range(trials):
            nth = luck.randrange(calls)
            what = f"{'after' if after else 'before'} {operation} {nth}"
            with place.trial(overwrite=overwrite) as out:
                kill = {"operation": operation, "nth": nth, "after": after}
                faults = {"tear": luck.randrange(30)} if operation == "pwrite_all" and trial % 2 else {"kill": kill}
                code = place.server.run(*place.arguments(out, *more), **faults)
                result.counts["killed" if code == -signal.SIGKILL else "not reached"] += 1
                if result.judge(place, out, overwrite, None if code < 0 else code, what) != "new":
                    result.resume(place, out, overwrite, what)
    return result


def operations_fail(place: Scene, trials: int | None, overwrite: bool, share: Share = WHOLE) -> Result:
    """3: operation k of the file system fails, once or from then on, with each error; all, or a sample."""
    result, luck = Result(f"3 an operation fails, {_way(overwrite)}"), random.Random(3)
    total = _count(place, overwrite, interval=10_000)
    every = [(nth, code, once) for nth in range(total) for code in CODES for once in (True, False)]
    chosen = every if trials is None else luck.sample(every, min(trials, len(every)))
    for nth, code, once in share.of(chosen):
        _failing(result, place, overwrite, {"nth": nth, "code": code, "once": once}, interval=10_000)
    return result


def syncs_fail(place: Scene, trials: int | None, overwrite: bool) -> Result:
    """7: each fsync fails once, also where the run was to be continued: nothing of it is kept."""
    result = Result(f"7 fsync fails once, {_way(overwrite)}")
    total = _count(place, overwrite, "fsync")
    for nth in range(total if trials is None else min(trials, total)):
        for more in ((), ("--resume",)):
            fail = {"nth": nth, "code": "EIO", "kinds": ["fsync"]}
            _failing(result, place, overwrite, fail, *more, may_stay=False)
    return result


def _count(place: Scene, overwrite: bool, *kinds: str, interval: int = 1) -> int:
    """How many operations a run takes."""
    with place.trial(overwrite=overwrite) as out:
        more = ["--overwrite"] if overwrite else []
        fail = {"nth": -1, "kinds": kinds, "once": True}
        count = place.folder / "count"
        assert place.server.run(*place.arguments(out, *more), fail=fail, result=str(count), interval=interval) == 0
        return int(count.read_text())


def _failing(
    result: Result,
    place: Scene,
    overwrite: bool,
    fail: dict[str, Any],
    *options: str,
    may_stay: bool = True,
    interval: int = 1,
) -> None:
    what, log = f"{fail} {options}", place.folder / "log"
    with place.trial(overwrite=overwrite) as out:
        more = [*options, *(["--overwrite"] if overwrite else [])]
        began = time.monotonic()
        faults = fail if "shim" in fail else {"fail": fail}
        code = place.server.run(*place.arguments(out, *more), **faults, log=log, interval=interval)
        told = log.read_text()
        unsure = "is in place and whole, but" in told  # which is said with exit code 1
        result.counts["in place, but it could not be synced"] += unsure
        state = result.judge(place, out, overwrite, None if unsure else code, what)
        if time.monotonic() - began > 10:
            result.problems.append(f"{what}: took {time.monotonic() - began:.1f} s")
        if "Traceback" in told or code not in (0, 1, 3) or (code and not told.startswith("error: ")):
            result.problems.append(f"{what}: exit code {code}: {told}")
        if code and str(place.folder) not in told:
            result.problems.append(f"{what}: no path is named: {told}")
        left = set(os.listdir(out.parent)) - {out.name}
        result.counts["staging left"] += bool(left)
        once = fail.get("shim", fail).get("once")
        if left and state != "new" and (not may_stay or once):
            result.problems.append(f"{what}: {left} was left: {told}")
        if state != "new":
            result.resume(place, out, overwrite, what)


def short_transfers(place: Scene, trials: int) -> Result:
    """5: reads and writes do a random part of what they were asked to."""
    result = Result("5 short reads and writes")
    for trial in range(trials):
        with place.trial() as out:
            code = place.server.run(*place.arguments(out), short=trial)
            result.judge(place, out, False, code, f"seed {trial}")
            if code:
                result.problems.append(f"seed {trial}: exit code {code}")
    return result


def signals(place: Scene, trials: int, overwrite: bool) -> Result:
    """13: a signal at any time of a run: the right exit code, and nothing left; with --resume it can go on."""
    result, luck = Result(f"13 signals, {_way(overwrite)}"), random.Random(13)
    more = ["--overwrite"] if overwrite else []
    for _ in range(trials):
        number = luck.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        keep = luck.random() < 0.5
        with place.trial(overwrite=overwrite) as out:
            arguments = place.arguments(out, *more, *(["--resume"] if keep else []))
            code = place.server.killed(luck.uniform(0.2, 1) * place.seconds, *arguments, number=number)
            what = f"{number.name} {'with' if keep else 'without'} --resume, exit code {code}"
            result.counts[f"exit code {code}"] += 1
            if code not in (0, 128 + number, -number):  # the last before smelt was there to hear it
                result.problems.append(what)
            state = result.judge(place, out, overwrite, None, what)
            left = set(os.listdir(out.parent)) - {out.name}
            if left and not keep:
                result.problems.append(f"{what}: {left} was left")
            if state != "new":
                result.resume(place, out, overwrite, what)
    return result


def signals_at_places(place: Scene, trials: int | None, overwrite: bool, share: Share = WHOLE) -> Result:
    """13: SIGTERM at each place at which it can interrupt what guards the work folder; all, or a sample."""
    result, luck = Result(f"13 SIGTERM at every place, {_way(overwrite)}"), random.Random(14)
    more = ["--overwrite"] if overwrite else []
    count = place.folder / "count"
    with place.trial(overwrite=overwrite) as out:
        assert place.server.run(*place.arguments(out, *more), signal={"nth": -1}, result=str(count)) == 0
    total = int(count.read_text())
    for nth in share.of(list(range(total)) if trials is None else luck.sample(range(total), trials)):
        with place.trial(overwrite=overwrite) as out:
            code = place.server.run(*place.arguments(out, *more), signal={"nth": nth})
            what = f"place {nth}, exit code {code}"
            result.counts[f"exit code {code}"] += 1
            result.judge(place, out, overwrite, None, what)
            left = set(os.listdir(out.parent)) - {out.name}
            if left or code not in (0, 128 + signal.SIGTERM):  # 0: there were fewer places, as threads had it
                result.problems.append(f"{what}: {left} was left")
    return result


def rivals(place: Scene, trials: int, overwrite: bool) -> Result:
    """12: several processes write one destination: one wins, the others exit 3 (or 2: it is there already)."""
    result, luck = Result(f"12 parallel runs, {_way(overwrite)}"), random.Random(12)
    more = ["--overwrite"] if overwrite else []
    for trial in range(trials):
        with place.trial(overwrite=overwrite) as out:
            codes = place.server.together(luck.randint(2, 8), *place.arguments(out, *more))
            result.judge(place, out, overwrite, None, f"trial {trial}")
            result.counts[f"{codes.count(0)} of them won"] += 1
            if state_of(out, place.expected(overwrite)) != "new" or set(codes) - {0, 2, 3}:
                result.problems.append(f"trial {trial}: exit codes {codes}")
            if not overwrite and codes.count(0) != 1:
                result.problems.append(f"trial {trial}: exit codes {codes}")
    return result


def below_python(place: Scene, trials: int, overwrite: bool) -> Result:
    """4: as 3, in a library between Python and the C library. ``place`` was made with :func:`shimmed`."""
    result, luck = Result(f"4 a call of the C library fails, {_way(overwrite)}"), random.Random(4)
    for _ in range(trials):
        code = luck.choice(CODES)
        once = luck.random() < 0.5 or code == "EINTR"  # Python tries again, for ever if need be
        fault = {"nth": luck.randrange(500), "code": code, "once": once}
        _failing(result, place, overwrite, {"shim": fault})
    return result


def shim(folder: Path) -> Path | None:
    """The library, where there is a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    source, library = Path(__file__).with_name("shim.c"), folder / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def power_fails(place: Scene, trials: int, overwrite: bool) -> Result:
    """8: the disk after a power cut at any moment of a run, then the run again."""
    result, luck = Result(f"8 power cuts, {_way(overwrite)}"), random.Random(8)
    log = place.folder / "record"
    more = ["--overwrite"] if overwrite else []
    with place.trial(overwrite=overwrite) as out:
        assert place.server.run(*place.arguments(out, *more), record=str(out.parent), result=str(log)) == 0
    before, operations = pickle.loads(log.read_bytes())
    result.counts["operations"] = len(operations)
    for trial in range(trials):
        with place.trial(empty=True) as out:
            crash(before, operations, luck).write_to(out.parent)
            if result.judge(place, out, overwrite, None, f"state {trial}") != "new":
                result.resume(place, out, overwrite, f"state {trial}")
    return result


def full_disk(place: Scene, trials: int) -> Result:
    """6: the destination's disk is too small; a real one where it may be mounted, else by a limit on files."""
    result = Result("6 full disk")
    with tempfile.TemporaryDirectory() as disk, tempfile.TemporaryDirectory() as home:
        small, folder = Path(disk), Path(home)
        size = 8 << 10  # less than one of the four files
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", small], capture_output=True)
        try:
            for trial in range(trials):
                log, what = place.folder / "log", f"trial {trial}"
                limit = None if mounted.returncode == 0 and trial % 2 else size
                where = folder if limit else small
                code = place.server.run(*place.arguments(where / "out"), log=log, file_limit=limit)
                result.trials += 1
                told = log.read_text()
                early = "not enough disk" in told
                result.counts["refused before any work" if early else "refused when the files were made"] += 1
                left = os.listdir(where)
                if code != 1 or not (early or "no space" in told) or left:
                    result.problems.append(f"{what}: exit code {code}, {left}: {told}")
        finally:
            if mounted.returncode == 0:
                subprocess.run(["umount", small], check=True)
    return result


MUTATIONS = ("truncate", "append", "replace", "touch", "overwrite")


def inputs_change(place: Scene, trials: int) -> Result:
    """10: an input file is changed while it is read: exit code 1, no output, and no crash."""
    result, luck = Result("10 inputs that change"), random.Random(10)
    for trial in range(trials):
        how, nth = luck.choice(MUTATIONS), luck.randrange(12, 70)  # planning takes ten reads
        with place.trial() as out:
            own = out.parent.parent / "changing"
            models = make_inputs(own)
            fault = {"path": f"{luck.choice(models)}/model.safetensors", "how": how, "nth": nth}
            log = place.folder / "log"
            recipe = own / "new.yml"
            code = place.server.run("merge", recipe, out, "--threads", 2, "--force", mutate=fault, log=log)
            shutil.rmtree(own)
            result.trials += 1
            result.counts[f"{how}: exit code {code}"] += 1
            if code != 1 or os.listdir(out.parent) or "model.safetensors" not in log.read_text():
                result.problems.append(f"trial {trial}: {fault}: exit code {code}: {log.read_text()}")
    return result


def surroundings(place: Scene, trials: int) -> Result:
    """13: no home, a home that cannot be written, other masks and locales, a closed stdout: the same bytes."""
    result = Result("13 surroundings")
    environments: list[dict[str, str]] = [
        {"HOME": "/nonexistent"}, {"HOME": "/proc"}, {"TZ": "Pacific/Kiritimati"}, {"LC_ALL": "C", "LANG": "C"},
        {"TERM": "dumb"}, {},
    ]  # fmt: skip
    cases = itertools.product(environments, (0o077, 0o002, 0o000), (False, True))
    for environment, mask, closed in itertools.islice(cases, trials):
        what = f"{environment}, umask {mask:o}, stdout {'closed' if closed else 'open'}"
        with place.trial() as out:
            code = place.server.run(*place.arguments(out), environment=environment, umask=mask, closed=closed)
            result.judge(place, out, False, code, what)
            modes = {path.stat().st_mode & 0o777 for path in out.iterdir()} if out.exists() else set()
            if code or modes != {0o666 & ~mask} or out.stat().st_mode & 0o777 != 0o777 & ~mask:
                result.problems.append(f"{what}: exit code {code}, modes {modes}")
    return result


def bit_rot(place: Scene, trials: int) -> Result:
    """17: one bit of an output flips: ``smelt verify`` finds it, and names what holds it."""
    result, luck = Result("17 bit rot"), random.Random(17)
    log = place.folder / "log"
    with place.trial() as out:
        assert place.server.run(*place.arguments(out)) == 0
        files = sorted(path for path in out.iterdir() if path.name != "smelt-manifest.json")
        sizes = [path.stat().st_size for path in files]
        for trial in range(trials):
            (path,) = luck.choices(files, sizes)
            content = path.read_bytes()
            place_, bit = luck.randrange(len(content)), luck.randrange(8)
            path.write_bytes(content[:place_] + bytes([content[place_] ^ 1 << bit]) + content[place_ + 1 :])
            code = place.server.run("verify", out, log=log)
            path.write_bytes(content)
            result.trials += 1
            result.counts["found"] += code in (1, 3)
            if code not in (1, 3) or path.name not in log.read_text():
                what = f"trial {trial}: bit {bit} of byte {place_} of {path.name}"
                result.problems.append(f"{what}: exit code {code}: {log.read_text()}")
    return result


def _way(overwrite: bool) -> str:
    return "overwriting" if overwrite else "fresh"
