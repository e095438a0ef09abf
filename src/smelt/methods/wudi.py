"""WUDI-Merging: the task vector whose differences from all others are orthogonal to what these learnt from.

Cheng et al., "Whoever started the interference should end it: guiding data-free model merging via task vectors", ICML
2025, https://arxiv.org/abs/2503.08099. The loss and its G and H: see :mod:`smelt.methods.interference`, here with
T_i = P_i = tau_i. Its minimum is W* = H G^+.

Flavours. ``wudi`` is the paper's: 300 steps of Adam from W_0 = sum_i tau_i, of 1e-5 each whatever the size of the task
vectors. The others, of the same authors' later code (github.com/WalkerWorldPeace/MLLMerging), take no steps: with the
eigenpairs (lambda_k, v_k) of G,

    W v_k = W_0 v_k + f_k (H v_k / lambda_k - W_0 v_k),

so that scaling all task vectors scales the result. f falls with lambda, as where descent is stopped early:

- ``iwudi``: ``filter_type`` exponential, f = 1 - exp(-lambda t).
- ``swudi``: the same on the largest eigenvalues only, a fixed share of them.
- ``aswudi``: f = 1 on the largest ones, as many as the spectrum itself suggests (``auto_rank_method``).

Directions that no task vector has keep W_0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..kernels.lapack import square
from ..kernels.program import Call, Copy, Source, Whole, call
from .descent import Matrix, adam, momentum_share
from .effective_rank import LEVELS, RULES, Directions
from .interference import (
    Spectrum,
    Term,
    linear_weight,
    moved,
    quadratic,
    slope,
    spectrum_of,
    squared_norm,
    task_vector,
    total_of,
)
from .low_rank import holds_core, is_low_rank, is_unchanged, merged_in_core
from .registry import EXCLUDE, LAMBDA, Citation, Method, Parameter
from .task_arithmetic import add_task_vectors
from .task_matrices import at_most, held_in_strips, in_many_strips, of_sources, spans, task_strips
from .tensors import Tensor

Options = Mapping[str, Any]
Squares = Callable[[], tuple[Matrix, Matrix]]


def merge(tensor: Tensor) -> Call | Copy | Whole:
    assert tensor.base is not None
    if tensor["lambda"] == 0 or is_unchanged(tensor):
        return Copy(tensor.base)
    if tensor.ranks:
        shape = tensor.shape[0], prod(tensor.shape[1:])
        solved = partial(merged_in_core, function=partial(solved_in_core, options=tensor.shared, shape=shape))
        return Whole(solved, {"base": tensor.base, "changes": tensor.changes}, strips=True)
    if _solved(tensor):
        tall = tensor.shape[0] >= prod(tensor.shape[1:]) and tensor["optimizer"] == "none"
        function = partial(solved_tall if tall else solved_wide, options=tensor.shared)
        return Whole(function, {"base": tensor.base, "models": tensor.models}, strips=True)
    if tensor["other"] == "base":
        return Copy(tensor.base)
    weights = (1 / tensor.size,) * tensor.size
    return call(add_task_vectors, base=tensor.base, models=tensor.models, weights=weights, scale=tensor["lambda"])


def _solved(tensor: Tensor) -> bool:
    """Whether the loss is solved for this tensor."""
    if tensor["scope"] == "linear":
        return linear_weight(tensor)
    many = len(tensor.shape) > 2 and tensor["flatten"]
    return (len(tensor.shape) == 2 or many) and (tensor.role is None or tensor.role.role != "head")


# --- wide matrices, and descent: all but the models is held -----------------------------------------------


def solved_wide(base: Source, models: tuple[Source, ...], options: Options) -> Iterator[Matrix]:
    """theta_0 + lambda W for a matrix (out, in) or what is flattened to one; in fp64."""
    changes = _TaskVectors(base.shape, len(models), lambda: _task_vectors(base, models))
    solved = merged_vector(changes, base.shape, options)
    solved *= options["lambda"]
    solved += base.rows(0, len(solved))
    yield solved


def solved_in_core(base: Matrix, models: tuple[Matrix, ...], options: Options, shape: tuple[int, int]) -> Matrix:
    """lambda W of what matrices of ``shape`` are in core space, where the base is 0."""
    changes = _TaskVectors(models[0].shape, len(models), lambda: (model.copy() for model in models))
    return np.asarray(options["lambda"] * merged_vector(changes, shape, options))


class _TaskVectors(NamedTuple):
    """All tau_i, of this shape, as often as they are wanted."""

    shape: tuple[int, ...]
    models: int
    all: Callable[[], Iterator[Matrix]]


def merged_vector(changes: _TaskVectors, shape: tuple[int, int], options: Options) -> Matrix:
    """W (out, in); of all directions that matrices of ``shape`` can have some are kept."""
    rows, columns = changes.shape
    probes, terms = changes.models * rows, _terms(changes.all())
    if options["optimizer"] == "adam":
        start = _start(changes.all(), changes.models, options)
        way = adam(slope(terms, probes, start), start.shape, _rate(start, options), options["iter_num"])
        way += start
        return way
    form = quadratic(terms, probes, (rows, columns))
    spectrum, pull = form.spectrum(), form.pull
    del form
    start = _start(changes.all(), changes.models, options)

    def squares() -> tuple[Matrix, Matrix]:
        return _squares(pull @ spectrum.vectors), _squares(start @ spectrum.vectors)

    return moved(pull, start, spectrum, _shares(_rate(start, options), shape, spectrum, squares, options))


def _start(changes: Iterable[Matrix], models: int, options: Options) -> Matrix:
    """W_0, or rows of it, in the memory of the first task vector."""
    start = total_of(changes)
    start *= {"sum": 1.0, "mean": 1 / models, "zero": 0.0}[options["init"]]
    return start


def _task_vectors(base: Source, models: tuple[Source, ...]) -> Iterator[Matrix]:
    rows = base.shape[0]
    return (task_vector(base.rows(0, rows), model.rows(0, rows)) for model in models)


def _terms(changes: Iterator[Matrix]) -> Iterator[Term]:
    """One per model that changed this matrix."""
    for change in changes:
        if size := squared_norm(change):
            yield Term(1 / size, change, change)


# --- tall matrices: H and W are never held ----------------------------------------------------------------


def solved_tall(base: Source, models: tuple[Source, ...], options: Options) -> Iterator[Matrix]:
    """The same, of which Gram matrices alone are held."""
    deltas = [task_strips(base, model) for model in models]
    grams = [delta.gram() for delta in deltas]
    for gram in grams:
        gram *= 1 / (float(np.trace(gram)) or 1.0)
    spectrum = spectrum_of(total_of([square(base.shape[1]), *grams]))

    def rows() -> Iterator[tuple[Matrix, Matrix]]:
        for strips in zip(*(delta.parts() for delta in deltas), strict=True):
            pull = total_of(strip @ gram for strip, gram in zip(strips, grams, strict=True))
            yield pull, _start(strips, len(deltas), options)

    def squares() -> tuple[Matrix, Matrix]:
        found = [(_squares(pull @ spectrum.vectors), _squares(start @ spectrum.vectors)) for pull, start in rows()]
        return total_of(pull for pull, _ in found), total_of(start for _, start in found)

    shares = _shares(0.0, deltas[0].shape, spectrum, squares, options)
    for (first, last), (pull, start) in zip(spans(base.shape), rows(), strict=True):
        solved = moved(pull, start, spectrum, shares)
        solved *= options["lambda"]
        solved += base.rows(first, last)
        yield solved


def _squares(columns: Matrix) -> Matrix:
    """Squared norms."""
    return np.asarray(np.einsum("ij,ij->j", columns, columns))


def _rate(start: Matrix, options: Options) -> float:
    """The step: absolute, or in units of the start's root mean square."""
    if options["lr_relative"] is None:
        return float(options["lr"])
    return float(options["lr_relative"] * np.sqrt(squared_norm(start) / max(1, start.size)))


