"""Models in several folders, or called otherwise: merged whole, as their libraries load them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import smelt
from smelt.cli import main
from smelt.errors import InputRejected
from tests.pickled import save_arrays
from tests.readback import nothing_left

Arrays = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

UNET = {"conv_in.weight": (4, 4, 3, 3), "down_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3), "conv_out.bias": (4,)}
VAE = {"decoder.conv_in.weight": (4, 4, 3, 3)}
TEXT = {
    "text_model.embeddings.token_embedding.weight": (12, 8),
    **{f"text_model.encoder.layers.{i}.mlp.fc1.weight": (16, 8) for i in range(2)},
}  # fmt: skip
BERT = {
    "embeddings.word_embeddings.weight": (12, 8),
    **{f"encoder.layer.{i}.intermediate.dense.weight": (16, 8) for i in range(2)},
}  # fmt: skip
BERT_CONFIG = {
    "architectures": ["BertModel"], "model_type": "bert", "num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 12,
    "num_attention_heads": 2, "dtype": "float32",
}  # fmt: skip


def drawn(shapes: Shapes, seed: int) -> Arrays:
    """A model near the one that every seed begins from."""
    base, noise = np.random.default_rng(0), np.random.default_rng(seed + 1)
    return {
        name: (base.standard_normal(shape) + 0.01 * noise.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def put(home: Path, files: Mapping[str, Any]) -> Path:
    """Write texts, JSON documents and weights (a dict of arrays) at their paths."""
    for name, content in files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file(content, path, {"format": "pt"})
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return home


def diffusers(home: Path, seed: int) -> Path:
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", "requires_safety_checker": False,
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"], "safety_checker": [None, None],
    }  # fmt: skip
    return put(home, {
        "model_index.json": index, "README.md": "---\nlicense: mit\n---\n", "unet/config.json": {"sample_size": 8},
        "unet/diffusion_pytorch_model.safetensors": drawn(UNET, seed), "vae/config.json": {"latent_channels": 4},
        "vae/diffusion_pytorch_model.safetensors": drawn(VAE, seed),
        "text_encoder/config.json": {"model_type": "clip_text_model", "num_hidden_layers": 2, "dtype": "float32"},
        "text_encoder/model.safetensors": drawn(TEXT, seed), "tokenizer/vocab.json": {"a": 0},
        "tokenizer/merges.txt": "a b", "scheduler/scheduler_config.json": {"_class_name": "PNDMScheduler"},
    })  # fmt: skip


def sentence_transformer(home: Path, seed: int) -> Path:
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    return put(home, {
        "modules.json": modules, "config_sentence_transformers.json": {"prompts": {}}, "config.json": BERT_CONFIG,
        "sentence_bert_config.json": {"max_seq_length": 16}, "model.safetensors": drawn(BERT, seed),
        "tokenizer.json": {"added_tokens": [], "model": {"vocab": {f"t{i}": i for i in range(12)}}},
        "vocab.txt": "a\nb\n", "1_Pooling/config.json": {"word_embedding_dimension": 8},
        "2_Dense/config.json": {"in_features": 8, "out_features": 4},
        "2_Dense/model.safetensors": drawn({"linear.weight": (4, 8), "linear.bias": (4,)}, seed),
    })  # fmt: skip


def recipe(*models: Path, **more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1.0}} for m in models],
            **more}  # fmt: skip


def files_of(home: Path) -> set[str]:
    return {path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()}


def assert_mean(out: Path, file: str, models: list[Path], theirs: str | None = None) -> None:
    """A weight file holds the means of the models' own, under their names."""
    made, parts = load_file(out / file), [load_file(model / (theirs or file)) for model in models]
    assert made.keys() == parts[0].keys()
    for name, array in made.items():
        np.testing.assert_allclose(array, (parts[0][name] + parts[1][name]) / 2, rtol=1e-6, err_msg=name)


