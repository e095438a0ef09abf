"""Models of many families merge by construction: every tensor is accounted for, whatever the family calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smelt
from smelt.architecture import Structure, module_of, parts
from smelt.errors import InputRejected, UsageError
from tests.families import BIASED, FAMILIES, LLAMA, LLAMA_REST, Family, write
from tests.readback import stored, values
from tests.small_models import save

ONE_STACK = [name for name, family in FAMILIES.items() if len(family.stacks) == 1]
SEVERAL = [name for name, family in FAMILIES.items() if len(family.stacks) > 1]


def structure(family: Family) -> Structure:
    return Structure.of({name: array.shape for name, array in family.arrays(0).items()}, family.config)


def _joins(name: str) -> bool:
    """What stands between the eyes and the text has a structure of its own in every family."""
    return "projector" in name or "merger" in name


def linear(models: list[str], **more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": path} for path in models],
            "parameters": {"weight": 1}, **more}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layers_are_found_and_every_role_is_known(name: str) -> None:
    found = structure(FAMILIES[name])
    assert {stack.prefix: stack.count for stack in found.stacks} == {
        k: n for k, (n, _) in FAMILIES[name].stacks.items()
    }
    assert all(stack.count_keys for stack in found.stacks)
    assert found.remarks == ()
    assert {role.name for role in found if role.role == "other" and not _joins(role.name)} == set()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_merged_or_copied(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    models = [write(tmp_path / f"m{seed}", family, seed) for seed in (1, 2)]
    smelt.merge(linear(models), tmp_path / "out", force=True)
    found, a, b = values(tmp_path / "out"), family.arrays(1), family.arrays(2)
    assert found.keys() == a.keys()
    for tensor, value in found.items():
        np.testing.assert_allclose(value, (a[tensor] + b[tensor]) / 2, atol=1e-6, err_msg=tensor)
    assert json.loads((tmp_path / "out" / "config.json").read_text()).items() >= family.config.items()


@pytest.mark.parametrize("name", ONE_STACK)
def test_layers_are_stacked_in_every_family(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    ((container, (count, inside)),) = family.stacks.items()
    model = write(tmp_path / "m", family, 1)
    ranges = ([0, count], [count - 1, count])
    slices = [{"sources": [{"model": model, "layer_range": r}]} for r in ranges]
    smelt.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    found, whole = stored(tmp_path / "out"), stored(Path(model))
    more = {f"{container}.{count}.{part}": f"{container}.{count - 1}.{part}" for part in inside.split()}
    assert found == whole | {new: whole[old] for new, old in more.items()}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in family.config if "layer" in key} == {
        key: count + 1 for key in family.config if "layer" in key
    }  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_parts_are_called_as_users_call_them(name: str) -> None:
    family = FAMILIES[name]
    for word, prefixes in family.modules.items():
        module = module_of(structure(family), word)
        assert module is not None, word
        held = {tensor for tensor in family.names if tensor in module}
        assert held == {tensor for tensor in family.names if tensor.startswith(prefixes)}, word


@pytest.mark.parametrize("name", SEVERAL)
def test_each_part_is_merged_by_its_own_parameters(name: str, tmp_path: Path) -> None:
    """The first module takes the first model, the second one the second; what is in neither is copied."""
    family = FAMILIES[name]
    models = [write(tmp_path / f"m{seed}", family, seed) for seed in (1, 2)]
    (one, first), (two, second), *_ = family.modules.items()
    modules = {
        word: {"models": [{"model": m, "parameters": {"weight": w}} for m, w in zip(models, weights, strict=True)]}
        for word, weights in ((one, (1, 0)), (two, (0, 1)))
    }
    recipe = {"merge_method": "linear", "modules": modules, "base_model": models[0]}
    artifact = smelt.merge(recipe, tmp_path / "out", force=True)
    a, b = family.arrays(1), family.arrays(2)
    wanted = {t: b[t] if t.startswith(second) else a[t] for t in family.names}
    found = values(tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[tensor], wanted[tensor]) for tensor in wanted)
    rest = [tensor for tensor in family.names if not tensor.startswith((*first, *second))]
    assert bool(rest) == any("in none of the modules: copied" in warning for warning in artifact.warnings)


def test_parts_are_sliced_one_by_one(tmp_path: Path) -> None:
    """Whisper with a shorter decoder; each count is stated under its own key."""
    family = FAMILIES["whisper"]
    model = write(tmp_path / "m", family, 1)
    modules = {
        "encoder": {"models": [{"model": model}]},
        "decoder": {"slices": [{"sources": [{"model": model, "layer_range": [0, 1]}]},
                               {"sources": [{"model": model, "layer_range": [2, 3]}]}]},
    }  # fmt: skip
    smelt.merge({"merge_method": "passthrough", "modules": modules}, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["encoder_layers"], config["decoder_layers"]) == (2, 2)
    found, whole = stored(tmp_path / "out"), stored(Path(model))
    assert found["model.decoder.layers.1.fc1.weight"] == whole["model.decoder.layers.2.fc1.weight"]
    assert found.keys() == {name for name in whole if ".decoder.layers.2." not in name}
    assert found["proj_out.weight"] == whole["proj_out.weight"]


def test_relative_positions_survive_slices_without_the_first_layer(tmp_path: Path) -> None:
    family = FAMILIES["t5"]
    model = write(tmp_path / "m", family, 1)
    slices = [{"sources": [{"model": model, "layer_range": [1, 3]}]}]
    recipe = {"merge_method": "passthrough", "modules": {"decoder": {"slices": slices}}}
    smelt.merge(recipe, tmp_path / "out")
    assert stored(tmp_path / "out").keys() == {n for n in family.names if not n.startswith("decoder.block.2.")}


def test_wrong_modules_are_told(tmp_path: Path) -> None:
    model = write(tmp_path / "m", FAMILIES["t5"], 1)

    def planned(**modules: Any) -> None:
        given = {word: {"models": [{"model": model}]} for word in modules}
        smelt.plan({"merge_method": "passthrough", "modules": given})

    with pytest.raises(InputRejected, match="has no part 'encodr'; did you mean 'encoder'"):
        planned(encodr=1)
    with pytest.raises(InputRejected, match="no part 'x'; its parts are decoder, encoder, shared"):
        planned(x=1)
    with pytest.raises(UsageError, match="is in the modules decoder and block: name parts that do not overlap"):
        planned(decoder=1, block=1)
    slices = [{"sources": [{"model": model, "layer_range": [0, 1]}]}]
    with pytest.raises(InputRejected, match="found 2; the parts of a model are sliced one by one, under modules"):
        smelt.plan({"merge_method": "passthrough", "slices": slices})
    assert parts(structure(FAMILIES["llava"])) == ("language_model", "multi_modal_projector", "vision_tower")


# --- a text model into the text part of a model that sees ------------------------------------------------

TEXT = Family({"model_type": "qwen2", "num_hidden_layers": 2}, {"model.layers": (2, f"{LLAMA} {BIASED}")}, LLAMA_REST)
SEEING = {"qwen2-vl": "", "qwen2.5-vl": "model.language_model.", "llava": "language_model.model."}


def text_name(name: str, prefix: str) -> str:
    """The name in the text model of a tensor of the one that sees; empty when it has none."""
    if name.endswith("lm_head.weight"):
        return "lm_head.weight"
    within = name.removeprefix(prefix) if prefix and name.startswith(prefix) else name
    return "model." + within.removeprefix("model.") if prefix and within != name else within


@pytest.mark.parametrize("name", SEEING)
def test_a_text_model_goes_into_the_text_part(name: str, tmp_path: Path) -> None:
    """The task vector of a text model is added; vision tower and projector are copied, and config stays."""
    seeing = FAMILIES[name]
    text = TEXT if name != "llava" else Family(TEXT.config, {"model.layers": (2, LLAMA)}, LLAMA_REST)
    base, tuned = (write(tmp_path / f"text{seed}", text, seed) for seed in (3, 4))
    eyes = write(tmp_path / "eyes", seeing, 1)
    recipe = {
        "merge_method": "task_arithmetic", "base_model": base, "models": [{"model": eyes}, {"model": tuned}],
        "parameters": {"weight": 1.0},
    }  # fmt: skip
    artifact = smelt.merge(recipe, tmp_path / "out", on_extra="copy", force=True)
    found, a, b, t = values(tmp_path / "out"), seeing.arrays(1), text.arrays(3), text.arrays(4)
    assert found.keys() == a.keys()
    touched = 0
    for tensor, value in found.items():
        own = text_name(tensor, SEEING[name])
        touched += own in b
        wanted = a[tensor] + (t[own] - b[own] if own in b else 0)
        np.testing.assert_allclose(value, wanted, atol=1e-5, err_msg=tensor)
    assert touched == len(b)
    assert json.loads((tmp_path / "out" / "config.json").read_text()).items() >= seeing.config.items()
    assert any("vis" in warning and warning.endswith("copied") for warning in artifact.warnings)


def test_modules_take_the_text_part_of_one_and_the_eyes_of_another(tmp_path: Path) -> None:
    seeing = FAMILIES["qwen2.5-vl"]
    eyes, text = write(tmp_path / "eyes", seeing, 1), write(tmp_path / "text", TEXT, 4)
    modules = {"vision_tower": {"models": [{"model": eyes}]}, "text_decoder": {"models": [{"model": text}]}}
    smelt.merge({"merge_method": "passthrough", "modules": modules}, tmp_path / "out", force=True)
    found, t, merger = values(tmp_path / "out"), TEXT.arrays(4), "model.visual.merger.mlp.0.weight"
    np.testing.assert_array_equal(found["model.language_model.norm.weight"], t["model.norm.weight"])
    np.testing.assert_array_equal(found[merger], seeing.arrays(1)[merger])


def test_related_models_of_both_kinds_share_a_backbone(tmp_path: Path) -> None:
    """The check of descent compares the text part by the other's names, and does not mind the config."""
    seeing, plain = FAMILIES["qwen2.5-vl"], TEXT.arrays(3)
    grown = {name: array + np.float32(0.001) for name, array in plain.items()}
    inside = {name.replace("model.", "model.language_model.", 1): array for name, array in grown.items()}
    eyes = save(tmp_path / "eyes", {**seeing.arrays(1), **inside}, config={"model_type": "qwen2_5_vl", **seeing.config})
    text = save(tmp_path / "text", plain, config=TEXT.config)
    smelt.merge(linear([text, eyes]), tmp_path / "out", on_extra="copy")
    stranger = write(tmp_path / "stranger", TEXT, 9)
    with pytest.raises(InputRejected, match="does not share the backbone"):
        smelt.merge(linear([stranger, eyes]), tmp_path / "no", on_extra="copy")


