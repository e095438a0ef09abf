"""The faults that mutation testing puts into the code."""

from __future__ import annotations

import ast

import pytest

from tests.mutants.__main__ import drawn, equivalent
from tests.mutants.groups import GROUPS
from tests.mutants.operators import mutants
from tests.mutants.trials import PACKAGE, ROOT


def said(source: str, **options: bool) -> list[str]:
    return [str(mutant).partition(": f: ")[2].partition(", in ")[0] for mutant in mutants("m.py", source, **options)]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return a < b", ["a < b -> a <= b"]),
        ("return a + b", ["a + b -> a - b"]),
        ("return a and b", ["a and b -> a or b"]),
        ("return not a", ["not a -> a"]),
        ("return a[1]", ["1 -> 2"]),
        ("return True", ["True -> False"]),
        ("g(a, b)", ["g(a, b) -> pass", "g(a, b) -> g(b, a)"]),
        ("return min(a, b)", []),
        ("raise E(a < b)", ["raise E(a < b) -> pass"]),
        ("a += b", ["a += b -> pass", "a += b -> a -= b"]),
        ("if a: return b", ["if a: -> if not a:"]),
        ("return [x for x in a if x]", ["for x in a if x -> for x in a if not x"]),
        ("'text'\n    x: int | None = a", []),
        ("if TYPE_CHECKING: g(a, b)", []),
    ],
)
def test_one_small_fault_at_a_time(body: str, expected: list[str]) -> None:
    assert said(f"def f(a, b):\n    {body}") == expected


def test_generated_text_is_code_too() -> None:
    source = 'def f(n):\n    return f"x{n} = y1 + 2 >> n"'
    assert said(source) == []
    found = [mutant.text() for mutant in mutants("m.py", source, generates=True)]
    assert [text.partition("= ")[2].rstrip("\"'") for text in found] == ["y1 - 2 >> n", "y1 + 3 >> n", "y1 + 2 << n"]


def test_a_mutant_says_where_it_is() -> None:
    (mutant,) = mutants("m.py", "class A:\n    def f(self):\n        with g(x=1):\n            return 2\n")[:1]
    assert str(mutant) == "m.py: A.f: 1 -> 2, in with g(x=1):"


def test_a_mutant_is_the_module_with_one_change() -> None:
    source = "def f(a):\n    if a > 0:\n        return a - 1\n    return g(a, 2)"
    whole, texts = ast.unparse(ast.parse(source)), [mutant.text() for mutant in mutants("m.py", source)]
    assert len({*texts, whole}) == len(texts) + 1
    assert all(
        sum(old != new for old, new in zip(whole.split("\n"), text.split("\n"), strict=True)) == 1 for text in texts
    )
    assert ast.unparse(mutants("m.py", source)[0].tree) == whole, "and is put back"


def test_the_same_seed_draws_the_same_ones() -> None:
    def names(**options: int) -> list[str]:
        return [str(mutant) for mutant in drawn("writer", **options)]

    assert names(seed=1, skip=0, sample=20) == [*names(seed=1, skip=0, sample=5), *names(seed=1, skip=5, sample=15)]
    assert names(seed=1, skip=0, sample=20) != names(seed=2, skip=0, sample=20)


def test_the_lists_speak_of_what_there_is() -> None:
    sources = {module: (ROOT / PACKAGE / module).read_text() for group in GROUPS.values() for module in group}
    known = {str(mutant) for module, source in sources.items() for mutant in mutants(module, source)}
    assert equivalent() - known == set(), "in equivalent.txt, but no longer a mutant"
    tests = {name for group in GROUPS.values() for names in group.values() for name in names}
    assert [name for name in sorted(tests) if not (ROOT / "tests" / name).exists()] == []