def test_a_pipeline_is_merged_part_by_part(tmp_path: Path) -> None:
    models = [diffusers(tmp_path / name, seed) for seed, name in enumerate("ab")]
    out = tmp_path / "out"
    smelt.merge(recipe(*models), out)
    assert files_of(out) == files_of(models[0]) | {"smelt-manifest.json"}
    for file in (name for name in files_of(out) if name.endswith(".safetensors")):
        assert_mean(out, file, models)
    for file in ("model_index.json", "tokenizer/merges.txt", "unet/config.json", "text_encoder/config.json"):
        assert (out / file).read_bytes() == (models[0] / file).read_bytes(), file
    assert "library_name: diffusers" in (out / "README.md").read_text()
    assert smelt.verify(out).ok
    for file in (name for name in files_of(out) if name.endswith(".safetensors")):
        whole = (out / file).read_bytes()
        spare = whole.index(b"}}") + 2  # between the header's end and the data lie spaces, which nobody reads
        (out / file).write_bytes(whole[:spare] + whole[spare:].replace(b" ", b"\n", 1))
        assert smelt.verify(out).problems == [f"the header of {file!r} differs from what smelt has written"]
        (out / file).write_bytes(whole)
    (out / "scheduler" / "scheduler_config.json").write_text("{}")
    assert smelt.verify(out).problems == ["file 'scheduler/scheduler_config.json' differs from the manifest"]