def test_a_text_model_that_drops_the_eyes_keeps_its_names(tmp_path: Path) -> None:
    eyes, text = write(tmp_path / "eyes", FAMILIES["qwen2.5-vl"], 1), write(tmp_path / "text", TEXT, 4)
    smelt.merge(linear([text, eyes]), tmp_path / "out", on_extra="drop", force=True)
    assert values(tmp_path / "out").keys() == set(TEXT.names)


# --- only -----------------------------------------------------------------------------------------------


def test_only_what_is_named_is_merged(tmp_path: Path) -> None:
    base, model = (write(tmp_path / f"m{seed}", TEXT, seed) for seed in (1, 2))
    recipe = {"merge_method": "task_arithmetic", "base_model": base, "models": [{"model": model}],
              "parameters": {"weight": 1}, "only": ["layers.1.", "norm"]}  # fmt: skip
    smelt.merge(recipe, tmp_path / "out", force=True)
    a, b = TEXT.arrays(1), TEXT.arrays(2)
    for tensor, value in values(tmp_path / "out").items():
        wanted = b if "layers.1." in tensor or "norm" in tensor else a
        np.testing.assert_allclose(value, wanted[tensor], atol=1e-6, err_msg=tensor)
    with pytest.raises(UsageError, match=r"only.*: filter 'nrom' matches no tensor"):
        smelt.plan({**recipe, "only": "nrom"}, strict=True)
    with pytest.raises(UsageError, match="only takes filters"):
        smelt.plan({**recipe, "only": [3]})
