"""Tokenizer transplantation: what stays bit by bit, what is recovered, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import smelt
from smelt.cli import main
from smelt.transplant.options import METHODS
from smelt.transplant.pursuit import Pursuit
from smelt.transplant.rows import APPROXIMATIONS

Arrays = dict[str, Any]
WORDS = [f"w{index}" for index in range(40)]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
EMBED, HEAD, OTHER = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def save(
    folder: Path, tokens: list[str], arrays: Arrays, special: Mapping[str, str] = SPECIAL, kind: str = "", **config: Any
) -> Path:
    """A model on disk whose tokens have the ids of their order. ``kind``: its pre-tokenizer's type."""
    from safetensors.numpy import save_file

    folder.mkdir()
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(tokens), **config}))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "decoder": None, "added_tokens": [], "pre_tokenizer": {"type": kind or "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": tokens[0]},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def model(folder: Path, tokens: list[str], width: int = 12, seed: int = 1, **config: Any) -> Path:
    """One with embedding, head and another matrix of random bfloat16 numbers."""
    arrays = {EMBED: normal(len(tokens), width, seed=seed), HEAD: normal(len(tokens), width, seed=seed + 1)}
    arrays[OTHER] = normal(6, width, seed=seed + 2)
    return save(folder, tokens, {n: a.astype(ml_dtypes.bfloat16) for n, a in arrays.items()}, **config)


def transplanted(own: Path, donor: Path, out: Path, **options: Any) -> Arrays:
    smelt.transplant_tokenizer(own, donor, out, **options)
    assert smelt.verify(out).ok
    with smelt.load(out) as checkpoint:
        return dict(checkpoint)


def read(folder: Path) -> Arrays:
    with smelt.load(folder) as checkpoint:
        return dict(checkpoint)


def test_the_same_tokenizer_changes_no_bit(tmp_path: Path) -> None:
    own = model(tmp_path / "a", ["<s>", "</s>", *WORDS])
    result = transplanted(own, own, tmp_path / "out")
    assert all(result[name].tobytes() == array.tobytes() for name, array in read(own).items())


def test_shared_rows_and_other_tensors_stay_bit_by_bit(tmp_path: Path) -> None:
    own = model(tmp_path / "a", ["<s>", "</s>", *WORDS])
    donor = model(tmp_path / "b", ["</s>", "x", *WORDS[::-2], "<s>"], width=7, seed=9)
    result, before = transplanted(own, donor, tmp_path / "out", k=3), read(own)
    assert result[OTHER].tobytes() == before[OTHER].tobytes()
    for row, token in enumerate(WORDS[::-2], 2):
        assert result[EMBED][row].tobytes() == before[EMBED][2 + WORDS.index(token)].tobytes()
    assert result[HEAD][0].tobytes() == before[HEAD][1].tobytes(), "</s> by its role"
    assert result[HEAD].shape == (23, 12)


def test_sparse_combinations_are_recovered(tmp_path: Path) -> None:
    """Where the donor's space is a linear image of the model's, pursuit finds what the model would have had."""
    shared, image = normal(len(WORDS), 16), normal(16, 24, seed=5)
    picks = np.zeros((5, len(WORDS)), np.float32)
    for row in picks:
        row[np.random.default_rng(int(row.sum())).choice(len(WORDS), 2, replace=False)] = (1.5, -2)
    orthogonal = np.linalg.qr(image.T)[0].T  # so that inner products, which pursuit goes by, stay as they are
    new = [f"n{index}" for index in range(5)]
    own = save(tmp_path / "a", WORDS, {EMBED: shared}, {})
    donor = save(tmp_path / "b", [*new, *WORDS], {EMBED: np.concatenate([picks @ shared, shared]) @ orthogonal}, {})
    result = transplanted(own, donor, tmp_path / "out", k=10)
    assert result[EMBED][:5] == pytest.approx(picks @ shared, abs=1e-4)


def test_pursuit_is_that_of_the_paper() -> None:
    """Against the definition: residuals, least squares over all atoms so far, k times."""
    atoms, targets = normal(200, 20), normal(30, 20, seed=1)
    for target, (chosen, weights) in zip(targets, Pursuit(atoms)(targets, 6), strict=True):
        wanted: list[int] = []
        residual = target.astype(np.float64)
        for _ in range(6):
            wanted.append(int(np.abs(atoms @ residual).argmax()))
            fitted = np.linalg.lstsq(atoms[wanted].T.astype(np.float64), target, rcond=None)[0]
            residual = target - fitted @ atoms[wanted]
        assert chosen.tolist() == wanted
        assert weights == pytest.approx(fitted, rel=1e-5, abs=1e-7)


