"""Merges of models with different tokens: every token is merged with itself, whatever its id."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import smelt
from smelt.cli import main
from tests.recipes import recipe
from tests.vocabularies import EMBEDDING, HEAD, added, ids, make, read, row, words, written

BASE = words(20)
CHAT = [*BASE, "<|im_start|>", "<|im_end|>"]


def merged(tmp_path: Path, tree: Mapping[str, Any], **options: Any) -> Path:
    """Publish a recipe; what is written must verify, and must be loaded with the ids that it states."""
    out = tmp_path / "out"
    tmp_path.mkdir(exist_ok=True)
    smelt.merge(dict(tree), out, **options)
    assert smelt.verify(out).ok
    rows = written(out)[EMBEDDING].shape[0]
    assert rows == read(out, "config.json")["vocab_size"] > max(ids(out).values())
    return out


def expected_row(token: str, name: str, owners: Sequence[int], base: int | None, weights: Sequence[float]) -> Any:
    """The rule of a union in plain words, for linear merges of models that are named by their seeds."""
    own = {seed: row(token, name, seed).astype(np.float64) for seed in owners}
    filled = own[base] if base in own else sum(own.values()) / len(own)
    total = sum(weight * own.get(seed, filled) for seed, weight in enumerate(weights))
    return total / sum(weights)


@pytest.mark.parametrize("base", [None, 0, 2])
def test_every_token_is_merged_with_itself(tmp_path: Path, base: int | None) -> None:
    """Three shuffled vocabularies with tokens of one, two and all models; 4-byte and 2-byte rows."""
    shared, random = words(30), np.random.default_rng(5)
    sets = [[*shared, *(f"{pair}{i}" for pair in pairs for i in range(4))] for pairs in ("ab", "ac", "bcd")]
    lists = [[*s[:3], *random.permutation(s[3:]).tolist()] for s in sets]
    paths = [make(tmp_path / str(i), tokens, i, half=i == 1) for i, tokens in enumerate(lists)]
    weights = [0.5, 0.3, 0.2]
    tree = recipe("linear", paths, paths[base] if base is not None else None, tokenizer_source="union")
    for entry, weight in zip(tree["models"], weights, strict=True):
        entry["parameters"] = {"weight": weight}
    out = merged(tmp_path, tree)
    vocabulary = ids(out)
    donor = lists[base or 0]
    assert set(vocabulary) == set().union(*sets)
    assert [vocabulary[token] for token in donor] == list(range(len(donor)))
    for name in (EMBEDDING, HEAD):
        result = written(out)[name]
        for token, index in vocabulary.items():
            owners = [i for i, tokens in enumerate(lists) if token in tokens]
            wanted = expected_row(token, name, owners, base, weights)
            np.testing.assert_allclose(result[index], wanted, atol=3e-4, err_msg=f"{name} {token}")


def test_a_filled_row_has_no_delta_from_the_base(tmp_path: Path) -> None:
    """The base's row of a token that a fine-tune lacks comes out as it went in."""
    base = make(tmp_path / "base", CHAT, 0)
    model = make(tmp_path / "model", BASE[::-1], 1)
    out = merged(tmp_path, recipe("task_arithmetic", [model], base, tokenizer_source="base"))
    assert (written(out)[EMBEDDING][-2:] == np.stack([row(token, EMBEDDING, 0) for token in CHAT[-2:]])).all()
    assert (tmp_path / "base" / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()


def test_a_tied_model_lends_the_rows_of_its_embedding(tmp_path: Path) -> None:
    untied = make(tmp_path / "untied", BASE, 0)
    tied = make(tmp_path / "tied", CHAT, 1, tied=True)
    tree = recipe("linear", [untied, tied], tokenizer_source="union")
    out = merged(tmp_path, tree, force=True)
    head = written(out)[HEAD]
    assert not read(out, "config.json")["tie_word_embeddings"]
    np.testing.assert_array_equal(head[-1], row("<|im_end|>", EMBEDDING, 1))
    np.testing.assert_allclose(head[5], (row("w2", HEAD, 0) + row("w2", EMBEDDING, 1)) / 2, atol=1e-7)


def test_tied_models_stay_tied(tmp_path: Path) -> None:
    paths = [make(tmp_path / str(i), tokens, i, tied=True) for i, tokens in enumerate((BASE, CHAT))]
    out = merged(tmp_path, recipe("linear", paths, tokenizer_source="union"))
    assert HEAD not in written(out)
    assert read(out, "config.json")["tie_word_embeddings"]


def test_models_without_a_tokenizer_are_taken_to_have_the_donors(tmp_path: Path) -> None:
    base, mute = make(tmp_path / "a", BASE, 0), make(tmp_path / "b", BASE, 1, files={"tokenizer.json": None})
    artefact = smelt.merge(recipe("linear", [base, mute], tokenizer_source="union"), tmp_path / "out")
    assert any("has no tokenizer: its tokens are taken to be those of" in text for text in artefact.warnings)


def test_tokens_beyond_the_rows_are_left_out_of_the_tokenizer(tmp_path: Path) -> None:
    """The reference crashes on such a model; what has no row cannot be embedded."""
    over = words(20)
    path = make(tmp_path / "over", over, 0)
    tree = read(tmp_path / "over", "tokenizer.json")
    tree["added_tokens"] += [added(len(over), "<over>", special=False)]
    (tmp_path / "over" / "tokenizer.json").write_text(json.dumps(tree))
    other = make(tmp_path / "other", CHAT, 1)
    for place, source in enumerate(("union", "base", path)):
        out = merged(tmp_path / f"merge{place}", recipe("linear", [path, other], tokenizer_source=source))
        assert "<over>" not in ids(out)
        assert len(written(out)[EMBEDDING]) == (len(CHAT) if source == "union" else len(over))


# --- single tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["union", "base"])
def test_rules_of_single_tokens(tmp_path: Path, source: str) -> None:
    """Rows of another token, by id, of zeros, of a model that is not merged; forced or where they lack."""
    base, chat, lender = (
        make(tmp_path / n, t, i) for i, (n, t) in enumerate(zip("abc", (BASE, CHAT, CHAT), strict=True))
    )
    rules = {
        "<new>": {"source": {"kind": "model_token", "model": base, "token": "w3"}},
        "<by id>": {"source": {"kind": "model_token", "model": chat, "token_id": 7}},
        "<zero>": {"source": {"kind": "zero"}},
        "<|im_end|>": {"source": lender},
        "w5": {"source": chat, "force": True},
    }
    tree = recipe("linear", [base, chat], base, tokenizer={"source": source, "tokens": rules})
    out = merged(tmp_path, tree)
    index, rows = ids(out), written(out)[EMBEDDING]
    both = (row("<|im_end|>", EMBEDDING, 1) + row("<|im_end|>", EMBEDDING, 2)) / 2
    np.testing.assert_array_equal(rows[index["<new>"]], row("w3", EMBEDDING, 0))
    np.testing.assert_array_equal(rows[index["<by id>"]], row(CHAT[7], EMBEDDING, 1))
    np.testing.assert_array_equal(rows[index["<zero>"]], 0)
    np.testing.assert_array_equal(rows[index["w5"]], row("w5", EMBEDDING, 1))
    np.testing.assert_allclose(rows[index["<|im_end|>"]], both, atol=1e-8)
    assert ("<|im_start|>" in index) == (source == "union")


def rule_error(tmp_path: Path, rules: Mapping[str, Any], **more: Any) -> str:
    paths = [make(tmp_path / str(i), BASE, i) for i in range(2)]
    text = json.dumps({"tokens": rules, **more}).replace("MODEL", paths[0])
    with pytest.raises(smelt.SmeltError) as caught:
        smelt.plan(recipe("linear", paths, tokenizer=json.loads(text)))
    assert len(caught.value.problems) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"<x>": {}}, "token '<x>' is in no vocabulary: give it a source"),
        ({"<x>": {"source": "MODEL"}}, "has no row for '<x>'"),
        ({"<x>": {"source": {"kind": "model_token", "model": "MODEL", "token": "<y>"}}}, "has no row for '<y>'"),
        ({"<x>": {"source": {"kind": "model_token", "model": "MODEL", "token_id": 23}}}, "has 23 rows, none of id 23"),
        ({"w1": {"force": True}}, "force has nothing to put in the place of the models' own rows"),
    ],
)
def test_rules_that_cannot_be_carried_out(tmp_path: Path, rules: Mapping[str, Any], message: str) -> None:
    assert message in rule_error(tmp_path, rules)


