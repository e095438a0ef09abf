"""Merging adapters: exactly, with PEFT's numbers, by smelt's methods; what PEFT reads of it; what is refused."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import smelt
from smelt.checkpoint.adapter import LowRank, read_adapter
from smelt.cli import main
from tests.lora_files import SHAPES, Arrays, changes, config_of, factors, save_adapter
from tests.peft_merge_oracle import ADAPTERS, CASES, RECORDED, SEED, WEIGHTS

PEFT_ADAPTERS = Path(__file__).parent / "data" / "adapters"
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Of different ranks, alphas, scalings and modules."""
    some = {name: shape for name, shape in SHAPES.items() if "k_proj" not in name}
    return [
        save_adapter(tmp_path / "a", factors(3, 0), lora_alpha=7),
        save_adapter(tmp_path / "b", factors(5, 1, some), lora_alpha=2, use_rslora=True),
        save_adapter(tmp_path / "c", factors(2, 2), alpha_pattern={Q: 9}),
    ]


def summed(folders: list[Path], weights: list[float]) -> Arrays:
    total: Arrays = {}
    for folder, weight in zip(folders, weights, strict=True):
        for module, change in changes(folder).items():
            total[module] = total.get(module, 0) + weight * change
    return total


def close(got: Arrays, wanted: Arrays, rel: float = 1e-6) -> bool:
    assert got.keys() == wanted.keys()
    return all(np.linalg.norm(got[name] - wanted[name]) <= rel * np.linalg.norm(wanted[name]) for name in wanted)


# --- the exact sum --------------------------------------------------------------------------------------


def test_the_sum_whatever_ranks_alphas_and_modules(three: list[Path], tmp_path: Path) -> None:
    weights = [0.7, -1.2, 0.4]
    result = smelt.merge_lora(three, tmp_path / "out", weights=weights)
    assert close(changes(tmp_path / "out"), summed(three, weights))
    assert {module.module: module.rank for module in result.modules} == {n: 5 if n == K else 10 for n in SHAPES}
    assert 0 < result.error < 1e-6
    assert smelt.verify(tmp_path / "out").ok
    read = {u.module: (u.rank, u.scaling) for u in read_adapter(tmp_path / "out").updates if isinstance(u, LowRank)}
    assert read == {name: (5 if name == K else 10, 1.0) for name in SHAPES}


def test_cut_to_a_rank_or_an_error(three: list[Path], tmp_path: Path) -> None:
    wanted = summed(three, [1, 1, 1])
    ranked = smelt.merge_lora(three, tmp_path / "ranked", rank=4, factor_dtype="bfloat16")
    for module in ranked.modules:
        missing = wanted[module.module] - changes(tmp_path / "ranked")[module.module]
        assert module.rank == 4
        assert module.error == pytest.approx(np.linalg.norm(missing), rel=1e-3)
        assert module.norm == pytest.approx(np.linalg.norm(wanted[module.module]))
    for module in smelt.merge_lora(three, tmp_path / "near", error=0.3).modules:
        tails = np.sqrt(np.cumsum(np.linalg.svd(wanted[module.module])[1][::-1] ** 2)[::-1]) / module.norm
        assert module.rank == int((tails > 0.3).sum())


def test_equal_and_opposite_adapters(three: list[Path], tmp_path: Path) -> None:
    """Repeated directions take no rank, cancelled modules are left out and PEFT is told the others' whole names."""
    same = smelt.merge_lora([three[0]] * 3, tmp_path / "same", weights=[0.5, 0.25, 0.25])
    assert {module.rank for module in same.modules} == {3}
    assert close(changes(tmp_path / "same"), changes(three[0]))
    part = save_adapter(tmp_path / "part", {n: t for n, t in factors(3, 0).items() if K in n}, lora_alpha=7)
    result = smelt.merge_lora([three[0], part], tmp_path / "out", weights=[1, -1])
    assert [module.module for module in result.modules if module.stored == "nothing"] == [K]
    assert config_of(tmp_path / "out")["target_modules"] == sorted(set(SHAPES) - {K})
    with pytest.raises(smelt.InputRejected, match="zero in every module"):
        smelt.merge_lora([part, part], tmp_path / "none", weights=[1, -1])
    assert not (tmp_path / "none").exists()


