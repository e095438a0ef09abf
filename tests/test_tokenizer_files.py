"""The files of a merge's tokenizer: edited exactly, loaded by the libraries as meant; templates and ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

import smelt
from smelt.recipe.tokens import TEMPLATES
from smelt.tokenizer import build, edited, parse_vocabulary
from smelt.tokenizer.templates import BUILT_IN
from tests.mergekit_parity import HERE
from tests.recipes import recipe
from tests.vocabularies import EMBEDDING, SPECIAL, added, ids, make, read, tokenizer, words, written

BASE = words(20)
CHAT = [*BASE, "<|im_start|>", "<|im_end|>"]


def edit(donor: dict[str, Any], other: dict[str, Any], **files: Any) -> dict[str, Any]:
    """The donor's tokenizer with the other's tokens, as it is written."""
    content = [json.dumps(tree).encode() for tree in (donor, other)]
    first, second = (parse_vocabulary("tokenizer.json", data) for data in content)
    stored = {"tokenizer.json": content[0], **{name: json.dumps(tree).encode() for name, tree in files.items()}}
    made = edited(stored, first, build(first, [second], {}, first.end))
    return {name: json.loads(data) for name, data in made.items()}


def test_added_tokens_keep_their_definition() -> None:
    """Of two definitions the donor's counts; a plain token becomes added under the id that it has."""
    donor, other = tokenizer(BASE), tokenizer(CHAT, ["</s>", "w3", "<|im_end|>"])
    other["added_tokens"][0] |= {"lstrip": True}
    other["added_tokens"][2] |= {"rstrip": True}
    tree = edit(donor, other)["tokenizer.json"]
    entries = {entry["content"]: entry for entry in tree["added_tokens"]}
    assert entries["</s>"] == added(2, "</s>")
    assert entries["w3"] == added(6, "w3")
    assert entries["<|im_end|>"] == added(24, "<|im_end|>", rstrip=True)
    assert entries["<|im_start|>"] == added(23, "<|im_start|>", special=False, normalized=True)
    assert {**tree, "added_tokens": 0} == {**donor, "added_tokens": 0}


def test_what_repeats_the_vocabulary_is_kept_in_step(tmp_path: Path) -> None:
    """added_tokens_decoder is extended; files of slow tokenizers, which cannot be, are left out."""
    decoder = {str(i): {k: v for k, v in added(i, t).items() if k != "id"} for i, t in enumerate(SPECIAL)}
    files = {"vocab.txt": "x", "merges.txt": "y", "tokenizer_config.json": {"added_tokens_decoder": decoder}}
    paths = [make(tmp_path / "a", BASE, 0, files=files), make(tmp_path / "b", CHAT, 1, special=[*SPECIAL, *CHAT[-2:]])]
    artefact = smelt.merge(recipe("linear", paths, tokenizer_source="union"), tmp_path / "out")
    assert not {"vocab.txt", "merges.txt"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert any("merges.txt, vocab.txt of" in text for text in artefact.warnings)
    written_decoder = read(tmp_path / "out", "tokenizer_config.json")["added_tokens_decoder"]
    assert list(written_decoder) == ["0", "1", "2", "23", "24"]
    assert written_decoder["24"]["content"] == "<|im_end|>"


def test_transformers_loads_what_was_written(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    paths = [make(tmp_path / "a", BASE, 0), make(tmp_path / "b", CHAT, 1, special=[*SPECIAL, *CHAT[-2:]])]
    tree = recipe("linear", paths, tokenizer_source="union", chat_template="chatml")
    smelt.merge(tree, tmp_path / "out")
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert loaded.get_vocab() == ids(tmp_path / "out")
    assert loaded.encode("w1 <|im_start|>w2") == [4, 23, 5]
    assert loaded.decode([4, 24], skip_special_tokens=True) == "w1"
    text = loaded.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False)
    assert text == "<|im_start|>user\nw1<|im_end|>\n"


def test_removing_a_token_removes_its_merges() -> None:
    tree = {
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "abb": 3}, "merges": [["a", "b"], "ab b"]},
    }
    content = json.dumps(tree).encode()
    vocabulary = parse_vocabulary("tokenizer.json", content)
    made = json.loads(edited({"tokenizer.json": content}, vocabulary, build(vocabulary, [], {}, 3))["tokenizer.json"])
    assert made["model"] == {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}


def test_ids_that_would_not_be_loaded_are_refused() -> None:
    """The tokenizers library counts added tokens from the size of the vocabulary, holes or not."""
    donor = tokenizer(BASE)
    donor["model"]["vocab"]["w19"] = 30
    with pytest.raises(smelt.InputRejected, match=r"leaves ids unused.*would not be read as 31"):
        edit(donor, tokenizer(CHAT))


@pytest.mark.parametrize("content", ['{"model": {"vocab": {"a": -1}}}', '{"model": {"vocab": {"a": true}}}',
                                     '{"model": {"vocab": {"a": 99999999}}}', '{"model": {}}', "[]", "{",
                                     '{"model": {"vocab": {"\\ud800": 0}}}'])  # fmt: skip
