"""A base with adapters is a model like any other: its values, how they are read, and every way to name it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import smelt
from smelt.checkpoint import Checkpoint, load_adapted, open_adapter
from smelt.checkpoint.adapter import Adapter, parse, read_adapter, read_flat
from smelt.cli import main
from smelt.errors import InputRejected
from tests import peft_oracle
from tests.lora import QUERY, factors, written
from tests.peft_oracle import LORA, OTHERS, RECORDED
from tests.recipes import Family, recipe
from tests.small_models import CONFIG, LAYERS, Arrays

CASES = (*LORA, *OTHERS)


def base() -> Checkpoint:
    return smelt.load(RECORDED / "base.safetensors")


def adapted(case: str, weight: float = 1.0) -> Checkpoint:
    return load_adapted(base(), [(read_adapter(RECORDED / case), weight)], case)


def assert_merged(found: Checkpoint, folder: Path) -> None:
    """What PEFT changed is equal to some roundings in float32, all else to the bit."""
    wanted, before = smelt.load(folder / "merged.safetensors"), base()
    for name in found:
        if name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6, atol=2e-6, err_msg=name)
        else:
            assert found[name].tobytes() == before[name].tobytes()
    assert set(wanted) <= set(found)


# --- values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_peft(case: str) -> None:
    assert_merged(adapted(case), RECORDED / case)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs PEFT")
@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_peft_that_is_installed(case: str, tmp_path: Path) -> None:
    peft_oracle.make(case, tmp_path / case)
    assert_merged(load_adapted(base(), [(read_adapter(tmp_path / case), 1.0)], case), tmp_path / case)


@given(st.sampled_from(CASES), st.data())
def test_the_bits_do_not_depend_on_how_it_is_read(case: str, data: st.DataObject) -> None:
    checkpoint = adapted(case)
    name = data.draw(st.sampled_from(sorted(smelt.load(RECORDED / case / "merged.safetensors"))))
    count = checkpoint.tensors[name].count
    cuts = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=6))})
    found = np.empty(count, np.float32)
    for start, end in pairwise(cuts):
        checkpoint.read(name, start, found[start:end])
    assert found.tobytes() == checkpoint[name].tobytes()


def test_a_16_bit_base_is_read_exactly_and_rounded_once() -> None:
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in base().items()}
    found = load_adapted(smelt.load(halves), [(read_adapter(RECORDED / "lora"), 1.0)], "x")
    info = found.tensors["layers.0.q.weight"]
    assert (info.dtype, info.native, found.tensors["head.weight"].dtype) == ("F32", "BF16", "BF16")
    (update,) = [u for u in read_adapter(RECORDED / "lora").updates if u.target == info.name]
    file, scale = read_adapter(RECORDED / "lora").file, np.float32(5 / 3)
    a, b = (file[tensor.name] for tensor in update.tensors())
    wanted = halves[info.name].astype(np.float32) + scale * (b @ a)
    np.testing.assert_allclose(found[info.name], wanted, rtol=0, atol=1e-6)
    merged = smelt.merge_tensors("linear", [found], parameters={"weight": 1.0})
    assert merged[info.name].tobytes() == found[info.name].astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize("case", ["lora", "dora", "ia3", "tokens", "loha", "modules_to_save"])
def test_a_weight_scales_the_change(case: str) -> None:
    before, whole, half = base(), adapted(case), adapted(case, 0.5)
    for name in smelt.load(RECORDED / case / "merged.safetensors"):
        np.testing.assert_allclose(half[name] - before[name], (whole[name] - before[name]) / 2, atol=2e-6)


def test_several_adapters_add_their_changes() -> None:
    pairs = [(read_adapter(RECORDED / "lora"), 0.7), (read_adapter(RECORDED / "dora"), -0.3)]
    both, before = load_adapted(base(), pairs, "both"), base()
    for name in ("layers.0.q.weight", "layers.0.k.weight", "conv2d.weight"):
        changes = [weight * (adapted(case)[name] - before[name]) for case, weight in (("lora", 0.7), ("dora", -0.3))]
        np.testing.assert_allclose(both[name], before[name] + sum(changes), atol=2e-6)


# --- low rank -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["lora", "rslora_patterns", "embedding", "conv", "conv1d_layer"])
def test_factors_multiply_to_the_change(case: str) -> None:
    checkpoint, before = adapted(case), base()
    for name in smelt.load(RECORDED / case / "merged.safetensors"):
        factors = checkpoint.factors(name)
        assert factors is not None
        change = factors.scaling * (factors.left @ factors.right).reshape(before[name].shape)
        np.testing.assert_allclose(before[name] + change, checkpoint[name], atol=2e-6)


def test_what_has_no_factors_says_so() -> None:
    unchanged = adapted("lora").factors("head.weight")
    assert unchanged is not None
    assert (unchanged.left.shape, unchanged.right.shape) == ((7, 0), (0, 6))
    assert adapted("dora").factors("layers.0.q.weight") is None
    assert adapted("experts").factors("experts.down_proj") is None
    assert base().factors("head.weight") is None


def test_factors_of_several_adapters_stand_side_by_side() -> None:
    pairs = [(read_adapter(RECORDED / "lora"), 0.7), (read_adapter(RECORDED / "rslora_patterns"), -0.3)]
    both, before, name = load_adapted(base(), pairs, "both"), base(), "layers.1.q.weight"
    factors = both.factors(name)
    assert factors is not None
    assert factors.left.shape == (6, 3 + 2)
    np.testing.assert_allclose(before[name] + factors.left @ factors.right, both[name], atol=2e-6)


# --- names ----------------------------------------------------------------------------------------------


def lora(names: Mapping[str, tuple[int, int]], **more: Any) -> Adapter:
    """A LoRA of rank 2 on modules of these outputs and inputs."""
    return parse(smelt.load(factors(names, 0)), {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **more})


@pytest.mark.parametrize(
    ("memory", "disk"),
    [
        ("model.language_model.layers.0.q", "language_model.model.layers.0.q"),
        ("model.language_model.layers.0.q", "model.layers.0.q"),
        ("layers.0.q", "model.layers.0.q"),
        ("bert.layer.0.q", "layer.0.q"),
    ],
)
def test_names_in_memory_are_found_on_disk(memory: str, disk: str) -> None:
    weights = smelt.load({f"{disk}.weight": np.zeros((4, 6), np.float32), "norm.weight": np.ones(6, np.float32)})
    found = load_adapted(weights, [(lora({memory: (4, 6)}), 1.0)], "x")
    assert list(found) == [*sorted(weights)]
    assert found[f"{disk}.weight"].any()


@pytest.mark.parametrize(
    ("layers", "owner"),
    [
        (("gate_proj", "up_proj", "down_proj"), "mlp.experts"),
        (("w1", "w3", "w2"), "block_sparse_moe.experts"),
    ],
)
def test_stacked_experts_of_memory_are_found_one_by_one_on_disk(layers: tuple[str, ...], owner: str) -> None:
    stacked = {"mlp.experts.gate_up_proj": (3, 8, 5), "mlp.experts.down_proj": (3, 5, 4)}
    names = {"m.mlp.experts.base_layer": (8, 5), "m.mlp.experts": (5, 4)}
    arrays = {
        name: np.repeat(array, 3, axis=0 if "lora_A" in name else 1) * np.float32(0.5)
        for name, array in factors(names, 0).items()
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_parameters": sorted(stacked)}
    whole = load_adapted(
        smelt.load({f"m.{name}": np.zeros(shape, np.float32) for name, shape in stacked.items()}),
        [(parse(smelt.load(arrays), config), 1.0)], "whole",
    )  # fmt: skip
    shapes = dict(zip(layers, ((4, 5), (4, 5), (5, 4)), strict=True))
    apart = load_adapted(
        smelt.load({
            f"m.{owner}.{e}.{layer}.weight": np.zeros(shape, np.float32)
            for e in range(3) for layer, shape in shapes.items()
        }),
        [(parse(smelt.load(arrays), config), 1.0)], "apart",
    )  # fmt: skip
    for e in range(3):
        gate, up, down = (apart[f"m.{owner}.{e}.{layer}.weight"] for layer in layers)
        assert (np.concatenate([gate, up]) == whole["m.mlp.experts.gate_up_proj"][e]).all()
        assert (down == whole["m.mlp.experts.down_proj"][e]).all()
        assert down.any()


def unet() -> Arrays:
    random = np.random.default_rng(0)
    shapes = {"unet.blocks.1.to_q.weight": (6, 4), "unet.conv.weight": (6, 4, 3, 3), "unet.proj.weight": (6, 4, 1, 1)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def flat(style: str) -> Arrays:
    """The same factors in the naming of kohya's or diffusers' files."""
    down, up = ("lora_down.weight", "lora_up.weight") if style == "kohya" else ("lora_A.weight", "lora_B.weight")
    random, found = np.random.default_rng(1), {}
    for module, shape in (("blocks.1.to_q", (2, 4)), ("conv", (2, 4, 3, 3)), ("proj", (2, 4))):
        name = f"lora_unet_{module.replace('.', '_')}" if style == "kohya" else f"unet.{module}"
        found[f"{name}.{down}"] = random.standard_normal(shape).astype(np.float32)
        found[f"{name}.{up}"] = random.standard_normal((6, 2, *(1 for _ in shape[2:]))).astype(np.float32)
        if style == "kohya":
            found[f"{name}.alpha"] = np.array(3, np.float32)
    return found


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_files_without_a_config(style: str, tmp_path: Path) -> None:
    if style == "kohya":
        save_file(flat(style), tmp_path / "style.safetensors")
        adapter = open_adapter(tmp_path / "style.safetensors")
    else:
        meta = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 3})}
        save_file(flat(style), tmp_path / "pytorch_lora_weights.safetensors", meta)
        adapter = open_adapter(tmp_path)
    before, tensors = unet(), list(flat(style).values())
    tensors = [tensor for tensor in tensors if tensor.ndim]
    found = load_adapted(smelt.load(before), [(adapter, 1.0)], "x")
    for number, name in enumerate(before):
        down, up = tensors[2 * number].reshape(2, -1), tensors[2 * number + 1].reshape(6, 2)
        wanted = before[name] + 1.5 * (up @ down).reshape(before[name].shape)
        np.testing.assert_allclose(found[name], wanted, rtol=1e-6, atol=2e-6)


def test_parts_of_a_pipeline_that_the_base_is_not_are_left_out_aloud() -> None:
    text = {
        f"lora_te_layers_0_q.{part}": array
        for part, array in (
            ("lora_down.weight", np.ones((2, 4), np.float32)),
            ("lora_up.weight", np.ones((4, 2), np.float32)),
        )
    }
    found = load_adapted(smelt.load(unet()), [(read_flat(smelt.load(flat("kohya") | text)), 1.0)], "x")
    assert [note for note in found.notices if "holds for 'te' is not used" in note]
    missing = {name.replace("unet_conv", "unet_other"): array for name, array in flat("kohya").items()}
    with pytest.raises(InputRejected, match=r"adapts 'lora_unet_other\.weight'"):
        load_adapted(smelt.load(unet()), [(read_flat(smelt.load(missing)), 1.0)], "x")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"lora_unet_conv.dora_scale": np.ones(6, np.float32)}, r"'lora_unet_conv\.dora_scale' is not understood"),
        ({"lora_unet_none.alpha": np.ones((), np.float32)}, r"'lora_unet_none\.alpha' is not understood"),
        ({"lora_unet_conv.alpha": np.zeros((), np.float32)}, r"'lora_unet_conv\.alpha' \[\] is no alpha"),
        ({"lora_unet_conv.hada_w1_a": np.ones((6, 2), np.float32)}, "has factors of two kinds"),
    ],
)
def test_a_file_without_config_that_is_not_understood(extra: Arrays, message: str) -> None:
    with pytest.raises(InputRejected, match=message):
        read_flat(smelt.load(flat("kohya") | extra))


def test_a_transposed_layer_is_told_by_its_family_where_the_shape_does_not() -> None:
    name = "h.0.attn.c_proj.weight"
    weights = smelt.load({name: np.zeros((4, 4), np.float32)})
    weights.config = {"model_type": "gpt2"}
    adapter = lora({"h.0.attn.c_proj": (4, 4)})
    a, b = (adapter.file[tensor.name] for tensor in adapter.updates[0].tensors())
    found = load_adapted(weights, [(adapter, 1.0)], "x")
    np.testing.assert_allclose(found[name], 2 * (b @ a).T, rtol=1e-6)


# --- the front door -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    home = tmp_path_factory.mktemp("adapters")
    return str(written(home / "one", 1)), str(written(home / "two", 2))


def materialised(*names: str) -> list[Arrays]:
    return [dict(smelt.load(name)) for name in names]


def merged(tree: Mapping[str, Any], out: Path, **options: Any) -> dict[str, npt.NDArray[Any]]:
    smelt.merge(tree, out, **options)
    assert smelt.verify(out).ok
    with smelt.load(out) as checkpoint:
        return dict(checkpoint)


def assert_equal(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        assert array.dtype == wanted[name].dtype
        assert array.tobytes() == wanted[name].tobytes(), name


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties"])
def test_a_merge_of_adapters_is_the_merge_of_the_models(
    method: str, family: Family, adapters: tuple[str, str], tmp_path: Path
) -> None:
    names = [f"{family.base}+{adapter}" for adapter in adapters]
    more: dict[str, Any] = {} if method == "task_arithmetic" else {"each": {"density": 0.5}}
    found = merged(recipe(method, names, family.base, **more, seed=1), tmp_path / "out")
    in_memory = dict(zip("xy", materialised(*names), strict=True))
    wanted = merged(recipe(method, list("xy"), family.base, **more, seed=1, dtype="bfloat16"), tmp_path / "other",
                    models=in_memory)  # fmt: skip
    if method != "dare_ties":  # whose draws are named after the models
        assert_equal(found, wanted)
    assert {array.dtype.name for array in found.values()} == {"bfloat16"}


def test_both_spellings_and_an_adapter_alone_mean_the_same(
    family: Family, adapters: tuple[str, str], tmp_path: Path
) -> None:
    one, two = adapters
    spelt = recipe("task_arithmetic", [f"{family.base}+{one}", f"{family.base}+{two}"], family.base)
    mapped = recipe("task_arithmetic", [], family.base)
    mapped["models"] = [
        {"model": {"model": {"path": family.base}, "lora": {"path": adapter}}, "parameters": {"weight": 1.0}}
        for adapter in adapters
    ]
    alone = recipe("task_arithmetic", adapters, family.base)
    first, *others = [merged(tree, tmp_path / str(n)) for n, tree in enumerate((spelt, mapped, alone))]
    for other in others:
        assert_equal(first, other)


def test_adapters_of_one_model_take_weights(family: Family, adapters: tuple[str, str], tmp_path: Path) -> None:
    one, two = adapters
    sums = recipe("task_arithmetic", [], family.base)
    sums["models"] = [
        {"model": {"model": family.base, "lora": [{"path": one, "weight": 0.25}, two]}, "parameters": {"weight": 1.0}}
    ]
    apart = recipe("task_arithmetic", adapters, family.base, dtype="float32")
    apart["models"][0]["parameters"]["weight"] = 0.25
    found, wanted = merged({**sums, "dtype": "float32"}, tmp_path / "a"), merged(apart, tmp_path / "b")
    for name, array in found.items():
        np.testing.assert_allclose(array, wanted[name], atol=1e-6)


def test_outputs_name_the_parts_and_no_folder(family: Family, adapters: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merged(recipe("task_arithmetic", [f"{family.base}+{adapters[0]}"], family.base), out)
    texts = [(out / name).read_text() for name in ("README.md", "smelt-manifest.json")]
    assert all("base+one" in text and str(family.folder) not in text and "/one" not in text for text in texts)


def test_no_output_may_lie_in_an_adapter(family: Family, adapters: tuple[str, str]) -> None:
    tree = recipe("task_arithmetic", [f"{family.base}+{adapters[0]}"], family.base)
    with pytest.raises(smelt.SmeltError, match="input"):
        smelt.merge(tree, Path(adapters[0]) / "out")


def test_adapters_given_in_python(family: Family) -> None:
    modules = {f"model.layers.0.{QUERY}": (64, 64)}
    adapter = lora(modules)
    model = load_adapted(smelt.load(family.base_arrays), [(adapter, 1.0)], "x")
    found = smelt.merge_tensors("task_arithmetic", [model], family.base_arrays, parameters={"weight": 1.0})
    wanted = smelt.merge_tensors(
        "task_arithmetic", [dict(model)], family.base_arrays, parameters={"weight": 1.0}, dtype="bfloat16"
    )
    assert_equal(found, wanted)
    plan = smelt.plan(recipe("linear", ["m"]), models={"m": model})
    assert {output.dtype for output in plan.outputs} == {"BF16"}


def test_inspect_and_check(family: Family, adapters: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (f"{family.base}+{adapter}" for adapter in adapters)
    assert main(["inspect", one, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == len(family.base_arrays)
    assert main(["inspect", adapters[0], "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["modules"], facts["ranks"]) == ("LORA", 2 * LAYERS, {"2": 2 * LAYERS})
    assert main(["inspect", adapters[0]]) == 0
    assert "LORA" in capsys.readouterr().out
    assert main(["check", one, two, "--base", family.base]) == 0
    whole = capsys.readouterr().out
    assert main(["check", *adapters, "--base", family.base]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(whole.splitlines())


# --- what does not fit ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"model.layers.9.self_attn.q_proj": (64, 64)}, r"it adapts 'model.layers.9.self_attn.q_proj.weight', which"),
        ({"model.layers.0.self_attn.q_proj": (128, 128)}, r"is for \[128, 128\], but .*q_proj.* is \[64, 64\]"),
    ],
    ids=["93 target absent from the base", "95 made for another base"],
)  # fmt: skip
def test_an_adapter_of_another_base(
    modules: dict[str, tuple[int, int]], message: str, family: Family, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = written(tmp_path / "adapter", 1)
    save_file(factors(modules, 1), folder / "adapter_model.safetensors")
    assert main(["inspect", f"{family.base}+{folder}"]) == 3
    with pytest.raises(InputRejected, match=message):
        smelt.plan(recipe("task_arithmetic", [f"{family.base}+{folder}"], family.base))
    assert "Traceback" not in capsys.readouterr().err


def test_the_base_that_a_config_names_is_never_opened(adapters: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputRejected, match=r"is an adapter, not a model"):
        smelt.load(adapters[0])
    with pytest.raises(InputRejected, match=r"is an adapter, not a model"):
        smelt.plan(recipe("linear", adapters))


def test_a_model_instead_of_an_adapter(family: Family) -> None:
    with pytest.raises(InputRejected, match=r"holds no adapter_config\.json"):
        smelt.load(f"{family.base}+{family.models[0]}")
    with pytest.raises(InputRejected, match="no such file or folder"):
        smelt.load(f"{family.base}+nowhere/at/all")


def test_what_an_adapter_cannot_change() -> None:
    with pytest.raises(InputRejected, match="is I32, and cannot be adapted"):
        load_adapted(smelt.load({"x.weight": np.zeros((4, 6), np.int32)}), [(lora({"x": (4, 6)}), 1.0)], "a")


def test_a_resized_embedding_is_no_sum() -> None:
    rows = parse(
        smelt.load({"base_model.model.embed.weight": np.ones((9, 6), np.float32)}),
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": ["embed"]},
    )
    assert load_adapted(base(), [(rows, 1.0)], "x").tensors["embed.weight"].shape == (9, 6)
    with pytest.raises(InputRejected, match=r"'embed\.weight' is stored whole by an adapter"):
        load_adapted(base(), [(rows, 0.5)], "x")


def test_unchanged_configs(family: Family, adapters: tuple[str, str]) -> None:
    with smelt.load(f"{family.base}+{adapters[0]}") as checkpoint:
        assert checkpoint.config == CONFIG
        assert {file.path.name for file in checkpoint.files()} == {"model.safetensors", "adapter_model.safetensors"}
        checkpoint.check_unchanged()
