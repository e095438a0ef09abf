"""One formula, three backends, the same bits: Numba = numpy = torch over dtypes, shapes and specials."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.errors import OperationFailed
from smelt.kernels import native, random
from smelt.kernels.arrays import apply
from smelt.kernels.dtypes import DTYPES, narrowed
from smelt.kernels.generate import generate, precision_of
from smelt.kernels.launch import run_count, run_equal, run_magnitudes, run_map, run_sums
from smelt.kernels.program import Call, Draw, Each, Mask, Step, call
from smelt.kernels.source import source_of
from smelt.kernels.vocabulary import maximum, minimum, sign, sqrt, where
from smelt.methods.election import ties_mean
from smelt.methods.tensors import delta

SPECIALS = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 6e-8, 65504.0, 65520.0, 3.4e38, 1e-38]


class Memory:
    """An operand over an array of stored bits."""

    def __init__(self, stored: Any, dtype: str) -> None:
        self.stored, self.dtype, self.shape, self.count = stored, dtype, stored.shape, stored.size

    def read(self, start: int, out: Any) -> None:
        out[:] = self.stored[start : start + len(out)]

    def values(self) -> Any:
        return DTYPES[self.dtype].as_values(self.stored)


def operand(values: Any, dtype: str) -> Memory:
    with np.errstate(all="ignore"):
        typed = np.asarray(values, np.float64).astype(DTYPES[dtype].values)
    return Memory(DTYPES[dtype].as_storage(typed), dtype)


def compiled(call: Call, dtype: str, start: int = 0) -> Any:
    out = np.empty(call.count, DTYPES[dtype].storage)
    run_map(call, dtype, lambda operand: operand.stored, start, out)
    return out


def by_arrays(call: Call, dtype: str, backend: str) -> Any:
    """The same call through ``arrays.apply``, rounded by the backend's own cast."""
    precision = precision_of(call)
    if backend == "numpy":
        convert = lambda o: o.values().astype(precision)  # noqa: E731
        mask = lambda m: m.operand.stored != 0  # noqa: E731
    else:
        torch = pytest.importorskip("torch")
        convert = lambda o: torch.from_numpy(o.values().astype(precision))  # noqa: E731
        mask = lambda m: torch.from_numpy(m.operand.stored != 0)  # noqa: E731

    def bind(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(bind(item) for item in value)
        if isinstance(value, bool | int | float):
            return value
        return mask(value) if isinstance(value, Mask) else convert(value)

    result = apply(call.formula, {name: bind(value) for name, value in call.arguments.items()})
    with np.errstate(all="ignore"):
        values = np.asarray(result)
        if dtype in ("BF16", "F16") and precision == "float64":
            values = narrowed(values)
        return DTYPES[dtype].as_storage(np.ascontiguousarray(values.astype(DTYPES[dtype].values)))


def same_bits(a: Any, b: Any, dtype: str) -> bool:
    """Equal bits, all NaN being one."""
    x, y = DTYPES[dtype].as_values(a), DTYPES[dtype].as_values(b)
    with np.errstate(all="ignore"):
        nan = (x != x) & (y != y)
    return bool(
        ((a == b) if a.dtype.kind == "u" else (a.view(f"u{a.itemsize}") == b.view(f"u{b.itemsize}")))[~nan].all()
    )


def everything(a: Any, b: Any, c: Any, w: Any) -> Any:
    """Every word of the vocabulary but the square root in one formula."""
    total = 0
    for x, weight in zip((a, b, c), w):  # noqa: B905
        total += weight * sign(x) * abs(x)
    inner = maximum(minimum(a, b), c) - 0.1 * total
    return where((inner > 0) & (a != b), inner / (1 + abs(b)), where(c <= b, a - c, 0.25))


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("code", "out"),
    [
        ("BF16", "BF16"),
        ("BF16", "F32"),
        ("F16", "F16"),
        ("F32", "BF16"),
        ("F32", "F32"),
        ("F64", "F16"),
        ("F64", "F64"),
    ],
)
def test_compiled_equals_arrays(code: str, out: str, backend: str) -> None:
    rng = np.random.default_rng(1)
    grid = [np.concatenate([np.repeat(SPECIALS, 14), rng.normal(0, 1, 301)]) for _ in range(3)]
    grid[1][:196] = np.tile(SPECIALS, 14)
    grid[2][:196] = rng.permutation(grid[2][:196])
    a, b, c = (operand(values, code) for values in grid)
    work = call(everything, a=a, b=b, c=c, w=(0.3, -0.7, 1.1))
    assert same_bits(compiled(work, out), by_arrays(work, out, backend), out)