def test_pursuit_ends_where_nothing_is_left() -> None:
    """More steps than dimensions, atoms twice, and a target of zeros."""
    atoms = np.concatenate([np.eye(3, 5), np.eye(3, 5)]).astype(np.float32)
    found = Pursuit(atoms)(np.array([[1, 2, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 7]], np.float32), 6)
    assert [chosen.tolist() for chosen, _ in found] == [[1, 0], [], []]
    assert found[0][1].tolist() == [2, 1]


@pytest.mark.parametrize("method", METHODS)
def test_results_do_not_depend_on_threads(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smelt.transplant.matrices._PIECE", 4)
    own = model(tmp_path / "a", ["<s>", "</s>", *WORDS])
    donor = model(tmp_path / "b", ["<s>", *WORDS[:20], *(f"n{i} w{i}" for i in range(15))], seed=9)
    one, four = (transplanted(own, donor, tmp_path / str(n), method=method, threads=n, seed=3) for n in (1, 4))
    assert all(one[name].tobytes() == four[name].tobytes() for name in one)
    assert np.isfinite(one[EMBED].astype(np.float32)).all()


def test_every_method_is_named() -> None:
    assert tuple(APPROXIMATIONS) == METHODS


def test_simple_methods(tmp_path: Path) -> None:
    own = model(tmp_path / "a", ["<s>", "</s>", *WORDS])
    donor = model(tmp_path / "b", ["<s>", "new"], seed=9)
    before = read(own)[EMBED].astype(np.float64)
    rows = {
        method: transplanted(own, donor, tmp_path / method, method=method)[EMBED][1].astype(np.float64)
        for method in ("mean", "zero", "john_hewitt", "randn")
    }
    assert rows["mean"] == pytest.approx(before.mean(axis=0), rel=0.01)
    assert not rows["zero"].any()
    assert np.abs(rows["john_hewitt"]).max() < 5
    halved = transplanted(own, donor, tmp_path / "half", method="mean", new_vocab_scale=0.5)[EMBED][1]
    assert halved.astype(np.float64) == pytest.approx(before.mean(axis=0) / 2, rel=0.01)
    noisy = transplanted(own, donor, tmp_path / "noise", method="zero", new_vocab_noise=1e-3)[EMBED][1]
    assert 0 < np.abs(noisy.astype(np.float64)).max() < 1e-2


def test_pieces_of_words(tmp_path: Path) -> None:
    """The last piece counts most in the embedding, the first in the head."""
    own = model(tmp_path / "a", ["<s>", *WORDS])
    donor = model(tmp_path / "b", ["<s>", "w1 w2 w3"], seed=9)
    result = transplanted(own, donor, tmp_path / "ends", method="subword", subword_method="first_last")
    before = read(own)
    assert (result[EMBED][1] == before[EMBED][4]).all()
    assert (result[HEAD][1] == before[HEAD][2]).all()
    result = transplanted(own, donor, tmp_path / "weighted", method="subword", subword_method="weighted_mean")
    pieces = before[EMBED][2:5].astype(np.float64)
    assert result[EMBED][1].astype(np.float64) == pytest.approx(np.array([1, 2, 3]) @ pieces / 6, rel=0.02, abs=0.01)


# --- matching -------------------------------------------------------------------------------------------


def test_words_are_known_by_their_beginning(tmp_path: Path) -> None:
    """The marks of two families mean the same; with bytes, letters beyond ASCII are the same as well."""
    own = model(tmp_path / "a", ["▁hello", "hello", "▁é"], kind="Metaspace", special={})
    donor = model(tmp_path / "b", ["Ġhello", "hello", "ĠÃ©"], kind="ByteLevel", special={}, seed=9)
    before = read(own)[EMBED]
    by_mark = transplanted(own, donor, tmp_path / "m", method="zero")[EMBED]
    assert (by_mark[:2] == before[:2]).all()
    assert not by_mark[2].any()
    assert (transplanted(own, donor, tmp_path / "b2", method="zero", match="bytes")[EMBED] == before).all()


def test_similar_tokens_in_one_matrix_only(tmp_path: Path) -> None:
    """Each option acts on the matrix that it names."""
    own = model(tmp_path / "a", ["<0x41>", "ab", "b"], special={})
    donor = model(tmp_path / "b", ["A", "abc"], special={}, seed=9)
    before = read(own)
    result = transplanted(own, donor, tmp_path / "o", method="zero", byte_match="embed", prefix_match="lm_head")
    assert (result[EMBED][0] == before[EMBED][0]).all()
    assert not result[EMBED][1].any()
    assert (result[HEAD][1] == before[HEAD][1]).all()
    assert not result[HEAD][0].any()


def test_untrained_rows_are_approximated(tmp_path: Path) -> None:
    tokens = ["<s>", *WORDS]
    own, donor = model(tmp_path / "a", tokens), model(tmp_path / "b", tokens, seed=9)
    shortest = int(np.linalg.norm(read(own)[EMBED].astype(np.float64), axis=1).argmin())
    result, before = transplanted(own, donor, tmp_path / "o", method="mean", magikarp=True)[EMBED], read(own)[EMBED]
    assert [row for row in range(len(tokens)) if (result[row] != before[row]).any()] == [shortest]


def test_rows_and_ids_that_do_not_fit(tmp_path: Path) -> None:
    """Tokens beyond either matrix, rows beyond either vocabulary, and padding."""
    own = save(tmp_path / "a", ["a", "b", "c"], {EMBED: normal(2, 4)}, {})
    donor = save(tmp_path / "b", ["b", "c", "a", "d"], {EMBED: normal(3, 4, seed=9)}, {})
    result = transplanted(own, donor, tmp_path / "o", method="mean", pad_to_multiple_of=3)[EMBED]
    before = read(own)[EMBED]
    assert (result[0] == before[1]).all()
    assert (result[2] == before[0]).all()
    assert result[1] == pytest.approx(before.mean(axis=0)), "c has no row in the model"
    assert not result[3].any(), "d has no row in the donor"
    assert result.shape == (6, 4)
    assert result[5] == pytest.approx(result[:4].mean(axis=0))


# --- what goes with it ----------------------------------------------------------------------------------


def test_the_tokenizer_and_its_ids_are_the_donors(tmp_path: Path) -> None:
    own = model(tmp_path / "a", ["<s>", "</s>", *WORDS], bos_token_id=0, eos_token_id=1, pad_token_id=5)
    (own / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "temperature": 0.6}))
    donor = model(tmp_path / "b", ["</s>", "<s>", *WORDS, "123"], seed=9, bos_token_id=1, eos_token_id=[0, 7])
    artifact = smelt.transplant_tokenizer(own, donor, tmp_path / "out", method="mean")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [written[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")] == [
        43,
        1,
        [0, 7],
        None,
    ]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 7]
    assert generation["temperature"] == 0.6
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (donor / "tokenizer.json").read_bytes()
    assert "bos_token_id was 0 and is 1" in artifact.warnings
    assert any("numbers are cut differently" in warning for warning in artifact.warnings)


