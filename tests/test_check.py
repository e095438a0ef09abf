"""What ``smelt check`` concludes, on models whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelt import InputRejected, UsageError, check
from smelt.cli import main
from smelt.diagnosis import Diagnosis
from smelt.diagnosis.sampling import Sampling
from smelt.diagnosis.vectors import TaskVectors
from tests.small_models import CONFIG, TOKENS, Arrays, bf16, fine_tuned, llama, save

BASE = llama(0)
EMBEDDING = "model.embed_tokens.weight"


def codes(diagnosis: Diagnosis, severity: str | None = None) -> list[tuple[str, tuple[str, ...]]]:
    return [(f.code, f.models) for f in diagnosis.findings if severity in (None, f.severity)]


# --- backbones and bases --------------------------------------------------------------------------------


def test_fine_tunes_of_one_base_are_mergeable() -> None:
    diagnosis = check([fine_tuned(BASE, 1), fine_tuned(BASE, 2)], BASE)
    assert diagnosis.mergeable
    assert diagnosis.findings == ()
    assert diagnosis.base == "base"
    assert diagnosis.models == ("model 0", "model 1")


def test_a_network_trained_apart_is_refused() -> None:
    diagnosis = check([fine_tuned(BASE, 1), llama(5)], BASE)
    assert not diagnosis.mergeable
    assert codes(diagnosis, "error") == [("different-backbone", ("model 1", "base"))]
    assert diagnosis.advice is None


def test_the_base_among_the_models_is_found() -> None:
    diagnosis = check([fine_tuned(BASE, 1), fine_tuned(BASE, 2), BASE, fine_tuned(BASE, 3)])
    assert diagnosis.base == "model 2"
    assert diagnosis.models == ("model 0", "model 1", "model 3")
    assert codes(diagnosis) == [("likely-base", ("model 2",))]
    assert diagnosis.candidates[0].label == "model 2"


def test_siblings_without_their_base_are_not_taken_for_it() -> None:
    diagnosis = check([fine_tuned(BASE, seed) for seed in (1, 2, 3)])
    assert diagnosis.base is None
    assert [code for code, _ in codes(diagnosis)] == ["no-base"]
    assert diagnosis.mergeable
    assert diagnosis.overall is None
    assert diagnosis.advice is not None
    assert diagnosis.advice.method == "linear"


def test_a_better_base_than_the_one_given_is_pointed_out() -> None:
    diagnosis = check([BASE, fine_tuned(BASE, 1), fine_tuned(BASE, 2)], fine_tuned(BASE, 3))
    assert codes(diagnosis) == [("better-base", ("model 0", "base"))]


def test_a_base_that_is_a_stranger_is_replaced_by_one_of_the_models() -> None:
    diagnosis = check([fine_tuned(BASE, 1), BASE, fine_tuned(BASE, 2)], llama(5))
    assert codes(diagnosis, "error") == [("different-backbone", (f"model {i}", "base")) for i in range(3)]
    assert codes(diagnosis, "warning") == [("better-base", ("model 1", "base"))]


def test_a_stranger_among_the_models_does_not_make_a_base() -> None:
    diagnosis = check([BASE, fine_tuned(BASE, 1), llama(5)])
    assert codes(diagnosis) == [("different-backbone", ("model 2", "model 0"))]
    assert diagnosis.candidates == ()


def test_duplicates_and_the_base_itself_are_left_out_of_the_recipe() -> None:
    one, two = fine_tuned(BASE, 1), fine_tuned(BASE, 2)
    diagnosis = check([one, dict(one), BASE, two], BASE)
    assert codes(diagnosis, "warning") == [("zero-delta", ("model 2", "base")), ("duplicate", ("model 0", "model 1"))]
    assert diagnosis.advice is not None
    assert "model 1" not in diagnosis.advice.recipe
    assert "model 2" not in diagnosis.advice.recipe
    assert "model 3" in diagnosis.advice.recipe


def test_one_model_needs_a_base() -> None:
    with pytest.raises(UsageError, match="at least two"):
        check([BASE])
    assert check([fine_tuned(BASE, 1)], BASE).mergeable


# --- task vectors ---------------------------------------------------------------------------------------


def exact(base: Arrays, model: Arrays) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.concatenate([(model[name] - base[name]).ravel() for name in sorted(base)]).astype(np.float64)


def test_sizes_are_those_of_the_whole_task_vector() -> None:
    model = fine_tuned(BASE, 1)
    name = "model.layers.0.mlp.up_proj.weight"
    model[name] = BASE[name]
    diagnosis = check([model], BASE)
    assert diagnosis.overall is not None
    (row,) = diagnosis.overall.models
    delta = np.abs(exact(BASE, model))
    norm = np.linalg.norm(np.concatenate([array.ravel() for array in BASE.values()]).astype(np.float64))
    assert row.ratio == pytest.approx(np.linalg.norm(delta) / norm, rel=1e-6)
    assert row.p50 == pytest.approx(np.quantile(delta, 0.5, method="inverted_cdf"), rel=0.009)
    assert row.p99 == pytest.approx(np.quantile(delta, 0.99, method="inverted_cdf"), rel=0.009)
    assert row.largest == delta.max()
    assert row.zeros == pytest.approx((delta == 0).mean())
    assert diagnosis.share_read == 1
    assert diagnosis.tensors == len(BASE)


def test_layers_come_in_order_of_depth(tmp_path: Path) -> None:
    base = save(tmp_path / "base", bf16(BASE))
    model = save(tmp_path / "model", bf16(fine_tuned(BASE, 1)))
    diagnosis = check([model], base)
    assert [row.layer for row in diagnosis.layers] == ["embedding", "0", "1", "norm", "head"]


def test_opposite_task_vectors_conflict_everywhere() -> None:
    there = fine_tuned(BASE, 1)
    back = {name: (2 * BASE[name].astype(np.float64) - array).astype(np.float32) for name, array in there.items()}
    diagnosis = check([there, back], BASE)
    assert diagnosis.overall is not None
    (pair,) = diagnosis.overall.pairs
    assert pair.cosine == pytest.approx(-1, abs=1e-3)
    assert pair.conflict == pytest.approx(1, abs=1e-3)
    assert codes(diagnosis) == [("opposed", ("model 0", "model 1"))]
    assert diagnosis.advice is not None
    assert diagnosis.advice.method == "ties"


def test_independent_task_vectors_conflict_by_half() -> None:
    diagnosis = check([fine_tuned(BASE, 1), fine_tuned(BASE, 2)], BASE)
    assert diagnosis.overall is not None
    (pair,) = diagnosis.overall.pairs
    assert pair.cosine == pytest.approx(0, abs=0.02)
    assert pair.conflict == pytest.approx(0.5, abs=0.02)


def test_the_same_direction_is_averaged() -> None:
    one = fine_tuned(BASE, 1)
    diagnosis = check([one, fine_tuned(one, 2, 0.0002)], BASE)
    assert diagnosis.overall is not None
    assert diagnosis.overall.pairs[0].cosine > 0.9
    assert diagnosis.advice is not None
    assert diagnosis.advice.method == "linear"


def test_continued_pre_training_is_recognised_by_its_size() -> None:
    """99 % of |delta| above DARE's limit, with weights large enough to still share the backbone."""
    base = {name: array * np.float32(5) for name, array in BASE.items()}
    diagnosis = check([fine_tuned(base, 1, 0.01), fine_tuned(base, 2, 0.001)], base)
    assert codes(diagnosis) == [("large-delta", ("model 0",))]
    assert "10 %" in diagnosis.findings[0].message
    assert diagnosis.advice is not None
    assert not any(method.startswith("dare") for method, _ in diagnosis.advice.alternatives)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_counted(value: float) -> None:
    model = fine_tuned(BASE, 1)
    model["model.norm.weight"][3] = value
    diagnosis = check([model], BASE)
    assert codes(diagnosis, "error") == [("nonfinite", ("model 0",))]
    assert diagnosis.findings[0].facts["elements"] == 1
    assert diagnosis.overall is not None
    assert np.isfinite(diagnosis.overall.models[0].ratio)