def root(x: Any) -> Any:
    return sqrt(abs(x))


@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
def test_square_roots_are_correctly_rounded(code: str) -> None:
    values = operand(np.abs(np.random.default_rng(3).normal(0, 1, 20_000)), code)
    work = call(root, x=values)
    assert same_bits(compiled(work, "F32"), by_arrays(work, "F32", "torch"), "F32")
    assert same_bits(compiled(work, "F32"), np.sqrt(values.values().astype(np.float32)), "F32")


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.tuples(*[st.floats(width=32)] * 4), min_size=1, max_size=40),
    codes=st.sampled_from([("BF16",) * 4, ("F32",) * 4, ("F32", "BF16", "F16", "F32")]),
    thresholds=st.tuples(*[st.floats(0, 2, width=32)] * 3),
    weights=st.tuples(*[st.floats(-2, 2, width=32)] * 3),
)
def test_ties_is_the_same_formula_everywhere(values: Any, codes: Any, thresholds: Any, weights: Any) -> None:
    columns = np.array(values, np.float64).T
    base, *models = (operand(column, code) for column, code in zip(columns, codes, strict=True))
    work = call(
        ties_mean, base=base, models=tuple(models), kept=(True,) * 3, thresholds=thresholds,
        centers=(0.0,) * 3, limits=(1.5, 0.5, float("inf")), factors=weights, weights=weights, fallback=1.0, scale=0.7,
    )  # fmt: skip
    result = compiled(work, "F32")
    assert same_bits(result, by_arrays(work, "F32", "numpy"), "F32")
    assert same_bits(result, by_arrays(work, "F32", "torch"), "F32")


@pytest.mark.parametrize("code", ["BF16", "F16"])
def test_every_sixteen_bit_value_loads_exactly_and_stores_back(code: str) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    everything = Memory(bits, code)
    back = compiled(call(identity, x=everything), code)
    assert same_bits(back, bits, code)
    widened = compiled(call(identity, x=everything), "F32")
    with np.errstate(all="ignore"):
        assert same_bits(widened, DTYPES[code].as_values(bits).astype(np.float32), "F32")


def identity(x: Any) -> Any:
    return x


@pytest.mark.parametrize(("code", "reference"), [("BF16", ml_dtypes.bfloat16), ("F16", np.float16)])
def test_stores_round_to_nearest_even(code: str, reference: Any) -> None:
    rng = np.random.default_rng(2)
    patterns = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    halves = (np.arange(65536, dtype=np.uint32) << 16) | 0x8000
    values = np.concatenate([patterns, halves, halves + 1, halves - 1]).view(np.float32)
    stored = compiled(call(identity, x=Memory(values, "F32")), code)
    with np.errstate(all="ignore"):
        assert same_bits(stored, values.astype(reference).view(np.uint16), code)


def test_double_to_half_rounds_once() -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(0, 1, 100_000) * 10.0 ** rng.integers(-9, 6, 100_000)
    halfway = np.arange(1, 2000) * 2.0**-11 + 1.0 + 2.0**-40
    values = np.concatenate([values, halfway, -halfway])
    stored = compiled(call(identity, x=Memory(values, "F64")), "F16")
    with np.errstate(all="ignore"):
        assert same_bits(stored, values.astype(np.float16).view(np.uint16), "F16")
        assert same_bits(narrowed(values).astype(np.float16).view(np.uint16), stored, "F16")


def test_literals_never_widen_to_double() -> None:
    source = source_of(everything)
    assert set(source.constants.values()) == {0.0, 1.0, -1.0, 0.1, 0.25} - {-1.0} | {1.0}
    assert "0.1" not in source.text


def divides_by_literal(x: Any) -> Any:
    return x / 3


def uses_power(x: Any) -> Any:
    return x**2


def uses_exp(x: Any) -> Any:
    return np.exp(x)


@pytest.mark.parametrize("formula", [divides_by_literal, uses_power, uses_exp])
def test_what_is_not_in_the_vocabulary_is_refused(formula: Any) -> None:
    with pytest.raises(TypeError):
        source_of(formula)


def keep(x: Any, kept: Any) -> Any:
    return where(kept, x, 0)