def test_tied_matrices_stay_one(tmp_path: Path) -> None:
    """A tied model without a head gets none; one that stores it twice keeps it the same."""
    own = save(tmp_path / "a", ["a", "b"], {EMBED: normal(2, 4)}, tie_word_embeddings=True)
    donor = model(tmp_path / "b", ["b", "c"], seed=9)
    assert HEAD not in transplanted(own, donor, tmp_path / "o", method="mean")
    matrix = normal(2, 4)
    twice = save(tmp_path / "c", ["a", "b"], {EMBED: matrix, HEAD: matrix}, tie_word_embeddings=True)
    result = transplanted(twice, donor, tmp_path / "p", method="omp", k=1)
    assert (result[HEAD] == result[EMBED]).all()


def test_the_bias_of_the_head(tmp_path: Path) -> None:
    arrays = {EMBED: normal(3, 4), HEAD: normal(3, 4, seed=1), "lm_head.bias": np.array([1, 2, 3], np.float32)}
    own = save(tmp_path / "a", ["a", "b", "c"], arrays, {})
    donor = model(tmp_path / "b", ["c", "x", "a"], seed=9, special={})
    assert transplanted(own, donor, tmp_path / "o")["lm_head.bias"].tolist() == [3, 0, 1]


# --- mistakes -------------------------------------------------------------------------------------------