def test_a_zero_task_vector_has_no_cosine() -> None:
    facts = check([BASE, fine_tuned(BASE, 1)], BASE).as_dict()
    (pair,) = facts["overall"]["pairs"]
    assert np.isnan(pair["cosine"])
    assert facts["overall"]["models"][0]["p99"] == 0


# --- what the models hold -------------------------------------------------------------------------------


def test_missing_and_extra_tensors_are_errors() -> None:
    lacking = fine_tuned(BASE, 1)
    del lacking["lm_head.weight"]
    richer = {**fine_tuned(BASE, 2), "value_head.weight": np.ones((1, 64), np.float32)}
    diagnosis = check([lacking, richer], BASE)
    assert codes(diagnosis, "error") == [("missing-tensors", ("model 0",)), ("extra-tensors", ("model 1",))]
    assert [finding.facts["tensors"] for finding in diagnosis.findings] == [["lm_head.weight"], ["value_head.weight"]]


def test_without_a_base_the_majority_tells_what_is_missing() -> None:
    odd = fine_tuned(BASE, 3)
    odd["odd.weight"] = odd.pop("lm_head.weight")
    diagnosis = check([fine_tuned(BASE, 1), fine_tuned(BASE, 2), odd])
    assert codes(diagnosis, "error") == [("missing-tensors", ("model 2",)), ("extra-tensors", ("model 2",))]