def test_bits_depend_on_the_adapters_alone(three: list[Path], tmp_path: Path) -> None:
    for name, options in {"x": {"threads": 1}, "y": {"threads": 4}, "z": {"memory": "193MiB"}}.items():
        smelt.merge_lora(three, tmp_path / name, rank=4, **options)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "xyz"]
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize(
    "case",
    ["lora", "rslora_patterns", "lora_bias", "bias_all", "bias_lora_only", "embedding", "conv", "conv1d_layer",
     "modules_to_save"],
)  # fmt: skip
def test_every_kind_of_sum(case: str, tmp_path: Path) -> None:
    """An adapter that PEFT wrote, as three quarters and a quarter of itself, is what it was."""
    before = PEFT_ADAPTERS / case
    smelt.merge_lora([before, before], tmp_path / "out", weights=[0.75, 0.25])
    old, new = read_adapter(before), read_adapter(tmp_path / "out")
    assert [type(update) for update in old.updates] == [type(update) for update in new.updates]
    for one, other in zip(old.updates, new.updates, strict=True):
        assert (one.target, getattr(one, "form", 0)) == (other.target, getattr(other, "form", 0))
        if isinstance(one, LowRank) and isinstance(other, LowRank):
            assert (one.transposed, one.a.shape[1:], one.b.shape[2:]) == (
                other.transposed,
                other.a.shape[1:],
                other.b.shape[2:],
            )
            assert product(new, other) == pytest.approx(product(old, one), rel=1e-5, abs=1e-6)
            if one.bias is not None and other.bias is not None:
                assert new.file[other.bias.name] == pytest.approx(one.scaling * old.file[one.bias.name], rel=1e-6)


def product(adapter: Any, update: LowRank) -> Any:
    b, a = (adapter.file[info.name].astype("f8") for info in (update.b, update.a))
    return update.scaling * (b.reshape(len(b), -1) @ a.reshape(len(a), -1))


def test_a_bias_alone(tmp_path: Path) -> None:
    """Factors cancel, biases do not: PEFT needs factors beside them all the same."""
    names = [f"base_model.model.a.{part}" for part in ("lora_A.weight", "lora_B.weight", "lora_B.bias")]
    draw = np.random.default_rng(0)
    a, b = draw.standard_normal((2, 4)).astype("f4"), draw.standard_normal((3, 2)).astype("f4")
    folders = [
        save_adapter(tmp_path / name, dict(zip(names, (a, b, bias), strict=True)), lora_bias=True)
        for name, bias in (("x", np.ones(3, "f4")), ("y", np.zeros(3, "f4")))
    ]
    smelt.merge_lora(folders, tmp_path / "out", weights=[1, -1])
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written[names[2]].tolist() == [1, 1, 1]
    assert not any(written[name].any() for name in names[:2])
    assert config_of(tmp_path / "out")["lora_bias"] is True


# --- PEFT's types ---------------------------------------------------------------------------------------


def recorded(count: int = 3) -> list[Path]:
    return [RECORDED / str(place) for place in range(count)]


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_of_peft(case: str, tmp_path: Path) -> None:
    """As PEFT 0.21.2 made them, given smelt's draws: linear layers, embeddings, convolutions."""
    options = {"combination_type": case, **CASES[case]}
    rank = options.pop("svd_rank", None)
    result = smelt.merge_lora(recorded(), tmp_path / "out", weights=WEIGHTS, rank=rank, seed=SEED, **options)
    wanted = load_file(RECORDED / "expected.safetensors")
    got = changes(tmp_path / "out")
    assert {f"{case}/{module}" for module in got} == {name for name in wanted if name.startswith(f"{case}/")}
    for module, change in got.items():
        assert change == pytest.approx(wanted[f"{case}/{module}"], rel=2e-4, abs=2e-5), module
    exact = summed(recorded(), WEIGHTS)
    apart = sqrt(sum(np.linalg.norm(got[name] - exact[name]) ** 2 for name in exact))
    assert result.error * sqrt(sum(np.linalg.norm(change) ** 2 for change in exact.values())) == pytest.approx(
        apart, rel=1e-5, abs=1e-5
    )


@pytest.mark.parametrize("case", CASES)
def test_the_record_is_what_peft_makes(case: str) -> None:
    pytest.importorskip("peft")
    from tests.peft_merge_oracle import merged

    wanted = load_file(RECORDED / "expected.safetensors")
    for module, change in merged(recorded(), case).items():
        assert change == pytest.approx(wanted[f"{case}/{module}"], rel=1e-4, abs=1e-5)


def test_peft_loads_what_is_written(tmp_path: Path) -> None:
    """With every tensor in its place, and the sum that was asked for."""
    pytest.importorskip("peft")
    from tests.peft_merge_oracle import deltas, opened

    smelt.merge_lora(recorded(), tmp_path / "out", weights=WEIGHTS)
    assert len(ADAPTERS) == 3
    loaded = deltas(opened([tmp_path / "out"]), "0")
    assert close(loaded, summed(recorded(), WEIGHTS), rel=1e-5)


def test_one_adapter_is_always_linear(tmp_path: Path) -> None:
    smelt.merge_lora(recorded(1), tmp_path / "out", weights=[0.5], combination_type="svd", rank=1)
    assert close(changes(tmp_path / "out"), summed(recorded(1), [0.5]))


