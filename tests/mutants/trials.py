"""A copy of the project in which one module at a time is replaced, and its tests run."""

from __future__ import annotations

import ast
import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = Path("src", "smelt")

#: What tests need; the rest of the project is not copied.
_COPIED = ("src", "tests", "docs", "benchmarks", "examples")
_NOT_COPIED = shutil.ignore_patterns("__pycache__", "golden", "mergekit_cases")

#: Compiled kernels, for the next time.
_KERNELS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "smelt-mutants")

#: A mutant may ask for any amount of memory.
_ADDRESSES = 16 << 30


class Trials:
    """A copy of the project in ``home``, in which these modules are put into the form that mutants have."""

    def __init__(self, home: Path, modules: Iterable[str]) -> None:
        self._tree, self._work = home / "tree", home / "work"
        self._tree.mkdir()
        for name in _COPIED:
            shutil.copytree(ROOT / name, self._tree / name, ignore=_NOT_COPIED)
        shutil.copy2(ROOT / "pyproject.toml", self._tree)
        for module in modules:
            path = self._tree / PACKAGE / module
            path.write_text(ast.unparse(ast.parse(path.read_text())))

    def prepare(self, tests: Sequence[str]) -> None:
        """Run these tests: they must pass. The kernels that they need are kept."""
        _KERNELS.mkdir(parents=True, exist_ok=True)
        code, output = self._pytest(tests, _KERNELS, 600)
        if code:
            raise SystemExit(f"tests fail without a mutant:\n{output}")

    def survives(self, module: str, text: str, tests: Sequence[str], limit: float) -> bool:
        """Whether all tests pass within ``limit`` seconds where the module has this text."""
        path = self._tree / PACKAGE / module
        kept = path.read_text()
        _replace(path, text)
        try:
            return self._pytest(tests, None, limit)[0] == 0
        finally:
            _replace(path, kept)

    def _pytest(self, tests: Sequence[str], cache: Path | None, limit: float) -> tuple[int, str]:
        """Exit code and output. Without a ``cache`` a copy of the kernels is used: a mutant may do anything to it."""
        own = self._work / "cache"
        shutil.copytree(_KERNELS, own) if cache is None else self._work.mkdir()
        try:
            return self._ended(tests, cache or own, limit)
        finally:
            shutil.rmtree(self._work)

    def _ended(self, tests: Sequence[str], cache: Path, limit: float) -> tuple[int, str]:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        with open(self._work / "output", "w+b") as output:
            run = subprocess.Popen(
                command, cwd=self._tree, env=self._surroundings(cache), stdin=subprocess.DEVNULL, stdout=output,
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

    def _surroundings(self, cache: Path) -> dict[str, str]:
        """All that is written outside of the tree goes to the work folder, and random tests draw the same numbers."""
        return {
            **os.environ, "PYTHONPATH": os.pathsep.join(["src", "."]), "CI": "1", "TMPDIR": str(self._work),
            "HOME": str(self._work), "XDG_CACHE_HOME": str(self._work), "SMELT_CACHE": str(cache),
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
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()