# --- how far along each direction -----------------------------------------------------------------------


def _shares(rate: float, shape: tuple[int, int], spectrum: Spectrum, squares: Squares, options: Options) -> Matrix:
    """f for each eigenvalue; ``squares`` finds |H v|^2 and |W_0 v|^2 of each vector, where a rule looks at them."""
    if options["optimizer"] == "sgd":
        return momentum_share(2 * spectrum.values, rate, options["momentum"], options["iter_num"])
    shares = FILTERS[options["filter_type"]](spectrum.values, options)
    shares[_rank(shape, spectrum, squares, options) :] = 0
    return shares


def _exponential(values: Matrix, options: Options) -> Matrix:
    ridge = values / (values + (options["tikhonov_alpha"] or 0.0))
    return np.asarray(ridge * -(np.expm1(-values * options["exp_time"]) ** options["filter_gamma"]))


def _landweber(values: Matrix, options: Options) -> Matrix:
    left = 1 - options["landweber_eta_ratio"] * values / values[0]
    return np.asarray(1 - left ** options["landweber_steps"])


def _tikhonov(values: Matrix, options: Options) -> Matrix:
    alpha = 0.01 if options["tikhonov_alpha"] is None else options["tikhonov_alpha"]
    return np.asarray(values / (values + alpha))