def test_draws_follow_the_seed(tmp_path: Path) -> None:
    """Not the threads; and other seeds give others."""
    for name, seed, threads in (("x", 1, 1), ("y", 1, 4), ("z", 2, 4)):
        smelt.merge_lora(
            recorded(), tmp_path / name, combination_type="dare_ties", density=0.5, seed=seed, threads=threads
        )
    x, y, z = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "xyz")
    assert x == y != z


def test_stabilised_ranks_are_scaled_as_peft_does_and_that_is_told(tmp_path: Path) -> None:
    folders = [save_adapter(tmp_path / n, factors(4, s), use_rslora=True) for n, s in (("a", 0), ("b", 1))]
    result = smelt.merge_lora(folders, tmp_path / "out", combination_type="cat")
    assert close(changes(tmp_path / "out"), {n: sqrt(8) * c for n, c in summed(folders, [1, 1]).items()})
    assert "too large by the root of its rank" in result.warnings[0]
    assert result.error == pytest.approx(sqrt(8) - 1)


# --- smelt's methods in core space ----------------------------------------------------------------------


def test_a_sum_in_core_space_is_the_sum(three: list[Path], tmp_path: Path) -> None:
    weights = [0.7, -1.2, 0.4]
    smelt.merge_lora(three, tmp_path / "out", weights=weights, method="task_arithmetic")
    assert close(changes(tmp_path / "out"), summed(three, weights))


