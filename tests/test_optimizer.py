"""Optimizer states as statistics: read without torch and DeepSpeed, and without running what is in them."""

from __future__ import annotations

import io
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smelt
from smelt.errors import InputRejected, UsageError
from smelt.statistics import import_optimizer
from smelt.statistics.order import registered
from tests.readback import values

GOLDEN = Path(__file__).parent / "golden" / "ota"
TRAINER = GOLDEN / "optimizer_state_hf_trainer"
ZERO = GOLDEN / "optimizer_state_zero2"


def tensors(case: Path, prefix: str) -> dict[str, Any]:
    stored = smelt.load(case / "inputs.safetensors")
    return {name.removeprefix(prefix): stored[name] for name in stored if name.startswith(prefix)}


def test_what_is_written_serves_as_statistics(tmp_path: Path) -> None:
    model = tensors(TRAINER, "model.0/")
    found = import_optimizer(TRAINER / "checkpoint", model, tmp_path / "statistics")
    assert found.metadata["kind"] == "exp_avg_sq"
    assert (found.metadata["global_step"], found.metadata["betas"]) == ("3", "(0.9, 0.999)")
    moment = {name.removeprefix("exp_avg_sq/"): found[name] for name in found}
    base = {name: np.zeros_like(array) for name, array in model.items()}
    for name, arrays in (("base", base), ("model", model)):
        (tmp_path / name).mkdir()
        from safetensors.numpy import save_file

        save_file(arrays, tmp_path / name / "model.safetensors")
    entry = {"model": str(tmp_path / "model"), "statistics": str(tmp_path / "statistics")}
    tree = {"merge_method": "ffg", "base_model": str(tmp_path / "base"), "models": [entry]}
    smelt.merge(tree, tmp_path / "out", force=True)
    expected = smelt.merge_tensors("ffg", [model], base, statistics=[{"exp_avg_sq": moment}])
    assert {n: a.tobytes() for n, a in values(tmp_path / "out").items()} == {
        n: a.tobytes() for n, a in expected.items()
    }


def test_pieces_may_be_read_from_anywhere() -> None:
    found = import_optimizer(ZERO / "checkpoint", tensors(ZERO, "base/"))
    for name, info in found.tensors.items():
        whole = found[name].reshape(-1)
        part = np.empty(info.count // 2, np.float32)
        found.read(name, info.count // 3, part)
        np.testing.assert_array_equal(part, whole[info.count // 3 :][: len(part)])


def test_parameters_in_another_order_are_refused_or_given() -> None:
    model = tensors(TRAINER, "model.0/")
    strange = {name.replace("q_proj", "first").replace("k_proj", "second"): array for name, array in model.items()}
    with pytest.raises(UsageError, match=r"'first', .* is not known: give the names .*order="):
        import_optimizer(TRAINER / "checkpoint", strange)
    order = [name.replace("q_proj", "first").replace("k_proj", "second") for name in registered(model)]
    given = import_optimizer(TRAINER / "checkpoint", strange, order=order)
    assert len(given) == len(model)
    with pytest.raises(InputRejected, match="do not fit the model's 21 in any order"):
        import_optimizer(TRAINER / "checkpoint", strange, order=order[::-1])


def test_a_model_of_other_shapes_is_refused() -> None:
    model = tensors(ZERO, "base/")
    model["lm_head.weight"] = np.zeros((14, 10), np.float32)
    del model["model.norm.weight"]
    with pytest.raises(InputRejected) as told:
        import_optimizer(ZERO / "checkpoint", model)
    assert "no tensor of the model is called 'model.norm.weight'" in told.value.problems[0]
    assert "'lm_head.weight' is [13, 10], the model's tensor [14, 10]" in told.value.problems[1]


def test_missing_ranks_are_told(tmp_path: Path) -> None:
    shutil.copytree(ZERO / "checkpoint", tmp_path / "c")
    (tmp_path / "c" / "global_step7" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(InputRejected, match=r"ranks \[1\] are there, expected all from 0"):
        import_optimizer(tmp_path / "c", tensors(ZERO, "base/"))


def saved(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("optimizer/data.pkl", data)
    return path


class Attack:
    def __reduce__(self) -> Any:
        return print, ("run",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps(Attack()), r"names 'builtins.print', which no weights and no optimizer need"),
        (b"cos\nsystem\n(S'true'\ntR.", "names 'os.system'"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "names 'builtins.eval'"),
        (b"ctorch\nload\n(U\x01xtR.", "holds no optimizer state"),
        (pickle.dumps({"state": {}}), "holds no optimizer state"),
        (pickle.dumps({"state": {}, "param_groups": []}), "not an optimizer state as it should be|do not fit"),
        (pickle.dumps([1])[:-3], "is not a whole file of torch.save"),
    ],
)
def test_what_is_in_a_pickle_is_not_run(
    data: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputRejected, match=message):
        import_optimizer(saved(tmp_path / "optimizer.pt", data), tensors(TRAINER, "model.0/"))
    assert capsys.readouterr().out == ""


def test_broken_files_are_refused(tmp_path: Path) -> None:
    whole = (TRAINER / "checkpoint" / "optimizer.pt").read_bytes()
    model = tensors(TRAINER, "model.0/")
    broken = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"not a zip" * 100, "torn": whole[100:]}
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputRejected, match="is not a whole file of torch"):
            import_optimizer(tmp_path / name, model)
    with pytest.raises(InputRejected, match="is compressed"):
        import_optimizer(saved(tmp_path / "z", pickle.dumps({}), zipfile.ZIP_DEFLATED), model)


def test_a_tensor_beyond_its_record_is_refused(tmp_path: Path) -> None:
    """The golden file with every record cut to four bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(TRAINER / "checkpoint" / "optimizer.pt") as source, zipfile.ZipFile(out, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name)[: 4 if "/data/" in name else None])
    (tmp_path / "optimizer.pt").write_bytes(out.getvalue())
    with pytest.raises(InputRejected, match="exceeds record data/"):
        import_optimizer(tmp_path / "optimizer.pt", tensors(TRAINER, "model.0/"))


@pytest.mark.parametrize("tag", ["../elsewhere", "", ".."])
def test_a_tag_cannot_lead_elsewhere(tag: str, tmp_path: Path) -> None:
    (tmp_path / "latest").write_text(tag)
    with pytest.raises(InputRejected, match="expected a folder beside it"):
        import_optimizer(tmp_path, tensors(TRAINER, "model.0/"))


def test_torch_and_this_reader_agree(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    random = torch.Generator().manual_seed(0)
    model = {name: torch.nn.Parameter(torch.randn(size, generator=random))
             for name, size in zip(names, [(6, 4), (4,), (6, 4)], strict=True)}  # fmt: skip
    groups = [{"params": [model[names[0]], model[names[2]]]}, {"params": [model[names[1]]], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    sum((p**3).sum() for p in model.values()).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    found = import_optimizer(tmp_path / "state.pt", {name: p.detach() for name, p in model.items()})
    for name, parameter in model.items():
        np.testing.assert_array_equal(found[f"exp_avg_sq/{name}"], optimizer.state[parameter]["exp_avg_sq"].numpy())
