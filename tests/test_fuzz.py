"""A short, repeatable part of ``make fuzz``, and every file that it has ever found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from tests.fuzz.chance import fuzz
from tests.fuzz.targets import KINDS
from tests.fuzz.trial import Trial


def with_metadata(text: str) -> bytes:
    """An adapter of which diffusers says this in its metadata."""
    factors = {"unet.layers.0.q.lora_A.weight": np.ones((2, 6), np.float32)}
    factors["unet.layers.0.q.lora_B.weight"] = np.ones((6, 2), np.float32)
    return save(factors, {"lora_adapter_metadata": text})


#: (target, the smallest file): each once ended in an error that nobody meant.
FOUND = [
    ("quantised", b'{"quantization_config":{"quant_method":"gptq","bits":"","":true}}'),
    ("quantised", b'{"quantization_config":{"quant_method":"gptq","bits":0}}'),
    ("config", b'{"a":["\\ud800"],"torch_dtype":""}'),
    ("manifest", b'{"format":1,"tensors":{"w":{"dtype":"","shape":[],"sha256":"","file":[]}},"files":{}}'),
    ("reproduction", b'{"format":1,"method":"linear","tensors":{},"files":{}}'),
    ("reproduction", b'{"format":1,"method":"linear","tensors":{},"files":{},"recipe":"","seed":0,"inputs":[{}]}'),
    (
        "reproduction",
        b'{"format":1,"method":"linear","tensors":{},"files":{},"recipe":"","seed":0,"inputs":[{"model":"a","digest":0}]}',
    ),
    ("factors", with_metadata("[" * 100_000)),
    ("factors", with_metadata('{"unet.lora_alpha":1%s}' % ("0" * 400))),
    ("factors", with_metadata('{"unet.lora_alpha":NaN}')),
]


@pytest.mark.parametrize("target", KINDS)
def test_mutated_inputs_are_read_right_or_refused(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    trial = fuzz(target, tmp_path, runs=40 if target == "reproduction" else 200, seconds=60, seed=0)
    assert trial.problems == {}
    assert trial.counts["refused"], "some are to be bad"


@pytest.mark.parametrize("target", KINDS)
def test_some_files_are_good(target: str, tmp_path: Path) -> None:
    """The tests above would pass on targets that refuse all there is."""
    outcomes = [Trial(KINDS[target].target, tmp_path).outcome(seed) for seed in dict.fromkeys(KINDS[target].seeds())]
    assert any(what.startswith("accepted") for what, _ in outcomes)
    assert not any(bad for _, bad in outcomes)


@pytest.mark.parametrize(("target", "content"), FOUND)
def test_what_was_found_is_mended(target: str, content: bytes, tmp_path: Path) -> None:
    assert Trial(KINDS[target].target, tmp_path).outcome(content)[1] is False


def test_a_problem_is_told_with_the_smallest_file(tmp_path: Path) -> None:
    def breaks(content: bytes, folder: Path) -> str:
        assert b"xy" not in content
        return "accepted"

    trial = Trial(breaks, tmp_path)
    trial.warm([b"good"])
    for content in (b"good", b"not xy good", b"so xy", b"longer than xy"):
        trial.run(content)
    (kind,) = trial.problems
    assert kind.startswith("AssertionError in test_fuzz.py")
    assert (trial.counts, trial.smallest(kind)) == ({"accepted": 1}, b"xy")