def test_methods_that_know_no_basis_give_what_they_give_on_the_matrices(three: list[Path], tmp_path: Path) -> None:
    options = {"sigma_over": "rank", "alpha": 0.8}
    smelt.merge_lora(three, tmp_path / "out", method="iso", parameters=options)
    every = [changes(folder) for folder in three]
    zeros = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    whole = smelt.merge_tensors("iso", [{**zeros, **found} for found in every], zeros, parameters=options)
    assert close(changes(tmp_path / "out"), whole, rel=1e-5)


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("dora", "'conv2d' and 5 more: DoRA"), ("experts", "stacked experts"), ("experts_one", "stacked experts"),
        ("tokens", "trained tokens"),
        ("loha", "LoHa"), ("lokr", "LoKr"), ("ia3", "(IA)^3"), ("trainable_tokens", "trained tokens"),
    ],
)  # fmt: skip
def test_what_is_no_sum_is_refused_by_name(case: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(smelt.InputRejected) as caught:
        smelt.merge_lora([PEFT_ADAPTERS / "lora", PEFT_ADAPTERS / case], tmp_path / "out")
    assert said in str(caught.value)
    assert "base+adapter" in str(caught.value)
    assert str(PEFT_ADAPTERS / case) in str(caught.value)


def test_whole_tensors_must_be_the_same(tmp_path: Path) -> None:
    tensors = {**factors(2, 0), "base_model.model.lm_head.weight": np.ones((4, 3), "f4")}
    other = {**factors(2, 1), "base_model.model.lm_head.weight": np.zeros((4, 3), "f4")}
    plain = save_adapter(tmp_path / "plain", factors(2, 3))
    a, b = (save_adapter(tmp_path / n, t, modules_to_save=["lm_head"]) for n, t in (("a", tensors), ("b", other)))
    with pytest.raises(smelt.InputRejected, match="differs between the adapters"):
        smelt.merge_lora([a, b], tmp_path / "out")
    with pytest.raises(smelt.InputRejected, match="in 1 of 2 adapters"):
        smelt.merge_lora([a, plain], tmp_path / "out")
    smelt.merge_lora([a, a], tmp_path / "out")
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.lm_head.weight"].all()
    assert config_of(tmp_path / "out")["modules_to_save"] == ["lm_head"]


def test_adapters_of_other_models(three: list[Path], tmp_path: Path) -> None:
    other = save_adapter(tmp_path / "other", factors(2, 0, {Q: (24, 30)}))
    with pytest.raises(
        smelt.InputRejected, match=r"linear \[24, 24\] in .* and linear \[24, 30\] in .*different bases"
    ):
        smelt.merge_lora([three[0], other], tmp_path / "out")
    swapped = save_adapter(tmp_path / "swapped", factors(2, 0, {Q: (24, 24)}), fan_in_fan_out=True)
    with pytest.raises(smelt.InputRejected, match="fan_in_fan_out differs"):
        smelt.merge_lora([three[0], swapped], tmp_path / "out")
    named = [
        save_adapter(tmp_path / base, factors(2, 0), base_model_name_or_path=f"/home/me/{base}") for base in ("x", "y")
    ]
    result = smelt.merge_lora(named, tmp_path / "out")
    assert "different bases" in result.warnings[0]
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == "x"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": [1.0]}, "1 weights for 2 adapters"), ({"weights": [1.0, float("nan")]}, "finite"),
        ({"rank": 0}, "at least 1"), ({"error": 1.0}, r"\[0, 1\)"), ({"factor_dtype": "int8"}, "factor_dtype"),
        ({"density": 0.5}, "no effect without"), ({"majority_sign_method": "total"}, "no effect without"),
        ({"combination_type": "tsv"}, "one of cat, linear"), ({"combination_type": "ties"}, "needs density"),
        ({"combination_type": "ties", "density": 0.0}, r"\(0, 1\]"),
        ({"combination_type": "linear", "density": 0.5}, "density has no effect with"),
        ({"combination_type": "dare_linear", "density": 0.5, "majority_sign_method": "total"}, "no effect with"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "most"}, "total or frequency"),
        ({"combination_type": "cat", "rank": 3}, "rank has no effect"),
        ({"combination_type": "svd", "error": 0.1}, "error has no effect"),
        ({"combination_type": "svd", "method": "tsv"}, "choose one"), ({"parameters": {"x": 1}}, "without method"),
        ({"method": "tsvv"}, "did you mean"), ({"method": "tsv", "parameters": {"x": 1}}, "no parameter"),
        ({"memory": "1KiB"}, "memory must be at least"),
    ],
)  # fmt: skip
def test_options_have_effect_or_are_errors(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(smelt.UsageError, match=said):
        smelt.merge_lora(recorded(2), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_factors_of_different_ranks_are_not_added_up(three: list[Path], tmp_path: Path) -> None:
    with pytest.raises(smelt.InputRejected, match=r"the adapters' ranks are \[3, 5, 2\]: leave combination_type out"):
        smelt.merge_lora(three, tmp_path / "out", combination_type="linear")
    mixed = save_adapter(
        tmp_path / "mixed", {**factors(3, 0), **factors(2, 0, {Q: (24, 24)})}, r=3, rank_pattern={Q: 2}
    )
    with pytest.raises(smelt.InputRejected, match=r"the ranks of .* are \[3, 2\]"):
        smelt.merge_lora([three[0], mixed], tmp_path / "out", combination_type="linear")


def test_nan_is_named(tmp_path: Path) -> None:
    tensors = factors(2, 0)
    tensors[f"base_model.model.{Q}.lora_A.weight"][0, 0] = np.nan
    with pytest.raises(smelt.OperationFailed, match=rf"{Q}.lora_A.weight' holds NaN"):
        smelt.merge_lora([save_adapter(tmp_path / "a", tensors)], tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [{"factor_dtype": "float16"}, {"combination_type": "svd"}, {"combination_type": "ties_svd", "density": 0.5}],
)
def test_what_no_dtype_holds(options: dict[str, Any], tmp_path: Path) -> None:
    huge = save_adapter(tmp_path / "a", {name: array * np.float32(1e19) for name, array in factors(2, 0).items()})
    with pytest.raises(smelt.OperationFailed, match="the merged values exceed float"):
        smelt.merge_lora([huge, huge], tmp_path / "out", weights=[1e5, 1e5], **options)
    assert not (tmp_path / "out").exists()


def test_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache, at a revision, which the manifest names."""
    commit, home = "0" * 39 + "1", tmp_path / "hub" / "models--owner--name"
    save_adapter(home / "snapshots" / commit, factors(2, 0))
    (home / "refs").mkdir()
    (home / "refs" / "old").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    smelt.merge_lora(["owner/name@old", home / "snapshots" / commit], tmp_path / "out", weights=[2, -1])
    assert close(changes(tmp_path / "out"), changes(home / "snapshots" / commit))
    manifest = json.loads((tmp_path / "out" / "smelt-manifest.json").read_text())
    assert [entry["revision"] for entry in manifest["inputs"]] == [commit, None]
    with pytest.raises(smelt.InputRejected, match="not in the local cache"):
        smelt.merge_lora(["owner/other"], tmp_path / "no")


# --- the command ----------------------------------------------------------------------------------------


def test_the_command(three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*map(str, three), str(tmp_path / "out"), "-w", "1", "-w", "0.5", "-w", "2", "--rank", "4", "--json"]
    assert main(["lora", "merge", *arguments]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [module["rank"] for module in facts["modules"]] == [4] * len(SHAPES)
    assert main(["lora", "merge", *map(str, three), str(tmp_path / "tsv"), "--method", "tsv", "-p", "alpha=0.5"]) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith(f"{tmp_path / 'tsv'}\n")
    assert main(["lora", "merge", str(three[0]), str(tmp_path / "no"), "--method", "tsv", "-p", "alpha"]) == 2
    assert main(["lora", "merge", str(tmp_path / "nothing"), str(tmp_path / "no")]) == 3
