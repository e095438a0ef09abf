"""A copy of the project in which one module at a time is replaced, and its tests run."""

from __future__ import annotations

import ast
import contextlib
import importlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = Path("src", "smelt")

#: What tests need; the rest of the project is not copied.
_COPIED = ("src", "tests", "docs", "benchmarks", "examples")
_NOT_COPIED = shutil.ignore_patterns("__pycache__", "golden", "mergekit_cases")

#: Compiled kernels, for the next time.
_KERNELS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "smelt-mutants")

#: What tests import beside the project; a mutant takes half the time where it is there already.
_NEEDED = (
    "hypothesis.strategies", "ml_dtypes", "numba", "numpy", "rich", "safetensors.numpy", "torch", "xxhash", "yaml",
)  # fmt: skip

#: pytest would have rewritten the assertions in some of them.
_LOADED = "ignore::pytest.PytestAssertRewriteWarning"

#: A mutant may ask for any amount of memory, and outlive whoever watches it: in bytes and seconds of a processor.
_MOST = {resource.RLIMIT_AS: 16 << 30, resource.RLIMIT_CPU: 400, resource.RLIMIT_CORE: 0}


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

    def _pytest(self, tests: Sequence[str], cache: Path | None, limit: float) -> tuple[int | None, str]:
        """Exit code and output. Without a ``cache`` a copy of the kernels is used: a mutant may do anything to it."""
        own = self._work / "cache"
        shutil.copytree(_KERNELS, own) if cache is None else self._work.mkdir()
        try:
            return self._ended(tests, cache or own, limit)
        finally:
            shutil.rmtree(self._work)

    def _ended(self, tests: Sequence[str], cache: Path, limit: float) -> tuple[int | None, str]:
        output = self._work / "output"
        output.touch()
        arguments = (self._tree, tests, self._surroundings(cache), output)
        run = multiprocessing.get_context("fork").Process(target=_run, args=arguments)
        run.start()
        try:
            run.join(limit)
            return run.exitcode, output.read_text(errors="replace")[-3000:]
        finally:
            _end(run)

    def _surroundings(self, cache: Path) -> dict[str, str]:
        """All that is written outside of the tree goes to the work folder, and random tests draw the same numbers."""
        work = str(self._work)
        return {
            "PYTHONPATH": os.pathsep.join(["src", "."]), "CI": "1", "TMPDIR": work, "HOME": work,
            "XDG_CACHE_HOME": work, "SMELT_CACHE": str(cache),
        }  # fmt: skip


def _run(tree: Path, tests: Sequence[str], surroundings: Mapping[str, str], output: Path) -> None:
    """Run the tests in this process, a copy of one that has loaded what they need but nothing of the project."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for what, most in _MOST.items():
        resource.setrlimit(what, (most, most))
    descriptor = os.open(output, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.update(surroundings)
    os.chdir(tree)
    sys.path[:0] = [str(tree / "src"), str(tree)]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("smelt", "tests")]:
        del sys.modules[name]
    tempfile.tempdir = None
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", _LOADED, *tests])
    sys.stdout.flush()
    os._exit(code)


def _replace(path: Path, text: str) -> None:
    for made in path.parent.glob(f"__pycache__/{path.stem}.*"):  # it might pass for that of the other text
        made.unlink()
    path.write_text(text)


def _end(run: multiprocessing.process.BaseProcess) -> None:
    """End a run and what it has started."""
    if run.is_alive():
        run.kill()
    run.join()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid or 0, signal.SIGKILL)


def load() -> None:
    """Import what the tests need, once for all."""
    for name in _NEEDED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
