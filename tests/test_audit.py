"""A merge opens what it was told to, and nothing else: no other file, no connection, no process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import smelt
from tests.audit import listening, strange
from tests.gguf_files import LLAMA, complete, save_llama
from tests.lora import written
from tests.pickled import save_arrays
from tests.recipes import Family, recipe
from tests.test_quantised_models import quantised_model


def plain(family: Family, folder: Path) -> str:
    return family.models[0]


def gguf(family: Family, folder: Path) -> str:
    return save_llama(folder / "m.gguf", family.model_arrays[0], quantised=True, metadata=LLAMA)


def adapted(family: Family, folder: Path) -> str:
    """Whose config names a file of the system as its base."""
    return f"{family.base}+{written(folder / 'adapter', 0)}"


def quantised(family: Family, folder: Path) -> str:
    return quantised_model(folder / "fp8", family.model_arrays[0])[0]


def pickled(family: Family, folder: Path) -> str:
    return str(save_arrays(folder / "m.pt", family.model_arrays[0]))


@pytest.mark.parametrize("kind", [plain, gguf, adapted, quantised, pickled], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("packing", [{}, {"output": {"format": "gguf"}}], ids=["safetensors", "gguf"])
def test_a_merge_opens_its_inputs_and_its_output(
    packing: dict[str, Any], kind: Callable[[Family, Path], str], family: Family, tmp_path: Path
) -> None:
    base = complete(family.base, tmp_path / "base")
    tree = recipe("ties", [kind(family, tmp_path), family.models[1]], base, parameters={"density": 0.5})
    smelt.merge({**tree, **packing}, tmp_path / "warm", allow_pickle=True, force=True)  # compiles, which opens more
    with listening() as opened:
        smelt.merge({**tree, **packing}, tmp_path / "out", allow_pickle=True, force=True)
        assert smelt.verify(tmp_path / "out").ok
    assert [what for what in strange(opened, tmp_path) if str(family.folder) not in str(what[1])] == []


def test_a_stranger_is_seen(tmp_path: Path) -> None:
    """The test above would pass on anything if this failed."""
    opened = [("open", str(tmp_path / "a")), ("open", "/etc/passwd"), ("socket.connect", None), ("open", 3)]
    assert strange(opened, tmp_path) == opened[1:3]
    with listening() as heard, open("/etc/hostname"):
        pass
    assert heard == [("open", "/etc/hostname")]