def _none(values: Matrix, options: Options) -> Matrix:
    return np.ones_like(values)


FILTERS: dict[str, Callable[[Matrix, Options], Matrix]] = {
    "none": _none, "exponential": _exponential, "landweber": _landweber, "tikhonov": _tikhonov,
}  # fmt: skip


def _rank(shape: tuple[int, int], spectrum: Spectrum, squares: Squares, options: Options) -> int:
    """How many of the largest eigenvalues are kept."""
    rule, columns, least = options["auto_rank_method"], shape[1], int(options["min_rank"])
    if rule == "none" or not len(spectrum.values):
        return int(columns)
    level = LEVELS.get(rule, 0.0) if options["rank_level"] is None else options["rank_level"]
    bound = max(least, round(options["max_rank_ratio"] * columns))
    found = max(least, min(RULES[rule](_directions(shape, spectrum, squares), level), bound))
    scaled = round(found * float(options["rank_scale"]))
    return int(max(least, min(columns, scaled)))


def _directions(shape: tuple[int, int], spectrum: Spectrum, squares: Squares) -> Directions:
    """All directions of the rows' space: those that no task vector has count 0."""
    free = np.zeros(shape[1] - len(spectrum.values))

    def all_squares() -> tuple[Matrix, Matrix]:
        pulls, starts = squares()
        return np.append(pulls, free), np.append(starts, free)

    return Directions(np.append(spectrum.values, free), shape, all_squares)


# --- the record -----------------------------------------------------------------------------------------


def holds(tensor: Tensor) -> tuple[int, int]:
    """In turns: G with its decomposition, and the work of descent or of the filter."""
    if not tensor.count or not _solved(tensor) or is_unchanged(tensor):
        return 1, 0
    if tensor.ranks:
        return holds_core(tensor)
    rows, columns, size = tensor.shape[0], prod(tensor.shape[1:]), tensor.size
    side = min(columns, size * rows)
    if tensor["optimizer"] == "adam":
        gram = 8 * size * tensor.count if 2 * size * rows < columns else 8.5 * columns * columns
        phases = 73 * tensor.count + gram / 2, 50 * tensor.count + gram
        return at_most(tensor, int(max(phases)) + of_sources(tensor))
    if rows >= columns and tensor["optimizer"] == "none":
        strips = 2 * size + 5.7 if in_many_strips(tensor) else size + 4.1
        return at_most(tensor, held_in_strips(tensor, 1, size + 3.2), held_in_strips(tensor, strips, size + 0.9))
    if size * rows < columns:
        apart = held_in_strips(tensor, 1 + size, 3.3, side), held_in_strips(tensor, 2 + 2 * size, 1.1, side)
        return at_most(tensor, *apart)
    return at_most(tensor, held_in_strips(tensor, 1, 3.8, side))


_CLOSED = ("aswudi", "iwudi", "swudi")
_RULED = tuple(rule for rule in RULES if rule != "none")

