"""The tokenizer in a GGUF file as tokenizer.json: the same encodings as those that the file was written from."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smelt
from smelt.checkpoint.gguf import write_gguf
from smelt.checkpoint.gguf.header import Texts
from smelt.checkpoint.gguf.splits import SPLITS, Split
from smelt.checkpoint.gguf.tokenizer import TokenizerFiles, tokenizer_files
from smelt.checkpoint.gguf.tokens import tokenizer_entries
from tests.gguf_files import LLAMA, save_llama
from tests.small_models import CONFIG, bf16, llama, save

tokenizers = pytest.importorskip("tokenizers")

TEXT = (
    "The quick brown fox jumps over the lazy dog; don't we've I'LL see 12 345 67890 and 3.14 times?\n\n"
    "\tdef f(x):\n        return x ** 2  # indented\r\n\u4eca\u65e5\u306f\u6771\u4eac, "
    "\u043f\u0440\u0438\u0432\u0435\u0442, "
    "stra\u00dfe e\u0301t\u00e9 na\u00efve \U0001f600\U0001f44d\U0001f3fd CamelCaseWORDS snake_case   end  "
)
TEXTS = [
    TEXT, "", " ", "  two spaces", "trailing  ", "\n\n\n", "a<|end|> b<tool>c<tool> <s>x", "<|begin|><|end|>",
    "\u00a0\u3000wide", "\u1100\u1161\u11a8 jamo", "\x00\x7f\ufffd", "0123456789" * 3, "don'T DON'T \u0130 \u01c5",
    "<0x41> \u2581under\u2581score", "\t\t",
]  # fmt: skip
SETTINGS: dict[str, Any] = {
    "bos_token": "<|begin|>", "eos_token": "<|end|>", "add_bos_token": True, "chat_template": "{{ bos_token }}{{ x }}",
}  # fmt: skip


def added(tree: dict[str, Any], **special: bool) -> dict[str, Any]:
    """With these tokens behind its vocabulary."""
    end = max(tree["model"]["vocab"].values()) + 1
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    names = {"begin": "<|begin|>", "end": "<|end|>", "tool": "<tool>"}
    tree["added_tokens"] += [
        {"id": end + place, "content": names[key], **plain, "special": value}
        for place, (key, value) in enumerate(special.items())
    ]
    return tree


def byte_level(split: Split, text: str = TEXT) -> dict[str, Any]:
    """A tokenizer that was trained on the text above."""
    tree = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=split.whole)).to_str())
    tree |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": split.steps}, "normalizer": split.normalizer}
    made = tokenizers.Tokenizer.from_str(json.dumps(tree))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([text], trainer)
    made.decoder = tokenizers.decoders.ByteLevel()
    return added(json.loads(made.to_str()), begin=True, end=True, tool=False)


def ways(scores: Mapping[str, float]) -> list[str]:
    """All merges that make one piece of two, as transformers lists them."""
    cuts = [(score, cut, text) for text, score in scores.items() for cut in range(1, len(text))]
    usable = [(score, cut, text) for score, cut, text in cuts if text[:cut] in scores and text[cut:] in scores]
    usable.sort(key=lambda item: (item[0], item[1]), reverse=True)
    return [f"{text[:cut]} {text[cut:]}" for _, cut, text in usable]


def spaced(prefix: bool = True, tool: bool = True) -> dict[str, Any]:
    """SentencePiece as tokenizer.json has it, with the vocabulary of a training on the text above."""
    source = tokenizers.Tokenizer(tokenizers.models.BPE())
    source.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False)
    source.train_from_iterator([TEXT.replace("\u4eca", "")], trainer)
    learned = json.loads(source.to_str())["model"]
    letters = sorted(set(learned["vocab"]) - {"".join(merge) for merge in learned["merges"]})
    words = list(dict.fromkeys("".join(merge) for merge in learned["merges"]))
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    first = {"type": "Prepend", "prepend": "\u2581"}
    special = [{"id": index, "content": pieces[index], "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True} for index in range(3)]  # fmt: skip
    undone = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    tree: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [first, space]} if prefix else space,
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [undone, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": ways({word: -float(rank) for rank, word in enumerate([*words, *letters])}),
        },
    }  # fmt: skip
    return added(tree, begin=True, end=True, **({"tool": False} if tool else {}))


def metadata(tree: dict[str, Any], settings: dict[str, Any] = SETTINGS, rows: int = 1000) -> dict[str, Any]:
    """What the writer makes of a tokenizer, as the reader has it."""
    files = {"tokenizer.json": json.dumps(tree).encode(), "tokenizer_config.json": json.dumps(settings).encode()}
    found = {}
    for key, kind, value in tokenizer_entries(files, {}, rows):
        listed = (
            (Texts(text.encode() for text in value) if kind == 8 else np.array(value))
            if isinstance(value, list)
            else value
        )
        found[key] = listed
    return found


def same(first: Any, second: Any, special: bool = False) -> None:
    for text in TEXTS:
        ids = first.encode(text, add_special_tokens=special).ids
        assert second.encode(text, add_special_tokens=special).ids == ids, text
        assert second.decode(ids, skip_special_tokens=False) == first.decode(ids, skip_special_tokens=False), text


@pytest.mark.parametrize(
    "name", ["gpt-2", "llama-bpe", "qwen2", "deepseek-r1-qwen", "qwen35", "tekken", "gpt-4o", "smollm", "command-r"]
)
def test_byte_level_tokenizers_come_back(name: str) -> None:
    tree = byte_level(SPLITS[name])
    found = metadata(tree)
    files = tokenizer_files(found)
    made = json.loads(files["tokenizer.json"])
    assert found["tokenizer.ggml.pre"] == name
    assert made["model"]["vocab"] == tree["model"]["vocab"]
    assert [" ".join(merge) for merge in made["model"]["merges"]] == [
        " ".join(merge) for merge in tree["model"]["merges"]
    ]
    assert made["added_tokens"] == tree["added_tokens"]
    back = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    same(tokenizers.Tokenizer.from_str(json.dumps(tree)), back)
    assert back.encode("x").tokens == ["<|begin|>", "x"]
    settings = json.loads(files["tokenizer_config.json"])
    assert {key: settings[key] for key in SETTINGS} == SETTINGS


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_comes_back(prefix: bool) -> None:
    """Merges are made anew from scores, bytes stand in for letters that no piece has."""
    tree = spaced(prefix)
    files = tokenizer_files(metadata(tree, {"bos_token": "<s>", "eos_token": "</s>", "add_eos_token": True}))
    back = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    same(tokenizers.Tokenizer.from_str(json.dumps(tree)), back)
    assert json.loads(files["tokenizer.json"])["model"]["vocab"] == tree["model"]["vocab"]
    assert back.encode("the").tokens == [*back.encode("the", add_special_tokens=False).tokens, "</s>"]


def test_gemma_has_merges_in_the_order_of_ids_and_makes_runs_of_spaces_by_them() -> None:
    """Its scores say otherwise, which GGUF gives to tokens that were added."""
    tree = spaced(prefix=False, tool=False)
    del tree["model"]["vocab"]["\t"]
    end = 1 + max(token["id"] for token in tree["added_tokens"])
    runs = ["\u2581\u2581", "\u2581\u2581\u2581", "\u2581\u2581\u2581\u2581"]
    tree["model"]["vocab"] |= {run: end + place for place, run in enumerate(runs)}
    tree["model"]["merges"] += [f"{run[:cut]} {run[cut:]}" for run in runs for cut in range(1, len(run))]
    found = metadata(tree) | {"general.architecture": "gemma2"}
    stored = found["tokenizer.ggml.tokens"].decoded()
    texts = [text.replace("\u2581", " ") if text in runs else text for text in stored]
    found["tokenizer.ggml.tokens"] = Texts(text.encode() for text in texts)
    for place, text in enumerate(texts):
        if len(text) > 1 and not text.strip(" "):
            found["tokenizer.ggml.token_type"][place], found["tokenizer.ggml.scores"][place] = 4, -1000
    made = json.loads(tokenizer_files(found)["tokenizer.json"])
    assert made["model"]["vocab"]["\t"] == texts.index("<0x09>")
    assert made["model"]["vocab"].keys() >= set(runs)
    assert not [token for token in made["added_tokens"] if token["content"] in runs]
    ids = [made["model"]["vocab"]["".join(merge)] for merge in made["model"]["merges"]]
    assert ids == sorted(ids)
    back = tokenizers.Tokenizer.from_str(json.dumps(made))
    assert back.encode("a    b", add_special_tokens=False).tokens == ["a", runs[-1], "b"]
    same_text = "x  y\tz<|end|>"
    assert back.decode(back.encode(same_text).ids, skip_special_tokens=False).endswith(same_text)


def test_phi_3_strips_the_spaces_behind_its_control_tokens() -> None:
    made = json.loads(tokenizer_files(metadata(spaced()) | {"general.architecture": "phi3"})["tokenizer.json"])
    strips = {token["content"]: token["rstrip"] for token in made["added_tokens"]}
    assert strips == {"<unk>": False, "<s>": False, "</s>": True, "<|begin|>": True, "<|end|>": True, "<tool>": False}


# --- through files --------------------------------------------------------------------------------------


def saved(folder: Path, tree: dict[str, Any], settings: dict[str, Any] = SETTINGS, rows: int = 600) -> str:
    config = {**CONFIG, "max_position_embeddings": 2048, "vocab_size": rows}
    save(folder, bf16(llama(1, rows)), config=config)
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize("kind", ["byte level", "SentencePiece"])
def test_a_model_keeps_its_tokenizer_through_gguf(tmp_path: Path, kind: str) -> None:
    tree = byte_level(SPLITS["llama-bpe"]) if kind == "byte level" else spaced()
    source = saved(tmp_path / "m", tree)
    write_gguf(smelt.load(source), tmp_path / "m.gguf")
    made = smelt.convert(str(tmp_path / "m.gguf"), tmp_path / "back")
    assert not [warning for warning in made.warnings if "tokenizer" in warning]
    same(*(tokenizers.Tokenizer.from_file(str(tmp_path / where / "tokenizer.json")) for where in ("m", "back")))
    codes = {finding.code for finding in smelt.check([source, str(tmp_path / "m.gguf")]).findings}
    assert not {"tokens-differ", "special-tokens-differ", "vocabulary-sizes-differ"} & codes


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    """The same ids, special tokens and chat as from the original folder, and from the GGUF file by itself."""
    transformers = pytest.importorskip("transformers")
    settings = {**SETTINGS, "tokenizer_class": "PreTrainedTokenizerFast"}
    source = saved(tmp_path / "m", byte_level(SPLITS["qwen2"]), settings)
    write_gguf(smelt.load(source), tmp_path / "m.gguf")
    smelt.convert(str(tmp_path / "m.gguf"), tmp_path / "back")
    first, second = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("m", "back"))
    assert (second.bos_token, second.eos_token, len(second)) == ("<|begin|>", "<|end|>", len(first))
    assert second.chat_template == first.chat_template
    plain = [first(text, add_special_tokens=False).input_ids for text in TEXTS]
    assert [second(text, add_special_tokens=False).input_ids for text in TEXTS] == plain
    assert second("x").input_ids[0] == second.bos_token_id
    pytest.importorskip("gguf")
    third = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in (unicodedata.normalize("NFC", text) for text in TEXTS):  # which it does not do
        assert third(text, add_special_tokens=False).input_ids == second(text, add_special_tokens=False).input_ids


def test_sentencepiece_itself_gives_the_same_ids(tmp_path: Path) -> None:
    """A model that the library trained, through GGUF, against the library."""
    library = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text(TEXT.replace("\u4eca", " ") * 3)
    library.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "sp"), vocab_size=340, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    model = library.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    config = {**CONFIG, "max_position_embeddings": 2048, "vocab_size": 400, "eos_token_id": 2, "bos_token_id": 1}
    source = save(tmp_path / "m", bf16(llama(1, 400)), config=config)
    (tmp_path / "m" / "tokenizer.model").write_bytes((tmp_path / "sp.model").read_bytes())
    write_gguf(smelt.load(source), tmp_path / "m.gguf")
    smelt.convert(str(tmp_path / "m.gguf"), tmp_path / "back")
    back = tokenizers.Tokenizer.from_file(str(tmp_path / "back" / "tokenizer.json"))
    for text in TEXTS:
        if text and "\x00" not in text and "<s>" not in text:  # the last is a token to those who read GGUF
            assert back.encode(text, add_special_tokens=False).ids == model.encode(text), text
    assert back.encode("x").tokens[0] == "<s>"


def test_another_chat_template_leaves_the_tokenizer_as_it_was(tmp_path: Path) -> None:
    """From GGUF to GGUF, with entries that no tokenizer.json has."""
    words = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "novel", "tokenizer.ggml.eot_token_id": ("I", 3)}
    known = {
        **words,
        "tokenizer.ggml.pre": "llama3",
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.add_bos_token": ("?", False),
    }
    tokens = {
        "tokenizer.ggml.tokens": ["a", "b", "ab", *(f"t{index}" for index in range(93))],
        "tokenizer.chat_template": "old",
    }
    for name, more in (("unknown", words), ("known", known)):
        metadata = {**LLAMA, **tokens, **more}
        source = save_llama(tmp_path / f"{name}.gguf", llama(1), quantised=True, metadata=metadata)
        recipe = {"merge_method": "passthrough", "models": [{"model": source}], "output": {"format": "gguf"}}
        for template, wanted in ((None, "old"), ("{{ x }}{% if y %}{% endif %}", "{{ x }}{% if y %}{% endif %}")):
            asked = recipe if template is None else {**recipe, "chat_template": template}
            smelt.merge(asked, tmp_path / "out", overwrite=True)
            with smelt.load(tmp_path / "out") as made:
                found = made.header.metadata  # type: ignore[attr-defined]
            assert {key: found[key] for key in more if "merges" not in key and "bos" not in key} == {
                key: value[1] if isinstance(value, tuple) else value
                for key, value in more.items() if "merges" not in key and "bos" not in key
            }  # fmt: skip
            assert found["tokenizer.chat_template"] == wanted


# --- what cannot be made --------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": Texts((b"a", b"b", b"ab")), "tokenizer.ggml.merges": Texts((b"a b",)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokenizer.ggml.model": "bert"}, "its model is 'bert', understood are gpt2, llama"),
        ({"tokenizer.ggml.pre": "novel"}, "its pre-tokenizer is 'novel', understood are gpt-2"),
        ({"tokenizer.ggml.pre": 3}, "its pre-tokenizer is '3'"),
        ({"tokenizer.ggml.merges": Texts((b"a c",))}, "the merge 'a c' is not of tokens"),
        ({"tokenizer.ggml.merges": Texts((b"a",))}, "the merge 'a' is not of tokens"),
        ({"tokenizer.ggml.merges": 3}, "merges is missing, or no list"),
        ({"tokenizer.ggml.tokens": Texts((b"a", b"a", b"ab"))}, "two tokens have the same text"),
        ({"tokenizer.ggml.tokens": Texts((b"a", b"\xff", b"ab"))}, "is not UTF-8"),
        ({"tokenizer.ggml.token_type": np.array([1])}, "token_type is not one number for each of the 3 tokens"),
        ({"tokenizer.ggml.scores": np.array([1.0]), "tokenizer.ggml.model": "llama"}, "scores is not one number"),
        ({"tokenizer.ggml.add_eos_token": True}, "that is not named: add_eos_token"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_bos_token": False,
          "tokenizer.ggml.remove_extra_whitespaces": True}, "it removes spaces"),
        ({"tokenizer.ggml.tokens": Texts((b"a" * 40_000, b"b")), "tokenizer.ggml.model": "llama",
          "tokenizer.ggml.add_bos_token": False}, "its tokens are too long"),
        ({"tokenizer.chat_template": "\udcff"}, "a text of it is not UTF-8: surrogates not allowed"),
        ({"tokenizer.huggingface.json": "{"}, "tokenizer.huggingface.json is not valid JSON"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_said(change: Mapping[str, Any], reason: str) -> None:
    assert TokenizerFiles(GOOD).problem is None
    files = TokenizerFiles({**GOOD, **change})
    assert list(files) == []
    assert reason in str(files.problem)


def test_the_file_that_a_converter_kept_is_taken() -> None:
    kept = {"model": {"type": "Unigram"}}
    found = {**GOOD, "tokenizer.ggml.model": "t5", "tokenizer.huggingface.json": json.dumps(kept)}
    assert json.loads(tokenizer_files(found)["tokenizer.json"]) == kept


def test_a_tokenizer_that_is_left_behind_is_told(tmp_path: Path) -> None:
    metadata = {**LLAMA, "tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": ["a", "b"]}
    source = save_llama(tmp_path / "m.gguf", llama(1), quantised=True, metadata=metadata)
    warnings = smelt.convert(source, tmp_path / "out").warnings
    assert any("its tokenizer is not written: its model is 'rwkv'" in warning for warning in warnings)
    assert not (tmp_path / "out" / "tokenizer.json").exists()