# --- rows without a token -------------------------------------------------------------------------------


def padded(tmp_path: Path, paddings: Sequence[int], tokens: Sequence[Sequence[str]], **more: Any) -> Path:
    pairs = enumerate(zip(tokens, paddings, strict=True))
    paths = [make(tmp_path / str(i), vocabulary, i, padding=padding) for i, (vocabulary, padding) in pairs]
    return merged(tmp_path, recipe("linear", paths, paths[0], **more))


@pytest.mark.parametrize(
    ("paddings", "options", "rows"),
    [
        ((8, 8), {}, 31),  # all have padding: it is kept
        ((8, 0), {}, 25),  # not all have: it is left out
        ((8, 8), {"padding": "drop"}, 25),
        ((8, 0), {"padding": "keep"}, 31),
        ((8, 8), {"pad_to_multiple_of": 16}, 32),
        ((1, 1), {}, 25),  # two new tokens need more than the padding
    ],
)
def test_padding(tmp_path: Path, paddings: Sequence[int], options: Mapping[str, Any], rows: int) -> None:
    out = padded(tmp_path, paddings, (BASE, CHAT), tokenizer={"source": "union", **options})
    assert written(out)[EMBEDDING].shape[0] == written(out)[HEAD].shape[0] == rows
    mean = written(out)[EMBEDDING][: len(CHAT)].mean(axis=0)
    made = written(out)[EMBEDDING][len(CHAT) :]
    if "pad_to_multiple_of" in options:
        np.testing.assert_allclose(made, np.broadcast_to(mean, made.shape), atol=1e-8)
    elif len(made):
        assert np.abs(made - mean).max() > 1e-3


