"""A copy of the project in which one module at a time is replaced, and its tests run."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = Path("src", "smelt")

#: What tests need; the rest of the project is not copied.
_COPIED = ("src", "tests", "docs", "benchmarks", "examples", "pyproject.toml", "README.md")
_NOT_COPIED = shutil.ignore_patterns("__pycache__", "golden", "mergekit_cases")

#: A mutant may ask for any amount of memory.
_ADDRESSES = 16 << 30


class Trials:
    """A copy of the project in ``home``."""

    def __init__(self, home: Path) -> None:
        self._tree, self._cache, self._work = home / "tree", home / "cache", home / "work"
        self._tree.mkdir()
        for name in _COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self._tree / name, ignore=_NOT_COPIED)
            else:
                shutil.copy2(ROOT / name, self._tree / name)

    def compare(self, module: str, text: str, tests: Sequence[str]) -> float:
        """Run the tests on ``text``, which means what the module does; returns the seconds they take.

        Also compiles the kernels that they use and the modules that they import, for the mutants to come.
        """
        self._run(module, text, tests, 600)
        began = time.monotonic()
        code, output = self._run(module, text, tests, 600)
        if code:
            raise SystemExit(f"the tests of {module} fail without a mutant:\n{output}")
        return time.monotonic() - began

    def survives(self, module: str, text: str, tests: Sequence[str], limit: float) -> bool:
        """Whether all tests pass within ``limit`` seconds."""
        kept = self._cache.with_name("kept")
        shutil.copytree(self._cache, kept)
        try:
            return self._run(module, text, tests, limit)[0] == 0
        finally:
            shutil.rmtree(self._cache)  # a mutant may have put anything there
            kept.rename(self._cache)

    def _run(self, module: str, text: str, tests: Sequence[str], limit: float) -> tuple[int, str]:
        path = self._tree / PACKAGE / module
        kept = path.read_text()
        _replace(path, text)
        self._work.mkdir()
        try:
            return self._pytest(tests, limit)
        finally:
            _replace(path, kept)
            shutil.rmtree(self._work)

    def _pytest(self, tests: Sequence[str], limit: float) -> tuple[int, str]:
        self._cache.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        with open(self._work / "output", "w+b") as output:
            run = subprocess.Popen(
                command, cwd=self._tree, env=self._surroundings(), stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_bound,
            )  # fmt: skip
            try:
                code = run.wait(limit)
            except subprocess.TimeoutExpired:
                code = -1
            finally:
                _end(run)
            output.seek(0)
            return code, output.read().decode(errors="replace")[-3000:]

    def _surroundings(self) -> dict[str, str]:
        """All that is written outside of the tree goes to the work folder, and random tests draw the same numbers."""
        return {
            **os.environ, "PYTHONPATH": os.pathsep.join(["src", "."]), "CI": "1", "TMPDIR": str(self._work),
            "HOME": str(self._work), "XDG_CACHE_HOME": str(self._work), "SMELT_CACHE": str(self._cache),
        }  # fmt: skip


def _replace(path: Path, text: str) -> None:
    for made in path.parent.glob(f"__pycache__/{path.stem}.*"):  # it might pass for that of the other text
        made.unlink()
    path.write_text(text)


def _bound() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end(run: subprocess.Popen[bytes]) -> None:
    """End a run and what it has started."""
    try:
        os.killpg(run.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    run.wait()