def test_draws_are_the_same_in_every_backend_and_for_every_split() -> None:
    torch = pytest.importorskip("torch")
    count, key = 5000, random.key_of(7, "model.layers.0.mlp.up_proj.weight", 1)
    ones = operand(np.ones(count), "F32")
    whole = compiled(call(keep, x=ones, kept=Draw(key, 0.3)), "F32")
    words = random.words(key, 0, count)
    threshold = random.threshold_of(0.3)
    assert (whole == (words >= threshold)).all()
    assert (random.words(key, 0, count, like=torch.empty(0)).numpy() == words).all()
    for cut in (1, 1023, 1024, 1025, 3000):
        tail = operand(np.ones(count - cut), "F32")
        assert (compiled(call(keep, x=tail, kept=Draw(key, 0.3)), "F32", start=cut) == whole[cut:]).all()


def test_each_element_may_have_its_own_density() -> None:
    torch = pytest.importorskip("torch")
    count, key = 5000, random.key_of(7, "w", 1)
    own = np.random.default_rng(0).random(count).astype(np.float32)
    own[:2000] = np.repeat([0.0, 1.0], 1000)
    words = random.words(key, 0, count)
    kept = random.drawn(words, own)
    assert (kept == (words >= (1 - own.astype(np.float64)) * 2.0**32)).all()
    assert (random.drawn(random.words(key, 0, count, torch.empty(0)), torch.from_numpy(own)).numpy() == kept).all()
    assert not kept[:1000].any()
    assert kept[1000:2000].all()
    for cut in (0, 1, 1025, 3000):
        ones, density = operand(np.ones(count - cut), "F32"), Memory(own[cut:], "F32")
        assert (compiled(call(keep, x=ones, kept=Draw(key, density)), "F32", start=cut) == kept[cut:]).all()


def test_kept_share_and_independence() -> None:
    n = 1_000_000
    masks = [
        random.words(random.key_of(0, name, i), 0, n) >= random.threshold_of(0.25) for name in "ab" for i in (0, 1)
    ]
    for mask in masks:
        assert abs(mask.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / n)
    for i, first in enumerate(masks):
        for second in masks[i + 1 :]:
            assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(n)


@pytest.mark.parametrize("density", [1.0, 0.5, 1e-9])
def test_threshold_of_is_monotone_and_bounded(density: float) -> None:
    assert 0 <= random.threshold_of(density) < 2**32


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1])
def test_densities_outside_the_range_are_refused(density: float) -> None:
    with pytest.raises(ValueError, match="density"):
        random.threshold_of(density)


def scaled(x: Any, factor: Any) -> Any:
    return factor * x


def test_steps_change_a_value_at_the_cut() -> None:
    ones = operand(np.ones(3000), "F32")
    result = compiled(call(scaled, x=ones, factor=Step(2.0, 3.0, 1500)), "F32")
    assert (result[:1500] == 2).all()
    assert (result[1500:] == 3).all()


def pair(a: Any, b: Any) -> Any:
    return (a, b)


