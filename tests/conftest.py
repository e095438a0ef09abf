"""What all tests share: a kernel cache that outlives the run, and property tests that have no deadline."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.recipes import Family, make_family


def pytest_configure() -> None:
    """Compiled kernels go where the next run finds them, and where those of an installed smelt are left alone."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("SMELT_CACHE", str(Path(home) / "smelt-tests"))


# The first example may compile for seconds.
settings.register_profile("smelt", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("smelt")


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A small Llama and three fine-tunes of it on disk, never to be changed by a test."""
    return make_family(tmp_path_factory.mktemp("family"))