def test_bad_tokenizers(tmp_path: Path, content: str) -> None:
    paths = [make(tmp_path / "a", BASE, 0), make(tmp_path / "b", CHAT, 1, files={"tokenizer.json": content})]
    with pytest.raises(smelt.InputRejected, match=r"b: tokenizer.json"):
        smelt.plan(recipe("linear", paths, tokenizer_source="union"))


def test_slow_tokenizers(tmp_path: Path) -> None:
    """Equal ones need no alignment; others must be converted first."""
    slow = {"tokenizer.json": None, "tokenizer.model": "same"}
    paths = [make(tmp_path / str(i), BASE, i, files=slow) for i in range(2)]
    smelt.merge(recipe("linear", paths, tokenizer_source="base"), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_text() == "same"
    other = make(tmp_path / "other", BASE, 2, files={**slow, "tokenizer.model": "other"})
    fast = make(tmp_path / "fast", BASE, 3)
    for models in ([*paths, other], [fast, other]):
        with pytest.raises(smelt.InputRejected, match=r"has tokenizer.model but no tokenizer.json"):
            smelt.plan(recipe("linear", models, tokenizer_source="base"))


def test_a_tokenizer_may_come_from_a_folder_without_weights(tmp_path: Path) -> None:
    """Config and generation settings are the first model's, their ids those of the new vocabulary."""
    home = tmp_path / "tokenizer only"
    home.mkdir()
    tokens = ["<pad>", *BASE[::-1]]
    (home / "tokenizer.json").write_text(json.dumps(tokenizer(tokens)))
    (home / "config.json").write_text(json.dumps({"pad_token_id": 0}))
    settings = {"eos_token_id": [2, 23], "bos_token_id": 1, "pad_token_id": 24, "forced_bos_token_id": 24}
    paths = [make(tmp_path / str(i), CHAT, i, files={"generation_config.json": settings}) for i in range(2)]
    artefact = smelt.merge(recipe("linear", paths, tokenizer_source=str(home)), tmp_path / "out")
    out = tmp_path / "out"
    assert ids(out) == {token: index for index, token in enumerate(tokens)}
    assert written(out)[EMBEDDING].shape[0] == 24
    config = read(out, "config.json")
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (24, 22, 21)
    assert read(out, "generation_config.json") == {
        "eos_token_id": [21], "bos_token_id": 22, "pad_token_id": 0, "forced_bos_token_id": None,
    }  # fmt: skip
    assert str(tmp_path) not in (out / "README.md").read_text() + (out / "smelt-manifest.json").read_text()
    told = [text for text in artefact.warnings if text.startswith("generation_config.json")]
    assert len(told) == 2
    assert "tokens have no row in any model: zero ('<pad>')" in " ".join(artefact.warnings)


# --- chat templates -------------------------------------------------------------------------------------


def render(template: str, **values: Any) -> str:
    """As transformers renders chat templates."""
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template).render(**values)


RENDERED = json.loads((HERE / "chat_templates.json").read_text())


def test_built_in_templates_render_as_mergekits() -> None:
    assert set(BUILT_IN) == set(TEMPLATES) - {"auto"} == {case["template"] for case in RENDERED}
    for case in RENDERED:
        wanted = case.pop("rendered")
        assert render(BUILT_IN[case.pop("template")], **case) == wanted


ONE, TWO = ("{% for m in messages %}" + mark + "{{ m['content'] }}{% endfor %}" for mark in "ab")


@pytest.mark.parametrize(
    ("stored", "asked", "wanted"),
    [
        ((ONE, TWO, TWO + "\n"), "auto", TWO),  # most models have it, blanks aside
        ((TWO, ONE, None), "auto", TWO),  # as many: the donor's
        ((None, ONE, None), TWO, TWO),
    ],
)
@pytest.mark.parametrize("home", ["chat_template.jinja", "tokenizer_config.json", "chat_template.json"])
def test_the_template_that_is_chosen(tmp_path: Path, stored: Any, asked: str, wanted: str, home: str) -> None:
    paths = []
    for i, text in enumerate(stored):
        content = text if home.endswith("jinja") else text and {"chat_template": text}
        paths.append(make(tmp_path / str(i), BASE, i, files={home: content}))
    smelt.merge(recipe("linear", paths, chat_template=asked), tmp_path / "out")
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert "chat_template.json" not in names
    if home == "tokenizer_config.json" and stored[0]:
        assert read(out, home)["chat_template"] == wanted
    else:
        assert (out / "chat_template.jinja").read_text() == wanted


def test_templates_are_checked(tmp_path: Path) -> None:
    paths = [make(tmp_path / str(i), BASE, i) for i in range(2)]
    with pytest.raises(smelt.UsageError, match="chat_template: line 1: "):
        smelt.plan(recipe("linear", paths, chat_template="{% for m in messages %}{{ m.content "))
    made = smelt.plan(recipe("linear", paths, chat_template="chatml"))
    assert "the chat template writes '<|im_start|>', '<|im_end|>': no token of the vocabulary" in made.notices
    assert any(
        "no model has a chat template" in t for t in smelt.plan(recipe("linear", paths, chat_template="auto")).notices
    )
    generation = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% break %}{% endfor %}"
    smelt.plan(recipe("linear", paths, chat_template=generation))