def test_models_that_differ_in_padding_only_are_aligned_unasked(tmp_path: Path) -> None:
    """Everything is as in the first model, config and tokenizer too."""
    out = padded(tmp_path, (3, 9), (BASE, BASE))
    assert (out / "config.json").read_bytes() == (tmp_path / "0" / "config.json").read_bytes()
    np.testing.assert_allclose(
        written(out)[EMBEDDING][4], (row("w1", EMBEDDING, 0) + row("w1", EMBEDDING, 1)) / 2, atol=1e-8
    )


def test_different_tokens_need_a_word_of_the_recipe(tmp_path: Path) -> None:
    paths = [make(tmp_path / str(i), tokens, i) for i, tokens in enumerate((BASE, CHAT))]
    with pytest.raises(smelt.InputRejected, match="vocabularies differ; tokenizer_source: base keeps the base's"):
        smelt.plan(recipe("linear", paths))


def test_truncated_embeddings(tmp_path: Path) -> None:
    """The first rows that all have; whatever they mean, and whatever the config says."""
    paths = [make(tmp_path / str(i), tokens, i) for i, tokens in enumerate((CHAT, BASE))]
    artefact = smelt.merge(recipe("linear", paths), tmp_path / "out", truncate_embeddings=True)
    assert written(tmp_path / "out")[HEAD].shape[0] == len(BASE)
    assert read(tmp_path / "out", "config.json")["vocab_size"] == len(CHAT)
    assert any("cut to the first 23 rows" in text for text in artefact.warnings)
    with pytest.raises(smelt.UsageError, match="truncate_embeddings has no effect beside a tokenizer section"):
        smelt.plan(recipe("linear", paths, tokenizer_source="union"), truncate_embeddings=True)


# --- the same bits, and what is told ------------------------------------------------------------------


def test_neither_threads_nor_runs_change_a_bit(tmp_path: Path) -> None:
    paths = [make(tmp_path / str(i), tokens, i) for i, tokens in enumerate((BASE, CHAT[::-1]))]
    tree = recipe("linear", paths, tokenizer={"source": "union", "pad_to_multiple_of": 64})
    for threads in (1, 3):
        smelt.merge(tree, tmp_path / f"out{threads}", threads=threads, card=False)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / f"out{n}").iterdir()} for n in (1, 3))
    assert first == second


def test_inputs_have_the_same_digest_however_their_rows_are_read(tmp_path: Path) -> None:
    base, chat = make(tmp_path / "a", BASE, 0), make(tmp_path / "b", CHAT[::-1], 1)
    smelt.merge(recipe("linear", [base, chat], tokenizer_source="union"), tmp_path / "both")
    smelt.merge(recipe("linear", [chat]), tmp_path / "alone")
    both, alone = (read(tmp_path / name, "smelt-manifest.json")["inputs"] for name in ("both", "alone"))
    assert both[1] == alone[0]


