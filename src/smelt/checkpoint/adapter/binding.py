"""From what an adapter says to steps on the tensors of a base, with every name found and every shape checked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np

from ...errors import InputRejected, show
from ..base import Checkpoint, TensorInfo
from .kohya import KIND, FlatNames, part_of, parts_without
from .layouts import Rename, experts_apart, has_transposed_experts, is_transposed_layer, renames
from .reading import Adapter
from .steps import (
    AddedEntries,
    AddedSigns,
    Floats,
    Multiply,
    NewRows,
    Norms,
    Offset,
    Outer,
    ProductOfTwo,
    Products,
    Step,
)
from .updates import (
    Dense,
    Entries,
    Hadamard,
    Kronecker,
    LowRank,
    Product,
    Rows,
    Saved,
    Scaled,
    Shards,
    Signs,
    Tucker,
    Update,
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """One step on one tensor: ``make`` reads what it needs. ``value``: it replaces the whole tensor instead.

    ``rank``: of the single product that it adds, where that is what it does.
    """

    make: Callable[[], Step] | None
    value: TensorInfo | None = None
    additive: bool = True
    rank: int | None = None


Changes = Mapping[str, list[Change]]


def bind(adapter: Adapter, base: Checkpoint) -> Changes:
    """What happens to which tensor of the base, in order. InputRejected with all that does not fit."""
    binder = _Binder(adapter, base)
    found: dict[str, list[Change]] = defaultdict(list)
    for update in binder.wanted():
        try:
            for name, change in binder.changes(update):
                found[name].append(change)
        except InputRejected as error:
            binder.problems += error.problems
    InputRejected.gather(dict.fromkeys(binder.problems))
    return dict(found)


def unused(adapter: Adapter, base: Checkpoint) -> list[str]:
    """What an adapter holds for parts of a pipeline that the base is not."""
    wanted = set(map(id, _Binder(adapter, base).wanted()))
    others = sorted({part_of(update.target) for update in adapter.updates if id(update) not in wanted})
    return [
        f"{adapter.label}: what it holds for {show(part)} is not used, the base has no such part" for part in others
    ]


class _Binder:
    def __init__(self, adapter: Adapter, base: Checkpoint) -> None:
        self._file, self._label, self._base = adapter.file, adapter.label, base
        self._shapes: dict[str, Shape] = {name: info.shape for name, info in base.tensors.items()}
        self._updates = adapter.updates
        self._rename: Rename = FlatNames(self._shapes) if adapter.kind == KIND else self._best_rename(adapter)
        self.problems: list[str] = []

    def _best_rename(self, adapter: Adapter) -> Rename:
        """The first way of naming by which everything that is adapted is there; else the plain one."""
        wanted = [update for update in adapter.updates if not isinstance(update, Saved)]
        ways = list(renames(self._shapes))
        return next((way for way in ways if all(self._exists(way, update) for update in wanted)), ways[0])

    def wanted(self) -> list[Update]:
        """All updates, but for those of parts of a pipeline that are no part of the base."""
        found = {update.target: self._exists(self._rename, update) for update in self._updates}
        others = set(parts_without(found, found)) if isinstance(self._rename, FlatNames) else set()
        return [update for update in self._updates if part_of(update.target) not in others]

    def _exists(self, rename: Rename, update: Update) -> bool:
        return rename(update.target) in self._shapes or bool(self._apart(rename, update, 0))

    def _apart(self, rename: Rename, update: Update, expert: int) -> tuple[str, ...]:
        if not isinstance(update, LowRank) or update.form != "experts":
            return ()
        return experts_apart(rename(update.module), update.parameter, expert, self._shapes)

    def changes(self, update: Update) -> Iterator[tuple[str, Change]]:
        """The base's tensors that an update changes. Raises InputRejected for what does not fit."""
        name = self._rename(update.target)
        if isinstance(update, Saved):
            yield name, self._saved(name, update)
        elif self._apart(self._rename, update, 0) and isinstance(update, LowRank):
            yield from self._experts_apart(update)
        elif name not in self._shapes:
            raise InputRejected(
                f"{self._label}: it adapts {show(name)}, which {self._base.label} does not have: "
                "is this the base that it was made for?"
            )
        else:
            yield from _KINDS[type(update)](self, name, update)

    def _saved(self, name: str, update: Saved) -> Change:
        self._shapes[name] = update.value.shape
        return Change(None, update.value, additive=False)

    # --- low rank -----------------------------------------------------------------------------------------

    def _low_rank(self, name: str, update: LowRank) -> Iterator[tuple[str, Change]]:
        if update.form == "experts":
            yield name, self._experts(name, update)
            return
        swapped = self._swapped(name, update)
        yield name, Change(partial(self._product, update, swapped), rank=update.rank)
        if update.magnitude is not None:
            width = prod(self._shapes[name][1:])
            norms = partial(self._norms, update.magnitude, 1 if swapped else 0, width)
            yield name, Change(norms, additive=False)
        if update.bias is not None:
            bias = self._rename(f"{update.module}.bias")
            self._check_bias(bias, update.bias)
            yield bias, Change(partial(self._offset, update.bias, update.scaling))

    def _swapped(self, name: str, update: LowRank) -> bool:
        """Whether the tensor is stored as (in, out), so that the transposed product is added."""
        sizes = update.b.shape[0], prod(update.a.shape[1:])
        if update.form == "embedding":
            return self._oriented(name, update.a, sizes, True)
        told = is_transposed_layer(update.module, self._base.config)
        return self._oriented(name, update.a, sizes, update.transposed if told is None else told)

    def _oriented(self, name: str, part: TensorInfo, sizes: tuple[int, int], swapped: bool) -> bool:
        """Of a change to ``sizes`` (outputs, inputs): as ``swapped`` says if both ways fit, else the one that does."""
        shape = self._shapes[name]
        matrix = shape[0] if shape else 1, prod(shape[1:])
        fits = {False: matrix == sizes, True: matrix == sizes[::-1] and len(shape) == 2}
        if not any(fits.values()) or (part.name.endswith("embedding_A") and not fits[True]):
            raise InputRejected(
                f"{self._label}: {show(part.name)} is for {list(sizes)}, but {show(name)} of {self._base.label} is "
                f"{list(shape)}: is this the base that it was made for?"
            )
        return swapped if fits[swapped] else not swapped

    def _product(self, update: LowRank, swapped: bool) -> Step:
        left = self.floats(update.b).reshape(update.b.shape[0], -1)
        right = self.floats(update.a).reshape(update.a.shape[0], -1)
        if swapped:
            left, right = right.T, left.T
        return Products(_stack(left), _stack(right), update.scaling)

    def _experts(self, name: str, update: LowRank) -> Change:
        shape, (rows, columns) = self._shapes[name], (update.b.shape[0], update.a.shape[1])
        fits = {False: (update.experts, rows, columns) == shape, True: (update.experts, columns, rows) == shape}
        if not any(fits.values()):
            raise self._unfit(name, update.a, (update.experts, rows, columns))
        swapped = has_transposed_experts(self._base.config) if all(fits.values()) else fits[True]
        return Change(partial(self._stacked, update, swapped), rank=update.rank if update.experts == 1 else None)

    def _stacked(self, update: LowRank, swapped: bool) -> Step:
        left, right = self._by_expert(update)
        if swapped:
            left, right = right.transpose(0, 2, 1), left.transpose(0, 2, 1)
        return Products(np.ascontiguousarray(left), np.ascontiguousarray(right), update.scaling)

    def _by_expert(self, update: LowRank) -> tuple[Floats, Floats]:
        """(experts, out, r) and (experts, r, in)."""
        a, b = self.floats(update.a), self.floats(update.b)
        right = a.reshape(update.experts, update.rank, -1)
        return b.reshape(len(b), update.rank, update.experts).transpose(2, 0, 1), right

    def _experts_apart(self, update: LowRank) -> Iterator[tuple[str, Change]]:
        """Experts that lie one by one on disk: each layer of each takes its rows of the change."""
        for expert in range(update.experts):
            names = self._apart(self._rename, update, expert)
            sizes = [self._shapes[name] for name in names]
            if not names or (sum(s[0] for s in sizes), *sizes[0][1:]) != (update.b.shape[0], update.a.shape[1]):
                raise self._unfit(
                    f"{update.target}, expert {expert},", update.a, (update.b.shape[0], *update.a.shape[1:])
                )
            first = 0
            for name, size in zip(names, sizes, strict=True):
                yield name, Change(partial(self._part, update, expert, slice(first, first + size[0])), rank=update.rank)
                first += size[0]

    def _part(self, update: LowRank, expert: int, rows: slice) -> Step:
        left, right = self._by_expert(update)
        return Products(_stack(left[expert, rows]), _stack(right[expert]), update.scaling)

    def _norms(self, magnitude: TensorInfo, axis: int, width: int) -> Step:
        return Norms(self.floats(magnitude).reshape(-1), axis, width)

    def _offset(self, values: TensorInfo, scale: float) -> Step:
        return Offset(self.floats(values), scale)

    def _shards(self, name: str, update: Shards) -> Iterator[tuple[str, Change]]:
        pieces = update.index_a.count // update.rank
        sizes = update.pool_b.shape[0] * pieces, update.pool_a.shape[1] * pieces
        told = bool(is_transposed_layer(update.module, self._base.config))
        swapped = self._oriented(name, update.pool_a, sizes, told)
        yield name, Change(partial(self._gathered, update, swapped), rank=update.rank)

    def _gathered(self, update: Shards, swapped: bool) -> Step:
        """The ordinary factors that the shards make up."""
        index_a, index_b = (self._file[info.name].astype(np.int64) for info in (update.index_a, update.index_b))
        right = self.floats(update.pool_a)[index_a].reshape(update.rank, -1)
        columns = self.floats(update.pool_b)[:, index_b].reshape(update.pool_b.shape[0], update.rank, -1)
        left = columns.transpose(2, 0, 1).reshape(-1, update.rank)
        if swapped:
            left, right = right.T, left.T
        return Products(_stack(left), _stack(right), update.scaling)

    # --- the other kinds ----------------------------------------------------------------------------------

    def _hadamard(self, name: str, update: Hadamard) -> Iterator[tuple[str, Change]]:
        shape = self._shapes[name]
        for product in (update.left, update.right):
            if _size_of(product) != (shape[0], prod(shape[1:])):
                raise self._unfit(name, next(product.tensors()), _size_of(product))
        yield name, Change(partial(self._product_of_two, update))

    def _product_of_two(self, update: Hadamard) -> Step:
        return ProductOfTwo((*self._factors(update.left), *self._factors(update.right)), update.scaling)

    def _factors(self, product: Product) -> tuple[Floats, Floats]:
        """(rows, r) and (r, columns) of a product; a core goes into the second."""
        assert product.a is not None
        assert product.b is not None
        a, b = self.floats(product.a), self.floats(product.b)
        if product.core is None:
            return _contiguous(a), _contiguous(b)
        core = _contracted(self.floats(product.core), 1, b.T)
        return _contiguous(a.T), _contiguous(core.reshape(len(core), -1))

    def _tucker(self, name: str, update: Tucker) -> Iterator[tuple[str, Change]]:
        shape = self._shapes[name]
        inputs, outputs, *kernel = (factor.shape[0] for factor in update.factors)
        fits = {False: (outputs, inputs, *kernel) == shape, True: (inputs, outputs, *kernel) == shape}
        if not any(fits.values()):
            raise self._unfit(name, update.core, (outputs, inputs, *kernel))
        told = bool(is_transposed_layer(update.module, self._base.config))
        swapped = told if fits[told] else fits[True]
        rank = update.factors[0 if swapped else 1].shape[1]
        yield name, Change(partial(self._core_times_factors, update, swapped), rank=rank)

    def _core_times_factors(self, update: Tucker, swapped: bool) -> Step:
        """The factor of the first axis of the tensor, and all others put into the core."""
        first, second = (0, 1) if swapped else (1, 0)
        core = self.floats(update.core)
        for axis in (*range(2, len(update.factors)), second):
            core = _contracted(core, axis, self.floats(update.factors[axis]))
        core = np.moveaxis(core, first, 0)
        return Products(_stack(self.floats(update.factors[first])), _stack(core.reshape(len(core), -1)), update.scaling)

    def _kronecker(self, name: str, update: Kronecker) -> Iterator[tuple[str, Change]]:
        shape, (a, b), (c, d) = self._shapes[name], _size_of(update.left), _size_of(update.right)
        if (a * c, b * d) != (shape[0], prod(shape[1:])):
            raise self._unfit(name, next(update.left.tensors()), (a * c, b * d))
        yield name, Change(partial(self._outer, update))

    def _outer(self, update: Kronecker) -> Step:
        return Outer(self._matrix(update.left), self._matrix(update.right), update.scaling)

    def _matrix(self, product: Product) -> Floats:
        """A product as it stands for: few numbers, so it is made whole."""
        if product.whole is not None:
            return self.floats(product.whole).reshape(product.whole.shape[0], -1)
        left, right = self._factors(product)
        return _product(left, right)

    def _packed(self, name: str, update: Entries | Signs | Dense) -> Iterator[tuple[str, Change]]:
        count = prod(self._shapes[name])
        if isinstance(update, Dense) and update.value.shape != self._shapes[name]:
            raise self._unfit(name, update.value, update.value.shape)
        if isinstance(update, Signs) and update.bits.count != -(-count // 8):
            raise self._unfit(name, update.bits, (8 * update.bits.count,))
        makers: Mapping[type, Callable[..., Step]] = {Entries: self._entries, Signs: self._signs, Dense: self._dense}
        yield name, Change(partial(makers[type(update)], update, count))

    def _entries(self, update: Entries, count: int) -> Step:
        index = self._file[update.index.name]
        if len(index) and (int(index[-1]) >= count or not (index[1:] > index[:-1]).all()):
            where = f"{self._label}: {show(update.index.name)}"
            raise InputRejected(f"{where} is not ascending within the {count} elements of the base's tensor")
        return AddedEntries(index, self.floats(update.value))

    def _signs(self, update: Signs, count: int) -> Step:
        return AddedSigns(self._file[update.bits.name], float(self.floats(update.scale).reshape(-1)[0]))

    def _dense(self, update: Dense, count: int) -> Step:
        return Offset(self.floats(update.value), 1.0)

    def _scaled(self, name: str, update: Scaled) -> Iterator[tuple[str, Change]]:
        shape, count = self._shapes[name], update.vector.count
        told = is_transposed_layer(update.module, self._base.config)
        axis = int(update.inputs != (update.transposed if told is None else told))
        if len(shape) != 2 or shape[axis] != count:
            raise self._unfit(name, update.vector, (count,))
        yield name, Change(partial(self._multiply, update.vector, axis, shape[1]), additive=False)
        bias = self._rename(f"{update.module}.bias")
        if not update.inputs and bias in self._shapes:
            self._check_bias(bias, update.vector)
            yield bias, Change(partial(self._multiply, update.vector, 0, 1), additive=False)

    def _multiply(self, vector: TensorInfo, axis: int, width: int) -> Step:
        return Multiply(self.floats(vector).reshape(-1), axis, width)

    def _rows(self, name: str, update: Rows) -> Iterator[tuple[str, Change]]:
        shape = self._shapes[name]
        if len(shape) != 2 or shape[1:] != update.values.shape[1:] or max(update.tokens, default=-1) >= shape[0]:
            raise self._unfit(name, update.values, (max(update.tokens, default=-1) + 1, *update.values.shape[1:]))
        yield name, Change(partial(self._new_rows, update), additive=False)

    def _new_rows(self, update: Rows) -> Step:
        rows = np.array(update.tokens, np.int64)
        order = np.argsort(rows)
        return NewRows(rows[order], _contiguous(self.floats(update.values)[order]))

    # --- helpers ------------------------------------------------------------------------------------------

    def floats(self, info: TensorInfo) -> Floats:
        values: Floats = self._file[info.name].astype(np.float32)
        return values

    def _check_bias(self, name: str, bias: TensorInfo) -> None:
        if name not in self._shapes:
            raise InputRejected(f"{self._label}: {show(bias.name)} is for {show(name)}, which {self._base.label} lacks")
        if self._shapes[name] != (bias.count,):
            raise self._unfit(name, bias, (bias.count,))

    def _unfit(self, name: str, part: TensorInfo, sizes: Shape) -> InputRejected:
        return InputRejected(
            f"{self._label}: {show(part.name)} is for {list(sizes)}, but {show(name)} of {self._base.label} is "
            f"{list(self._shapes.get(name, ()))}: is this the base that it was made for?"
        )


_KINDS: Mapping[type[Update], Callable[[_Binder, str, Any], Iterator[tuple[str, Change]]]] = {
    LowRank: _Binder._low_rank, Hadamard: _Binder._hadamard, Kronecker: _Binder._kronecker,
    Scaled: _Binder._scaled, Rows: _Binder._rows, Tucker: _Binder._tucker, Shards: _Binder._shards,
    Entries: _Binder._packed, Signs: _Binder._packed, Dense: _Binder._packed,
}  # fmt: skip


def _size_of(product: Product) -> tuple[int, int]:
    """Of the matrix that it stands for; what follows the first axis is one."""
    if product.whole is not None:
        return product.whole.shape[0], prod(product.whole.shape[1:])
    assert product.a is not None
    assert product.b is not None
    if product.core is None:
        return product.a.shape[0], product.b.shape[-1]
    return product.a.shape[-1], product.b.shape[-1] * prod(product.core.shape[2:])


def _contiguous(values: Any) -> Floats:
    found: Floats = np.ascontiguousarray(values, np.float32)
    return found


def _product(left: Floats, right: Floats) -> Floats:
    made = np.zeros((len(left), right.shape[1]), np.float32)
    Products(_stack(left), _stack(right), 1.0).apply(0, made.reshape(-1))
    return made


def _contracted(core: Floats, axis: int, factor: Floats) -> Floats:
    """The core with one axis of ranks multiplied by a factor (size, rank), which makes it one of that size."""
    moved = np.moveaxis(core, axis, -1)
    made = _product(_contiguous(moved.reshape(-1, moved.shape[-1])), factor.T)
    return np.moveaxis(made.reshape(*moved.shape[:-1], len(factor)), -1, axis)


def _stack(matrix: Floats) -> Floats:
    """One matrix as a stack of one."""
    return _contiguous(matrix)[None]