def test_a_larger_vocabulary_shows_in_the_rows() -> None:
    larger = {**fine_tuned(BASE, 1), **{n: llama(0, vocabulary=98)[n] for n in ("lm_head.weight", EMBEDDING)}}
    (found,) = check([larger], BASE).findings
    assert (found.severity, found.code) == ("error", "vocabulary-rows-differ")
    assert found.facts["tensors"] == ["lm_head.weight", EMBEDDING]
    assert "[98, 64]" in found.message
    assert "[96, 64]" in found.message


def test_other_widths_are_said_once() -> None:
    wider = {name: np.pad(array, [(0, 1)] * array.ndim) for name, array in BASE.items()}
    diagnosis = check([wider], BASE)
    assert ("shapes-differ", ("base", "model 0")) in codes(diagnosis, "error")
    assert diagnosis.overall is None


def test_integers_against_floats_are_an_error_and_precision_a_note() -> None:
    model: dict[str, Any] = bf16(fine_tuned(BASE, 1))
    model["model.norm.weight"] = np.ones(64, np.int64)
    diagnosis = check([model], BASE)
    assert codes(diagnosis, "error") == [("dtype-kinds-differ", ("base", "model 0"))]
    assert codes(diagnosis, "note") == [("dtypes-differ", ("base", "model 0"))]


@pytest.mark.parametrize(
    ("change", "severity"),
    [
        ({"model_type": "mistral"}, "error"),
        ({"num_key_value_heads": 4}, "error"),
        ({"num_attention_heads": 8}, "error"),
        ({"tie_word_embeddings": True}, "error"),
        ({"rope_theta": 500000.0}, "warning"),
        ({"rms_norm_eps": 1e-6}, "warning"),
        ({"hidden_act": "gelu"}, "warning"),
        ({"bos_token_id": 7}, None),
    ],
)
def test_configs_are_compared(tmp_path: Path, change: dict[str, Any], severity: str | None) -> None:
    base = save(tmp_path / "base", BASE)
    model = save(tmp_path / "model", fine_tuned(BASE, 1), config={**CONFIG, **change})
    found = [finding for finding in check([model], base).findings if finding.code == "config-differs"]
    assert {finding.severity for finding in found} == ({severity} if severity else set())


# --- vocabularies ---------------------------------------------------------------------------------------