@given(n=st.integers(1, 20000), seed=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_sums_match_exact_sums_and_ignore_strips(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(0, 1, (2, n)).astype(np.float32)
    work = call(pair, a=Memory(x, "F32"), b=Memory(y, "F32"))
    blocks = run_sums(work, lambda operand: operand.stored, 0, n, 2, products=True)
    totals = blocks.sum(axis=0)
    wanted = [np.float64(x) @ np.float64(x), np.float64(x) @ np.float64(y), np.float64(y) @ np.float64(y)]
    assert np.allclose(totals, wanted, rtol=1e-12, atol=1e-9)


def test_each_gives_one_number_per_operand() -> None:
    """The same sums as a formula that is written for so many operands, whatever they are stored in."""
    base, *models = (operand(np.random.default_rng(seed).normal(0, 1, 9000), "F32") for seed in range(3))
    models.append(operand(models[0].stored, "BF16"))
    one_by_one = call(delta, base=base, model=Each(models))
    together = call(three_deltas, base=base, models=tuple(models))
    for products in (True, False):
        first, second = (
            run_sums(work, lambda operand: operand.stored, 0, 9000, 3, products=products)
            for work in (one_by_one, together)
        )
        assert np.array_equal(first, second)


def three_deltas(base: Any, models: Any) -> Any:
    return (models[0] - base, models[1] - base, models[2] - base)


# --- what decides the bits ------------------------------------------------------------------------------


def folded(numbers: Any) -> float:
    """The sum of a block as the module of sums describes it."""
    padded = np.zeros(4096)
    padded[: len(numbers)] = numbers
    a, b, c, d = padded.reshape(4, 1024)
    found = (a + b) + (c + d)
    while len(found) > 1:
        found = found[: len(found) // 2] + found[len(found) // 2 :]
    return float(found[0])


@pytest.mark.parametrize("count", [1, 4095, 4096, 4097, 10_000])
def test_sums_are_taken_in_the_documented_order(count: int) -> None:
    x, y = np.random.default_rng(count).normal(0, 1, (2, count)).astype(np.float32) * np.float32(1e3)
    work = call(pair, a=Memory(x, "F32"), b=Memory(y, "F32"))
    wide = [column.astype(np.float64) for column in (x, y)]
    for products, columns in ((False, wide), (True, [wide[0] * wide[0], wide[0] * wide[1], wide[1] * wide[1]])):
        blocks = run_sums(work, lambda operand: operand.stored, 0, count, 2, products=products)
        starts = range(0, count, 4096)
        assert blocks.tolist() == [[folded(column[at : at + 4096]) for column in columns] for at in starts]


def test_a_step_splits_sums_where_the_value_changes() -> None:
    ones = operand(np.ones(9000), "F32")
    for cut, expected in ((0, [4096, 4096, 808]), (100, [50, 4096, 4096, 708]), (9000, [2048, 2048, 404])):
        work = call(scaled_pair, x=ones, factor=Step(0.5, 1.0, cut))
        blocks = run_sums(work, lambda operand: operand.stored, 0, 9000, 1, products=False)
        assert blocks.tolist() == [[number] for number in expected]


def scaled_pair(x: Any, factor: Any) -> Any:
    return (factor * x,)


def test_random_words_are_those_of_philox() -> None:
    """The known answer of the authors' library for counter 0 and key 0, and our numbering of counters."""
    first = random.words((0, 0), 0, 1024)
    assert [hex(word) for word in first[::256]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    key = (0xA4093822, 0x299F31D0)
    whole = random.words(key, 0, 5120)
    for start, count in ((0, 1), (1023, 2), (1024, 1024), (2500, 2500), (5119, 1)):
        assert (random.words(key, start, count) == whole[start : start + count]).all()
    assert len(set(whole.tolist())) > 5110
    for counter in (0, 3, 255, 256, 700, 1023):
        places = [counter // 256 * 1024 + counter % 256 + 256 * word for word in range(4)]
        assert whole[places].tolist() == philox(counter, key)


def philox(counter: int, key: tuple[int, int]) -> list[int]:
    """Philox 4x32-10 as in the paper, on plain integers."""
    x, (k0, k1) = [counter, 0, 0, 0], key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(p1 >> 32) ^ x[1] ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ x[3] ^ k1, p0 & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x


def test_the_key_of_a_draw_is_a_hash_of_seed_model_and_tensor() -> None:
    digest = hashlib.blake2b(b"7\x002\x00name", digest_size=8, person=b"smelt-draw").digest()
    assert random.key_of(7, "name", 2) == struct.unpack("<II", digest)


@pytest.mark.parametrize(
    ("density", "threshold"), [(1.0, 0), (0.25, 3 << 30), (0.5, 1 << 31), (1e-12, (1 << 32) - 1), (1 - 2**-32, 1)]
)
def test_thresholds_of_densities(density: float, threshold: int) -> None:
    assert random.threshold_of(density) == threshold
    words = np.array([0, max(0, threshold - 1), threshold, (1 << 32) - 1], np.uint32)
    assert random.drawn(words, density).tolist() == (words >= threshold).tolist()


@pytest.mark.parametrize("code", ["BF16", "F16", "F32", "F64"])
def test_what_is_not_finite_is_reported(code: str) -> None:
    """1 for an input, 2 for an output; wherever it is."""
    for values, expected in (([1.0, 6e4, -0.0], 0), ([1.0, np.nan], 3), ([-np.inf, 1.0], 3)):
        out = np.empty(len(values), DTYPES[code].storage)
        assert run_map(call(identity, x=operand(values, code)), code, lambda o: o.stored, 0, out) == expected
    hidden = call(keep, x=operand([np.nan, 1.0], code), kept=Mask(Memory(np.array([0, 1], np.uint8), "U8")))
    assert run_map(hidden, code, lambda o: o.stored, 0, np.empty(2, DTYPES[code].storage)) == 1
    huge = call(inverse, x=operand([0.0, 1.0], code))
    assert run_map(huge, code, lambda o: o.stored, 0, np.empty(2, DTYPES[code].storage)) == 2


def inverse(x: Any) -> Any:
    return 1 / abs(x)


def test_magnitudes_are_counted_where_they_lie() -> None:
    values = np.array([0.0, -0.0, 1.0, -1.0, 1.5, 2.0, -3.0, 100.0], np.float32)
    many = np.resize(values, 3000)
    bits = np.abs(many).view(np.uint32).astype(np.int64)
    work = call(identity, x=Memory(many, "F32"))
    assert run_magnitudes(work, lambda o: o.stored, 0, 3000).tolist() == bits.tolist()
    low, width = int(np.float32(1).view(np.uint32)), 20
    counts = np.zeros(20, np.uint32)
    below = run_count(work, lambda o: o.stored, 0, 3000, low, width, counts)
    inside = bits[(bits >= low) & (bits < low + (20 << width))]
    assert below == int((bits < low).sum())
    assert counts.tolist() == np.bincount((inside - low) >> width, minlength=20).tolist()
    assert 0 < counts.sum() < 3000 - below, "some lie above"
    equal = run_equal(work, lambda o: o.stored, 0, 3000, low)
    assert equal.tolist() == [int((bits[at : at + 1024] == low).sum()) for at in (0, 1024, 2048)]


# --- formulas as text -----------------------------------------------------------------------------------


def adds_up(x: Any) -> Any:
    total = x
    total += 2
    return total


def uses_true(x: Any) -> Any:
    return where(x > 0, where(True, x, 0), x)


def test_a_formula_changes_no_operand() -> None:
    x = np.ones(3, np.float32)
    assert apply(adds_up, {"x": x}).tolist() == [3, 3, 3]
    assert x.tolist() == [1, 1, 1]
    assert "where(True, x, " in source_of(uses_true).text


def test_closures_and_what_is_no_function_are_refused() -> None:
    outside = 3.0

    def closes(x: Any) -> Any:
        return x * outside

    with pytest.raises(TypeError, match="closes is a closure"):
        source_of(closes)
    with pytest.raises(TypeError, match=r"uses 'np', which is not in the vocabulary"):
        source_of(uses_exp)
    with pytest.raises(TypeError, match="at least one floating array"):
        apply(identity, {"x": np.zeros(3, np.int64)})


# --- compiled code on disk ------------------------------------------------------------------------------


def once_only(x: Any) -> Any:
    return 3 * x - 1


def test_compiled_code_is_kept_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_cache_folder", lambda: tmp_path)
    made = generate("map", once_only, (("x", "F32"),), "float32", "F32")
    x, out = np.arange(3, dtype=np.float32), np.empty(3, np.float32)

    def values() -> list[float]:
        assert native.load(made)(0, out, x) == (0, 0)
        return out.tolist()

    assert values() == [-1, 2, 5]
    (path,) = tmp_path.iterdir()
    monkeypatch.setattr(native, "_compile", None)
    assert values() == [-1, 2, 5], "from the file"
    content = path.read_bytes()
    head, _, code = content.partition(b"\n")
    facts = json.loads(head)
    wrong = {**facts, "sha256": "0" * 64}
    for damaged in (content[:-1], content[:-1] + b"x", code, b"[]\n" + code, json.dumps(wrong).encode() + b"\n" + code,
                    b"{}\n" + code):  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises(OperationFailed, match=r"is damaged: remove it, it will be made again"):
            native.load(made)


def test_the_name_of_compiled_code_depends_on_all_that_decides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = generate("map", once_only, (("x", "F32"),), "float32", "F32")
    others = [replace(made, **{field: ()}) for field in ("parameters", "scratch")] + [replace(made, text="")]
    names = {native._name_of(each) for each in (made, *others)}
    assert len(names) == 3 + bool(made.scratch)
    monkeypatch.setattr(native, "_environment", lambda: "another machine")
    assert native._name_of(made) not in names


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smelt.storage.cache_folder", lambda part: None)
    folder = native._cache_folder.__wrapped__()
    assert folder.is_dir()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