METHODS = (
    Method(
        name="wudi",
        title="WUDI-Merging",
        summary="the task vector that disturbs none of the others' inputs, by a quadratic form",
        advice="For several fine-tunes of one base, without data; the default has nothing to tune.",
        citation=Citation(
            "Whoever started the interference should end it: guiding data-free model merging via task vectors",
            "Cheng et al.", "ICML 2025", "https://arxiv.org/abs/2503.08099",
        ),
        merge=merge,
        holds=holds,
        low_rank=lambda tensor: is_low_rank(tensor, tensor["optimizer"] == "none" and _solved(tensor)),
        parameters=(
            LAMBDA,
            Parameter("scope", "str", "matrices", "what is solved: all matrices but the head, or those of attention "
                      "and feed-forward blocks", choices=("matrices", "linear")),
            Parameter("flatten", "bool", False, "solve tensors of three and more axes as (first axis, the rest)",
                      when=("scope", ("matrices",))),
            Parameter("other", "str", "mean", "what becomes of the other tensors: the mean, or the base's",
                      choices=("mean", "base")),
            Parameter("init", "str", "sum", "where the solution stands in directions that are not solved: W_0",
                      choices=("sum", "mean", "zero")),
            Parameter("filter_type", "str", "none", "how f falls with the eigenvalue", choices=tuple(FILTERS),
                      defaults=(("iwudi", "exponential"), ("swudi", "exponential")), when=("variant", _CLOSED)),
            Parameter("exp_time", "float", 300.0, "t of the exponential filter", low=0,
                      defaults=(("swudi", 1300.0),), when=("filter_type", ("exponential",))),
            Parameter("filter_gamma", "float", 1.0, "power of the exponential filter", low=0, open_low=True,
                      when=("filter_type", ("exponential",))),
            Parameter("tikhonov_alpha", "float", None, "a in the factor lambda / (lambda + a); default: 0.01 for the "
                      "Tikhonov filter, none for the exponential one", low=0,
                      when=("filter_type", ("tikhonov", "exponential"))),
            Parameter("landweber_steps", "int", 150, "steps of descent", low=0, when=("filter_type", ("landweber",))),
            Parameter("landweber_eta_ratio", "float", 0.9, "step times the largest eigenvalue", low=0, high=1,
                      when=("filter_type", ("landweber",))),
            Parameter("auto_rank_method", "str", "participation_sqrt", "how many eigenvalues are kept per matrix",
                      choices=tuple(RULES), defaults=(("iwudi", "none"), ("swudi", "ratio"), ("wudi", "none")),
                      when=("variant", _CLOSED)),
            Parameter("rank_level", "float", None, "the rule's number; default: "
                      + ", ".join(f"{rule} {level:g}" for rule, level in LEVELS.items()), low=0,
                      when=("auto_rank_method", tuple(LEVELS))),
            Parameter("rank_scale", "float", 1.0, "factor of the rank that is found", low=0, open_low=True,
                      when=("auto_rank_method", _RULED)),
            Parameter("min_rank", "int", 1, "least rank", low=0, when=("auto_rank_method", _RULED)),
            Parameter("max_rank_ratio", "float", 1.0, "greatest rank, as a share of the columns", low=0, high=1,
                      open_low=True, when=("auto_rank_method", _RULED)),
            Parameter("optimizer", "str", "none", "steps of descent instead of a filter",
                      choices=("none", "adam", "sgd"), defaults=(("wudi", "adam"),), when=("variant", ("wudi",))),
            Parameter("iter_num", "int", 300, "steps", low=0, when=("optimizer", ("adam", "sgd"))),
            Parameter("lr", "float", 1e-5, "size of a step", low=0, when=("optimizer", ("adam", "sgd"))),
            Parameter("lr_relative", "float", None, "size of a step over the root mean square of W_0, instead of lr",
                      low=0, when=("optimizer", ("adam", "sgd"))),
            Parameter("momentum", "float", 0.0, "of sgd", low=0, high=1, when=("optimizer", ("sgd",))),
            EXCLUDE,
        ),
        variants=("aswudi", "iwudi", "swudi", "wudi"),
    ),
)  # fmt: skip
