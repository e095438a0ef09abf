"""What smelt publishes, loaded by the libraries that the models belong to. Each test needs its library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import smelt

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")


def mean_of(models: list[Path], out: Path) -> Path:
    inputs = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models]
    smelt.merge({"merge_method": "linear", "models": inputs}, out, force=True)
    return out


def assert_means(made: Any, parts: list[Any]) -> None:
    found, states = made.state_dict(), [part.state_dict() for part in parts]
    assert found.keys() == states[0].keys()
    for name, tensor in found.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)


def saved_pipeline(home: Path, seed: int) -> Path:
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    torch.manual_seed(seed)
    blocks = {"block_out_channels": (32, 32), "norm_num_groups": 8}
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **blocks,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
        **blocks,
    )  # fmt: skip
    config = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    vocabulary = home.with_name(f"{home.name}-words")
    vocabulary.mkdir()
    (vocabulary / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
    (vocabulary / "merges.txt").write_text("#version: 0.2\n")
    diffusers.StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=transformers.CLIPTextModel(config),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(vocabulary), scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(home)  # fmt: skip
    return home


def test_diffusers_loads_a_merged_pipeline(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    models = [saved_pipeline(tmp_path / name, seed) for seed, name in enumerate("ab")]
    out = mean_of(models, tmp_path / "out")
    load = diffusers.StableDiffusionPipeline.from_pretrained
    made, parts = load(out), [load(model) for model in models]
    for name in ("unet", "vae", "text_encoder"):
        assert_means(getattr(made, name), [getattr(part, name) for part in parts])
    assert type(made.scheduler).__name__ == "DDIMScheduler"
    smelt.convert(out, tmp_path / "sharded", dtype="float16", shard_size="100kB")
    small = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "sharded", subfolder="unet")
    torch.testing.assert_close(small.conv_in.weight.float(), made.unet.conv_in.weight.half().float())


def test_sentence_transformers_loads_a_merge(tmp_path: Path) -> None:
    library, transformers = pytest.importorskip("sentence_transformers"), pytest.importorskip("transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    models = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        home = tmp_path / f"{name}-bert"
        config = transformers.BertConfig(
            vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
        )
        transformers.BertModel(config).save_pretrained(home)
        words = tmp_path / f"{name}.txt"
        words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three"]))
        transformers.BertTokenizer(str(words)).save_pretrained(home)
        encoder = modules.Transformer(str(home), max_seq_length=8)
        parts = [encoder, modules.Pooling(16), modules.Dense(16, 4), modules.Normalize()]
        library.SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / name))
        models.append(tmp_path / name)
    out = mean_of(models, tmp_path / "out")
    made, *parts = (library.SentenceTransformer(str(path), device="cpu") for path in (out, *models))
    assert_means(made, parts)
    assert made.encode(["one two"]).shape == (1, 4)


def test_timm_loads_a_merge(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from timm.models import save_for_hf

    models = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
        save_for_hf(model, tmp_path / name, model_args={"img_size": 32, "depth": 2}, safe_serialization=True)
        models.append(tmp_path / name)
    out = mean_of(models, tmp_path / "out")
    made, *parts = (timm.create_model(f"local-dir:{path}", pretrained=True) for path in (out, *models))
    assert_means(made, parts)