MISTAKES: dict[str, dict[str, Any]] = {
    "method 'ompp' is not known; did you mean 'omp'?": {"method": "ompp"},
    "k has no effect with the method mean: it belongs to omp and common_interpolation": {"method": "mean", "k": 3},
    "subword_method has no effect with the method omp": {"subword_method": "sum"},
    "k must be at least 1, not 0": {"k": 0},
    "pad_to_multiple_of must be at least 1, not 0": {"pad_to_multiple_of": 0},
    "new_vocab_noise must be 0 or more, not -1": {"new_vocab_noise": -1},
    "byte_match has no effect when all tokens are matched by their bytes": {"match": "bytes", "byte_match": "yes"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told(message: str, tmp_path: Path) -> None:
    own = model(tmp_path / "a", WORDS)
    with pytest.raises(smelt.UsageError) as caught:
        smelt.transplant_tokenizer(own, own, tmp_path / "out", **MISTAKES[message])
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_used(tmp_path: Path) -> None:
    own, strange = model(tmp_path / "a", ["a", "b"], special={}), model(tmp_path / "b", ["x", "y"], special={})
    with pytest.raises(smelt.InputRejected, match="share no token: use the method subword"):
        smelt.transplant_tokenizer(own, strange, tmp_path / "out")
    (strange / "tokenizer.json").unlink()
    with pytest.raises(smelt.InputRejected, match=r"no tokenizer.json: save its tokenizer in this form"):
        smelt.transplant_tokenizer(own, strange, tmp_path / "out")
    broken = save(tmp_path / "c", ["a"], {EMBED: np.full((1, 4), np.nan, np.float32)}, {})
    with pytest.raises(smelt.OperationFailed, match=f"tensor {EMBED!r} holds NaN or Inf"):
        smelt.transplant_tokenizer(broken, own, tmp_path / "out")
    (own / "tokenizer.json").write_text('{"model": {"vocab": 3}}')
    with pytest.raises(smelt.InputRejected, match=r"tokenizer\.json is not a tokenizer of a known layout"):
        smelt.transplant_tokenizer(broken, own, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_settings_that_are_none_are_refused(tmp_path: Path) -> None:
    own, donor = model(tmp_path / "a", WORDS), model(tmp_path / "b", WORDS, seed=9)
    (own / "generation_config.json").write_text("{")
    with pytest.raises(smelt.InputRejected, match=r"generation_config.json is not valid JSON"):
        smelt.transplant_tokenizer(own, donor, tmp_path / "out", method="mean")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = model(tmp_path / "a", ["<s>", *WORDS])
    donor = model(tmp_path / "b", ["<s>", "new", *WORDS[:9]], seed=9)
    out = tmp_path / "out"
    assert main(["tokenizer", "transplant", str(own), str(donor), str(out), "-k", "4"]) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(out)
    assert "10 rows of shared tokens, 0 of similar ones, 1 approximated, 0 empty" in told.err
    assert main(["verify", str(out)]) == 0
    assert (
        main(["tokenizer", "transplant", str(own), str(donor), str(tmp_path / "p"), "--method", "mean", "-k", "4"]) == 2
    )


def test_an_adapted_model_keeps_its_dtype(tmp_path: Path) -> None:
    """What is computed in float32 is written as its base has it."""
    from safetensors.numpy import save_file

    own = model(tmp_path / "a", ["<s>", "</s>", *WORDS])
    style = tmp_path / "style"
    style.mkdir()
    pairs: Arrays = {}
    for module, (rows, columns) in {OTHER: (6, 12), EMBED: (42, 12)}.items():
        kind = "lora_embedding_{}" if module == EMBED else "lora_{}.weight"
        a, b = (normal(2, columns), normal(rows, 2)) if module == OTHER else (normal(2, rows), normal(columns, 2))
        path = f"base_model.model.{module.removesuffix('.weight')}"
        pairs |= {f"{path}.{kind.format('A')}": a, f"{path}.{kind.format('B')}": b}
    save_file(pairs, style / "adapter_model.safetensors")
    (style / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1}))
    smelt.transplant_tokenizer(f"{own}+{style}", own, tmp_path / "out")
    smelt.merge({"merge_method": "passthrough", "models": [{"model": f"{own}+{style}"}]}, tmp_path / "merged")
    made, wanted = read(tmp_path / "out"), read(tmp_path / "merged")
    assert {array.dtype for array in made.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert all(made[name].tobytes() == wanted[name].tobytes() for name in wanted)
    assert smelt.verify(tmp_path / "out").ok