def with_tokens(tmp_path: Path, tokens: list[str], added: list[dict[str, Any]] | None = None) -> Diagnosis:
    base = save(tmp_path / "base", BASE, tokens=TOKENS)
    model = save(tmp_path / "model", fine_tuned(BASE, 1), tokens=tokens)
    if added is not None:
        path = tmp_path / "model" / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens": added}))
    return check([model], base)


def test_equal_vocabularies_are_not_mentioned(tmp_path: Path) -> None:
    assert with_tokens(tmp_path, TOKENS).findings == ()


def test_other_tokens_for_equal_ids_are_an_error(tmp_path: Path) -> None:
    (found,) = with_tokens(tmp_path, [TOKENS[1], TOKENS[0], *TOKENS[2:]]).findings
    assert (found.severity, found.code, found.facts["ids"]) == ("error", "tokens-differ", 2)
    assert found.facts["examples"][0] == [0, "token0", "token1"]


def test_renamed_special_tokens_are_a_warning(tmp_path: Path) -> None:
    (found,) = with_tokens(tmp_path, TOKENS, [{"id": 95, "content": "<|im_end|>", "special": True}]).findings
    assert (found.severity, found.code, found.facts["ids"]) == ("warning", "special-tokens-differ", 1)


def test_more_tokens_are_a_warning(tmp_path: Path) -> None:
    (found,) = with_tokens(tmp_path, [*TOKENS, "new"]).findings
    assert (found.severity, found.code) == ("warning", "vocabulary-sizes-differ")


def test_a_list_of_scored_tokens_is_a_vocabulary(tmp_path: Path) -> None:
    paths = [save(tmp_path / name, BASE if name == "base" else fine_tuned(BASE, 1)) for name in ("base", "model")]
    for path, first in zip(paths, ("a", "b"), strict=True):
        tree = {"model": {"type": "Unigram", "vocab": [[first, 0.0], ["c", -1.5]]}}
        (Path(path) / "tokenizer.json").write_text(json.dumps(tree))
    assert codes(check(paths[1:], paths[0])) == [("tokens-differ", (paths[0], paths[1]))]


def test_a_tokenizer_of_an_unknown_layout_is_said(tmp_path: Path) -> None:
    base = save(tmp_path / "base", BASE, tokens=TOKENS)
    model = save(tmp_path / "model", fine_tuned(BASE, 1))
    (tmp_path / "model" / "tokenizer.json").write_text("[]")
    assert codes(check([model], base)) == [("tokenizer-unreadable", (model,))]


# --- sampling -------------------------------------------------------------------------------------------


@given(count=st.integers(0, 3_000_000), share=st.floats(0.001, 1), most=st.none() | st.integers(1 << 14, 1 << 20))
def test_runs_lie_inside_and_never_overlap(count: int, share: float, most: int | None) -> None:
    sampling = Sampling(share, most)
    runs = sampling.runs(count)
    ends = [start + length for start, length in runs]
    assert all(length > 0 for _, length in runs)
    assert all(end <= start for end, (start, _) in zip(ends, runs[1:], strict=False))
    assert not runs or (runs[0][0] == 0 and ends[-1] <= count)
    assert sampling.elements(count) == sum(length for _, length in runs)
    if share == 1 and most is None:
        assert sampling.elements(count) == count


def test_a_sample_estimates_the_whole() -> None:
    random = np.random.default_rng(0)
    base = {"w": random.standard_normal((1000, 1000)).astype(np.float32)}
    models = [fine_tuned(base, seed, 0.01) for seed in (1, 2)]
    full, part = check(models, base, sample="full"), check(models, base, sample=0.1)
    assert part.share_read == pytest.approx(0.1, abs=0.01)
    assert full.overall is not None
    assert part.overall is not None
    for whole, sampled in zip(full.overall.models, part.overall.models, strict=True):
        assert sampled.ratio == pytest.approx(whole.ratio, rel=0.02)
        assert sampled.p99 == pytest.approx(whole.p99, rel=0.03)


@pytest.mark.parametrize("sample", ["most", 0, -0.5, 1.5])
def test_a_sample_that_makes_no_sense_is_refused(sample: Any) -> None:
    with pytest.raises(UsageError, match="sample must be"):
        check([fine_tuned(BASE, 1)], BASE, sample=sample)


