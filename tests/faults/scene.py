"""Where a fault is played: models, recipes, the results that are right, and a process that runs smelt."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.faults.checker import Expected, files_of, stamp
from tests.small_models import bf16


class Server:
    """A warm process that forks one run of smelt after the other."""

    def __init__(self, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
        )  # fmt: skip

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()

    def start(self, *arguments: object, log: Path | None = None, **faults: Any) -> int:
        """Fork a run; its process id. ``faults`` are those of the server's ``Job``."""
        job = {"arguments": [str(argument) for argument in arguments], "log": str(log or os.devnull), **faults}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """How the run ended: its exit code, or minus the signal's number."""
        (code,) = self._statuses()
        return code

    def _statuses(self) -> list[int]:
        return [os.waitstatus_to_exitcode(int(word)) for word in self._line().split()]

    def together(self, copies: int, *arguments: object) -> list[int]:
        """The same run several times at once; how they ended."""
        self.start(*arguments, copies=copies)
        return self._statuses()

    def run(self, *arguments: object, log: Path | None = None, **faults: Any) -> int:
        self.start(*arguments, log=log, **faults)
        return self.wait()

    def killed(self, seconds: float, *arguments: object, number: int = signal.SIGKILL, **faults: Any) -> int:
        """Run, with a signal after so many seconds."""
        pid = self.start(*arguments, **faults)
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        return self.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@dataclass(frozen=True)
class Scene:
    """Inputs and the right results. Every trial has a folder of its own below ``folder``."""

    folder: Path
    server: Server
    fresh: Expected
    overwriting: Expected
    seconds: float
    options: tuple[str, ...]

    def arguments(self, out: Path, *more: str) -> list[object]:
        """Of the run that makes the new result."""
        return ["merge", self.folder / "inputs" / "new.yml", out, "--threads", 2, *self.options, *more]

    @contextlib.contextmanager
    def trial(self, *, overwrite: bool = False, empty: bool = False) -> Iterator[Path]:
        """A destination in an empty folder; when overwriting it holds the old result. ``empty``: no folder either."""
        home = self.folder / "trial"
        try:
            if not empty:
                home.mkdir()
            if overwrite:
                shutil.copytree(self.folder / "old" / "out", home / "out", copy_function=os.link)
            yield home / "out"
        finally:
            shutil.rmtree(home)

    def expected(self, overwrite: bool) -> Expected:
        return self.overwriting if overwrite else self.fresh


@contextlib.contextmanager
def scene(folder: Path, *, width: int = 32, layers: int = 6, **environment: str) -> Iterator[Scene]:
    """Three models of ``4 * layers * width**2`` numbers, four files as result."""
    inputs = folder / "inputs"
    make_inputs(inputs, width, layers)
    shard = 2 * 4 * layers * width * width // 4
    options = ("--shard-size", str(shard + 1), "--force")
    stamps = stamp(inputs)
    with Server(**environment) as server:
        took = 0.0
        for name in ("warm", "old", "new"):
            (folder / name).mkdir()
            recipe = inputs / ("old.yml" if name == "old" else "new.yml")
            began = time.monotonic()
            code = server.run("merge", recipe, folder / name / "out", "--threads", 2, *options, log=folder / "log")
            took = time.monotonic() - began
            assert code == 0, (folder / "log").read_text()
        new, old = (files_of(folder / name / "out") for name in ("new", "old"))
        assert set(os.listdir(folder / "new")) == {"out"}
        assert new == files_of(folder / "warm" / "out"), "two runs differ"
        assert sum(name.endswith(".safetensors") for name in new) == 4
        fresh, overwriting = (Expected(new, before, inputs, stamps) for before in (None, old))
        yield Scene(folder, server, fresh, overwriting, took, options)


def make_inputs(folder: Path, width: int = 32, layers: int = 6) -> list[str]:
    """Three models and two recipes; the models' paths."""
    folder.mkdir()
    models = [_model(folder / f"m{index}", index, width, layers) for index in range(3)]
    _recipe(folder / "new.yml", {"merge_method": "ties", "parameters": {"density": 0.5}}, models)
    _recipe(folder / "old.yml", {"merge_method": "task_arithmetic"}, models)
    return models


def _model(folder: Path, seed: int, width: int, layers: int) -> str:
    base, tuned = np.random.default_rng(0), np.random.default_rng(seed)
    folder.mkdir()
    arrays = {
        f"layers.{layer}.{part}.weight": (
            base.standard_normal((width, width)) * 0.02 + seed * 0.001 * tuned.standard_normal((width, width))
        ).astype(np.float32)
        for layer in range(layers)
        for part in ("a", "b", "c", "d")
    }
    save_file(bf16(arrays), folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def _recipe(path: Path, top: Mapping[str, Any], models: list[str]) -> None:
    entries = [{"model": model, "parameters": {"weight": 0.5}} for model in models[1:]]
    path.write_text(json.dumps({**top, "base_model": models[0], "models": entries}))
