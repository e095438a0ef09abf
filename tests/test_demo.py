"""The parts of the demo that need no training: its text, its verdict and its page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from examples.demo import corpus, folder, page
from examples.demo.results import Kind, Result, Score, judge
from hypothesis import given
from hypothesis import strategies as st

from smelt.recipe import parse

VALUES = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
DOMAINS = [
    corpus.exercise_domain("roman", "Roman numerals", corpus.romans(), r"(?<=is) [A-Z]+\n", 50_000, 16),
    corpus.text_domain("names", "Unicode names", corpus.character_names(), 50_000, 16),
]


@given(st.integers(1, 3999))
def test_a_roman_numeral_reads_back_as_its_number(number: int) -> None:
    digits = [VALUES[letter] for letter in corpus.roman(number)]
    following = [*digits[1:], 0]
    assert sum(-d if d < after else d for d, after in zip(digits, following, strict=True)) == number


def test_no_held_out_exercise_is_trained_on() -> None:
    roman = DOMAINS[0]
    tested = {line for passage in roman.held_out for line in passage.splitlines()}
    assert tested
    assert tested.isdisjoint(roman.train.splitlines())


def test_no_held_out_document_is_trained_on() -> None:
    documents = [(f"document {number}", f"<{number}>" * 400) for number in range(100)]
    domain = corpus.text_domain("any", "Any", documents, 10**6, 64)
    learnt = set(re.findall(r"<\d+>", domain.train))
    tested = set(re.findall(r"<\d+>", "\n".join(domain.held_out)))
    assert learnt
    assert tested
    assert learnt.isdisjoint(tested)


def test_the_scored_part_of_an_exercise_is_its_answer() -> None:
    roman = DOMAINS[0]
    for passage in roman.held_out:
        answers = [match.group() for match in roman.scored.finditer(passage)]
        assert answers == [" " + line.split(" is ")[1] for line in passage.splitlines(keepends=True)]


def test_code_is_separated_from_its_docstrings() -> None:
    source = '"""Module."""\n\ndef f():\n    "Function."\n    return "no docstring"\n'
    assert [node.value for node in corpus.docstrings(source)] == ["Module.", "Function."]


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("This paragraph is a sentence of plain English words, long enough to be taken for running prose.", True),
        ("Too short.", False),
        ("| a | table | of | many | cells | is not | a sentence | however | long | it | may | be | at all |", False),
        ("x = [(1, 2), (3, 4)]; y = {k: v for k, v in x}; print(y[1] + y[3] * 2 ** 8 // 3 - (y[1] % 5) << 2)", False),
    ],
)
def test_prose_is_told_from_tables_and_code(block: str, expected: bool) -> None:
    assert corpus.is_prose(block) is expected


@given(st.text(max_size=200), st.integers(1, 50))
def test_cutting_loses_only_the_rest(text: str, size: int) -> None:
    pieces = corpus.cut(text, size)
    assert all(len(piece) == size for piece in pieces)
    assert "".join(pieces) == text[: len(text) // size * size]


def result(model: str, kind: Kind, loss: float, exact: float) -> Result:
    return Result(model, kind, {domain.name: Score(loss, exact) for domain in DOMAINS})


BASE = result("base", "base", 2.0, 0.3)
EXPERT = result("expert", "expert", 1.8, 0.4)


@pytest.mark.parametrize(
    ("loss", "exact", "holds"),
    [(1.7, 0.5, True), (1.8, 0.5, False), (1.7, 0.4, False), (1.9, 0.35, False)],
)
def test_the_verdict_asks_for_a_gain_on_both_measures(loss: float, exact: float, holds: bool) -> None:
    verdict = judge([BASE, EXPERT, result("worse", "merge", 3.0, 0.9), result("merge", "merge", loss, exact)])
    assert verdict.holds is holds
    assert ("NOT" in str(verdict)) is not holds


def diagnosis() -> dict[str, object]:
    model = {"model": "models/<a>", "ratio": 0.1, "p50": 1e-3, "p99": 1e-2}
    pair = {"a": "models/<a>", "b": "models/b", "cosine": 0.1, "conflict": 0.4}
    return {
        "findings": [{"severity": "warning", "message": "large <deltas>"}],
        "overall": {"models": [model], "pairs": [pair]},
        "advice": {"method": "ties", "reasons": ["signs conflict"]},
    }


def test_the_page_stands_alone_and_shows_every_model() -> None:
    results = [BASE, EXPERT, replace(EXPERT, model="<merge>", kind="merge")]
    html = page.render(results, DOMAINS, judge(results), diagnosis(), {"ties": "merge_method: <ties>"})
    assert not [word for word in ("http", "<script", "src=", "href=", "url(", "@import") if word in html]
    assert not [raw for raw in ("<merge>", "<a>", "<deltas>", "<ties>") if raw in html]
    assert html.count("&lt;merge&gt;") >= 3  # the table and both figures


def test_every_recipe_merges_models_that_the_demo_trains() -> None:
    trained = {f"models/{name}" for name in ("base", "code", "prose", "roman", "names")}
    paths = sorted(folder.RECIPES.glob("*.yml"))
    assert {path.stem for path in paths} == {"linear", "task_arithmetic", "ties", "dare_ties", "slerp"}
    for path in paths:
        [recipe] = parse(path.read_text(encoding="utf-8"), path.name)
        assert recipe.method == path.stem
        assert {model.model.path for model in recipe.models} <= trained


def listing(out: Path) -> Iterator[str]:
    return (path.relative_to(out).as_posix() for path in sorted(out.rglob("*")))


def test_trained_models_stay_and_old_merges_go(tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder.open_folder(out, fresh=False)
    (out / "models" / "base").mkdir()
    (out / "merges" / "ties").mkdir()
    folder.open_folder(out, fresh=False)
    assert {"models/base", "recipes/ties.yml"} <= set(listing(out))
    assert "merges/ties" not in set(listing(out))
    folder.open_folder(out, fresh=True)
    assert "models/base" not in set(listing(out))


def test_a_folder_of_someone_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(FileExistsError, match="--out"):
        folder.open_folder(tmp_path, fresh=True)
    assert list(listing(tmp_path)) == ["models"]