def test_large_models_are_sampled_by_themselves() -> None:
    from smelt.checkpoint import TensorInfo

    def elements(tensors: int) -> int:
        infos = [TensorInfo(f"t{index}", "BF16", (1 << 10, 1 << 12)) for index in range(tensors)]
        sampling = Sampling.of("auto", infos)
        return sum(sampling.elements(info.count) for info in infos)

    assert elements(2) == 2 << 22
    assert (1 << 22) < elements(200) <= 1 << 24


@given(st.data())
def test_sums_of_parts_are_the_sum_of_the_whole(data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    rows = [random.standard_normal(40).astype(np.float32) for _ in range(3)]
    cut = data.draw(st.integers(0, 40))
    whole, parts = TaskVectors.none(2), TaskVectors.none(2)
    whole.add_elements(rows)
    for piece in (slice(0, cut), slice(cut, 40)):
        part = TaskVectors.none(2)
        part.add_elements([row[piece] for row in rows])
        parts.add(part)
    for name in ("elements", "read", "largest", "magnitudes", "conflicts", "overlaps"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    np.testing.assert_allclose(parts.products, whole.products, rtol=1e-12)


# --- advice and the command -----------------------------------------------------------------------------


@pytest.mark.parametrize("models", [1, 2, 3, 5])
def test_the_recipe_is_one_that_smelt_reads(tmp_path: Path, models: int) -> None:
    from smelt.recipe import parse

    base = save(tmp_path / "base", bf16(BASE))
    paths = [save(tmp_path / f"m{seed}", bf16(fine_tuned(BASE, seed + 1))) for seed in range(models)]
    advice = check(paths, base).advice
    assert advice is not None
    (recipe,) = parse(advice.recipe)
    assert recipe.method == advice.method
    assert advice.reasons
    assert "bfloat16" in advice.recipe
    assert all(path in advice.recipe for path in [base, *paths])


def test_an_unequal_pair_is_told_about() -> None:
    advice = check([fine_tuned(BASE, 1, 0.0001), fine_tuned(BASE, 2, 0.001)], BASE).advice
    assert advice is not None
    assert any("dominate" in reason for reason in advice.reasons)


def test_the_command_prints_tables_and_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tmp_path / "base", bf16(BASE))
    models = [save(tmp_path / f"m{seed}", bf16(fine_tuned(BASE, seed))) for seed in (1, 2)]
    assert main(["check", *models, "--base", base]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "sign conflicts" in captured.out
    assert "100.0% of the weights read" in captured.out
    assert "merge_method: task_arithmetic" in captured.out


def test_the_command_exits_3_when_a_merge_is_forbidden(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tmp_path / "base", bf16(BASE))
    stranger = save(tmp_path / "stranger", bf16(llama(7)))
    assert main(["check", stranger, "--base", base, "--json"]) == 3
    facts = json.loads(capsys.readouterr().out)
    assert facts["mergeable"] is False
    assert facts["findings"][0]["code"] == "different-backbone"
    assert facts["advice"] is None


def test_json_has_every_number_and_no_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tmp_path / "base", bf16(BASE))
    models = [base, save(tmp_path / "m", bf16(fine_tuned(BASE, 1)))]
    assert main(["check", *models, "--base", base, "--full", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["share_read"] == 1
    assert facts["overall"]["pairs"][0]["cosine"] is None
    assert set(facts["overall"]["models"][0]) == {"model", "ratio", "p50", "p99", "largest", "zeros"}
    assert len(facts["layers"]) == 5


def test_a_missing_model_exits_3_and_names_its_neighbour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tmp_path / "base", bf16(BASE))
    assert main(["check", base, str(tmp_path / "bsae")]) == 3
    assert "did you mean 'base'?" in capsys.readouterr().err


def test_every_model_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputRejected) as caught:
        check([str(tmp_path / "a"), str(tmp_path / "b")])
    assert len(caught.value.problems) == 2