def test_a_dry_run_tells_where_new_rows_come_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [make(tmp_path / name, tokens, i) for i, (name, tokens) in enumerate([("ours", BASE), ("chat", CHAT)])]
    tree = recipe("linear", paths, tokenizer={"source": "union", "tokens": {"<z>": {"source": {"kind": "zero"}}}})
    (tmp_path / "recipe.yml").write_text(json.dumps(tree))
    assert main(["merge", str(tmp_path / "recipe.yml"), "--dry-run"]) == 0
    assert "26 tokens in 26 rows" in capsys.readouterr().out
    assert main(["merge", str(tmp_path / "recipe.yml"), "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["vocabulary"]
    origins = {tuple(origin["tokens"]): origin["models"] for origin in facts["origins"]}
    assert origins[("<|im_start|>", "<|im_end|>")] == {paths[0]: paths[1], paths[1]: "its own"}
    assert origins[("<z>",)] == {paths[0]: "zero", paths[1]: "zero"}


def test_many_rows_in_tiles_of_any_width(tmp_path: Path) -> None:
    """Rows that a tile cuts in two, of two dtypes, in any order: the same as indexing the whole."""
    from smelt.engine.gather import GatheredOperand
    from smelt.engine.operands import CheckpointOperand
    from smelt.tokenizer import RowMap

    random = np.random.default_rng(0)
    first = random.standard_normal((50, 7)).astype(np.float32)
    second = random.standard_normal((30, 7)).astype(ml_dtypes.bfloat16)
    lenders = {i: CheckpointOperand(smelt.load({"x": array}), "x") for i, array in enumerate((first, second))}
    lender = random.choice([0, 1, -1, -2, -3], 80)
    rows = np.where(lender == 1, random.integers(0, 30, 80), random.integers(0, 50, 80))
    rows = np.where(lender == -3, 0, rows)
    operand = GatheredOperand("m", "x", lenders, RowMap(lender, rows, (((0, 3), (1, 4)),)), "F32")
    whole = np.zeros((80, 7), np.float32)
    whole[lender == 0], whole[lender == 1] = first[rows[lender == 0]], second[rows[lender == 1]].astype(np.float32)
    whole[lender == -3] = (first[3].astype(np.float64) + second[4].astype(np.float64)) / 2
    whole[lender == -2] = whole[lender != -2].mean(axis=0, dtype=np.float64)
    for step in (1, 3, 7, 100, 560):
        got = np.empty(560, np.float32)
        for start in range(0, 560, step):
            operand.read(start, got[start : start + step])
        np.testing.assert_array_equal(got.reshape(80, 7), whole)


def test_a_stage_lends_its_tokens_before_it_is_run(tmp_path: Path) -> None:
    """The second document is planned on what the first one will write."""
    paths = [make(tmp_path / str(i), tokens, i) for i, tokens in enumerate((BASE, CHAT, [*BASE, "<third>"]))]
    first = recipe("linear", paths[:2], tokenizer_source="union", name="both")
    second = recipe("linear", ["both", paths[2]], tokenizer={"source": "union", "tokens": {"w4": {"source": "both"}}})
    (tmp_path / "recipe.yml").write_text(f"{json.dumps(first)}\n---\n{json.dumps(second)}\n")
    smelt.merge(tmp_path / "recipe.yml", tmp_path / "out")
    assert sorted(ids(tmp_path / "out").items(), key=lambda item: item[1])[-3:] == [
        ("<|im_start|>", 23), ("<|im_end|>", 24), ("<third>", 25),
    ]  # fmt: skip


def test_statistics_of_rows_that_move_are_refused(tmp_path: Path) -> None:
    """They are by the model's own tokens; used as they are they would weigh others."""
    from safetensors.numpy import save_file

    paths = [make(tmp_path / str(i), tokens, i) for i, tokens in enumerate((BASE, BASE[::-1]))]
    tree = recipe("fisher", paths, tokenizer_source="base", parameters={"exclude": [".*layers.*", ".*norm.*"]})
    for index, entry in enumerate(tree["models"]):
        fisher = {f"fisher/{name}": abs(array) for name, array in written(Path(paths[index])).items()}
        save_file(fisher, tmp_path / f"fisher{index}.safetensors")
        entry["statistics"] = str(tmp_path / f"fisher{index}.safetensors")
    with pytest.raises(smelt.InputRejected, match="statistics are not aligned by token"):
        smelt.plan(tree)


def test_bare_tensors_have_no_tokens(tmp_path: Path) -> None:
    path = make(tmp_path / "model", BASE, 0)
    with pytest.raises(smelt.UsageError, match="tokenizer_source has no meaning for bare tensors"):
        smelt.plan(recipe("linear", [path], tokenizer_source="base"), raw=True)