def test_parts_have_shards_and_dtypes_of_their_own(tmp_path: Path) -> None:
    home = diffusers(tmp_path / "a", 0)
    assert main(["convert", str(home), str(tmp_path / "out"), "--dtype", "float16", "--shard-size", "500", "-q"]) == 0
    index = json.loads((tmp_path / "out/unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == UNET.keys()
    assert set(index["weight_map"].values()) <= {path.name for path in (tmp_path / "out/unet").iterdir()}
    assert not (tmp_path / "out/model.safetensors.index.json").exists()
    config = {
        part: json.loads((tmp_path / "out" / part / "config.json").read_text()) for part in ("unet", "text_encoder")
    }
    assert config["unet"] == {"sample_size": 8}
    assert config["text_encoder"]["dtype"] == "float16"
    assert smelt.verify(tmp_path / "out").ok
    with smelt.load(tmp_path / "out") as again:
        assert {name.partition(".")[0] for name in again} == {"unet", "vae", "text_encoder"}


def test_parts_may_be_told_apart_in_a_recipe(tmp_path: Path) -> None:
    first, second = (diffusers(tmp_path / name, seed) for seed, name in enumerate("ab"))
    modules = {"unet": {"models": recipe(first, second)["models"]}}
    smelt.merge({"merge_method": "linear", "base_model": str(first), "modules": modules}, tmp_path / "out")
    assert_mean(tmp_path / "out", "unet/diffusion_pytorch_model.safetensors", [first, second])
    for file in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        kept, own = load_file(tmp_path / "out" / file), load_file(first / file)
        assert all((kept[name] == own[name]).all() for name in own)


def test_a_stage_hands_a_pipeline_on(tmp_path: Path) -> None:
    import yaml

    models = [diffusers(tmp_path / name, seed) for seed, name in enumerate("ab")]
    documents = [{"name": "first", **recipe(*models)}, {"merge_method": "passthrough", "models": [{"model": "first"}]}]
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump_all(documents))
    smelt.merge(tmp_path / "recipe.yml", tmp_path / "out")
    assert_mean(tmp_path / "out", "unet/diffusion_pytorch_model.safetensors", models)
    assert files_of(tmp_path / "out") >= files_of(models[0])


@pytest.mark.parametrize("make", [diffusers, sentence_transformer])
def test_inspect_and_check_see_all_parts(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [make(tmp_path / name, seed) for seed, name in enumerate("ab")]
    assert main(["inspect", str(models[0]), "--json", "--tensors"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tensors"] == len(smelt.load(models[0]))
    assert facts["parts"] == (["unet", "vae", "text_encoder"] if make is diffusers else [".", "2_Dense"])
    assert main(["check", *map(str, models), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mergeable"]


def test_a_sentence_transformer_stays_whole(tmp_path: Path) -> None:
    models = [sentence_transformer(tmp_path / name, seed) for seed, name in enumerate("ab")]
    out = tmp_path / "out"
    smelt.merge(recipe(*models, dtype="float32"), out)
    assert files_of(out) == files_of(models[0]) | {"smelt-manifest.json", "README.md"}
    assert_mean(out, "model.safetensors", models)
    assert_mean(out, "2_Dense/model.safetensors", models)
    assert json.loads((out / "config.json").read_text()) == BERT_CONFIG
    assert "library_name: sentence-transformers" in (out / "README.md").read_text()
    assert smelt.verify(out).ok
    slices = [{"sources": [{"model": str(models[0]), "layer_range": [0, 1]}]}]
    smelt.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "short")
    assert json.loads((tmp_path / "short" / "config.json").read_text())["num_hidden_layers"] == 1
    assert (tmp_path / "short" / "2_Dense" / "model.safetensors").exists()


def test_pickled_parts_need_to_be_allowed(tmp_path: Path) -> None:
    home = sentence_transformer(tmp_path / "a", 0)
    dense = home / "2_Dense"
    save_arrays(dense / "pytorch_model.bin", load_file(dense / "model.safetensors"))
    (dense / "model.safetensors").unlink()
    with pytest.raises(InputRejected, match=r"2_Dense' holds no safetensors file; 'pytorch_model.bin' is pickled"):
        smelt.convert(home, tmp_path / "out")
    assert nothing_left(tmp_path / "out")
    smelt.convert(home, tmp_path / "out", allow_pickle=True)
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "2_Dense" / "pytorch_model.bin").exists()


def test_open_clip_and_timm_keep_their_file_names(tmp_path: Path) -> None:
    tower = {f"visual.transformer.resblocks.{i}.mlp.c_fc.weight": (8, 4) for i in range(2)}
    blocks = {f"blocks.{i}.mlp.fc1.weight": (8, 4) for i in range(2)}
    kinds: dict[str, dict[str, Any]] = {
        "open_clip": {"open_clip_config.json": {"model_cfg": {"embed_dim": 4}}, "open_clip_model.safetensors": tower},
        "timm": {"config.json": {"architecture": "vit_tiny", "num_classes": 2, "pretrained_cfg": {}},
                 "model.safetensors": blocks},
    }  # fmt: skip
    for kind, files in kinds.items():
        models = []
        for seed in (0, 1):
            made = {n: drawn(c, seed) if n.endswith(".safetensors") else c for n, c in files.items()}
            models.append(put(tmp_path / f"{kind}{seed}", made))
        out = tmp_path / kind
        smelt.merge(recipe(*models, dtype="float32"), out)
        assert files_of(out) == {*files, "README.md", "smelt-manifest.json"}
        weights, config = sorted(files, key=lambda name: name.endswith(".json"))
        assert_mean(out, weights, models)
        assert (out / config).read_bytes() == (models[0] / config).read_bytes()
        assert smelt.verify(out).ok
        smelt.convert(models[0] / weights, tmp_path / f"{kind}-file")
        assert (tmp_path / f"{kind}-file" / config).exists()


def test_one_part_of_a_pipeline_is_what_its_library_looks_for(tmp_path: Path) -> None:
    models = [diffusers(tmp_path / name, seed) / "unet" for seed, name in enumerate("ab")]
    smelt.merge(recipe(*models, dtype="float32"), tmp_path / "out", card=False)
    assert files_of(tmp_path / "out") == {
        "config.json", "diffusion_pytorch_model.safetensors", "smelt-manifest.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"sample_size": 8}


def test_a_variant_is_taken_where_it_is_alone(tmp_path: Path) -> None:
    home = diffusers(tmp_path / "a", 0)
    plain, variant = (home / "unet" / f"diffusion_pytorch_model{word}.safetensors" for word in ("", ".fp16"))
    save_file({"narrow": np.zeros(2, np.float16)}, variant)
    assert "unet.narrow" not in smelt.load(home)
    plain.unlink()
    smelt.convert(home, tmp_path / "out")
    assert list(load_file(tmp_path / "out" / "unet" / plain.name)) == ["narrow"]


def test_single_files_are_told_by_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SD in one file, with the prefixes of its trainers; no config says what it is."""
    shapes = {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (8, 8),
        "model.diffusion_model.out.2.bias": (4,), "first_stage_model.decoder.conv_in.weight": (4, 4, 3, 3),
        **{f"cond_stage_model.transformer.text_model.encoder.layers.{i}.mlp.fc1.weight": (16, 8) for i in range(2)},
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (12, 8),
    }  # fmt: skip
    flux = {f"double_blocks.{i}.img_attn.qkv.weight": (12, 4) for i in range(3)} | {"img_in.weight": (4, 4)}
    for kind, names in (("sd", shapes), ("flux", flux)):
        folder = put(tmp_path / kind, {f"{name}.safetensors": drawn(names, seed) for seed, name in enumerate("ab")})
        files = [folder / "a.safetensors", folder / "b.safetensors"]
        out = tmp_path / f"{kind}-out"
        smelt.merge(recipe(*files), out, card=False)
        assert files_of(out) == {"model.safetensors", "smelt-manifest.json"}
        made, parts = load_file(out / "model.safetensors"), [load_file(file) for file in files]
        for name, array in made.items():
            np.testing.assert_allclose(array, (parts[0][name] + parts[1][name]) / 2, rtol=1e-6)
        assert main(["inspect", str(files[0]), "--roles"]) == 0
        assert main(["check", *map(str, files)]) == 0
    assert "error" not in capsys.readouterr().out


DENSE = {"idx": 0, "name": "0", "path": "2_Dense", "type": "Dense"}

#: The index, its content, what the message must match.
BROKEN: dict[str, tuple[str, Any, str]] = {
    "a-part-is-missing": ("model_index.json", {"unet": ["d", "U"], "gone": ["d", "V"]}, "part 'gone', but there is no"),
    "no-part": ("model_index.json", {"_class_name": "X"}, "names no part"),
    "leads-up": ("model_index.json", {"..": ["d", "U"]}, "expected the plain name of a folder"),
    "leads-down": ("model_index.json", {"unet/deep": ["d", "U"]}, "no such folder|expected the plain name"),
    "absolute": ("modules.json", [DENSE | {"path": "/etc"}], "expected the plain name of a folder"),
    "up": ("modules.json", [DENSE | {"path": "../a"}], "expected the plain name of a folder"),
    "no-list": ("modules.json", {"a": 1}, "expected a list of modules"),
    "no-objects": ("modules.json", [1], "expected a list of modules"),
    "no-path": ("modules.json", [{"idx": 0}], "the part None, expected the plain name"),
    "no-json": ("modules.json", "nothing", "is not valid JSON"),
    "a-repeated-key": ("model_index.json", '{"unet": ["d", "U"], "unet": [null, null]}', "is given twice"),
    "no-weights": ("modules.json", [DENSE | {"path": "1_Pooling"}], "no folder that modules.json names holds weights"),
    "a-model-without-weights": ("model_index.json", {"bare": ["d", "U"]}, "bare' holds no weights"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_index_is_told(name: str, tmp_path: Path) -> None:
    index, content, message = BROKEN[name]
    put(tmp_path, {"unet/diffusion_pytorch_model.safetensors": drawn(VAE, 0), "1_Pooling/config.json": {},
                   "bare/config.json": {}, "unet/deep/x.txt": "", index: content})  # fmt: skip
    with pytest.raises(InputRejected, match=message):
        smelt.load(tmp_path)


def test_a_part_may_be_missing_where_the_recipe_says_so(tmp_path: Path) -> None:
    """A tensor of another model that belongs to no part of the donor cannot be written."""
    first, second = (diffusers(tmp_path / name, seed) for seed, name in enumerate("ab"))
    index = json.loads((second / "model_index.json").read_text()) | {"extra": ["d", "E"]}
    put(second, {"model_index.json": index, "extra/model.safetensors": drawn(VAE, 0)})
    with pytest.raises(InputRejected, match=r"'extra\.decoder\.conv_in\.weight' is in .*choose --on-extra"):
        smelt.merge(recipe(first, second), tmp_path / "out")
    with pytest.raises(smelt.UsageError, match=r"belongs to none of the parts unet, vae, text_encoder: leave it out"):
        smelt.merge(recipe(first, second), tmp_path / "out", on_extra="copy")
    assert nothing_left(tmp_path / "out")
    smelt.merge(recipe(first, second), tmp_path / "out", on_extra="drop")
