"""What the tensors of one model are: layer, depth and role of each, from names, shapes and config.json."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from .config import Config, KeyPath, layer_patterns, lists_per_layer, section_at
from .depth import Stack, StackFinder, find_stacks, stacks_by_names
from .names import Indexed, expert_in, first_index
from .roles import role_of
from .ties import Shape, Vocabulary

Kind = Literal["pre", "layer", "post", "loose"]


@dataclass(frozen=True, slots=True)
class TensorRole:
    """One tensor's place in the model.

    Attributes
    ----------
    role: see ``roles``; "other" when it is not known.
    stack: the container of its layers ("model.layers"), or None outside of all stacks. What the first layer
        holds for all of them (T5's relative positions) is "pre" and has a stack, but no layer.
    layer: its layer's index; layers: how many the stack has; depth: layer / (layers - 1), 1.0 in a stack of one.
    expert: the number of its expert, or None.
    kind: "layer"; "pre" (before the layers), "post" (final norm and heads); "loose" when the model has no
        stack, or the tensor lies behind the layers that the config counts.
    """

    name: str
    role: str
    kind: Kind
    stack: str | None = None
    layer: int | None = None
    layers: int | None = None
    expert: int | None = None

    @property
    def depth(self) -> float | None:
        if self.layer is None or self.layers is None:
            return None
        return self.layer / (self.layers - 1) if self.layers > 1 else 1.0

    def moved(self, name: str, layers: int) -> TensorRole:
        """The role of the same tensor under a name in another layer, in a stack of ``layers``."""
        cut = first_index(name)
        return replace(self, name=name, layer=cut.number if cut else None, layers=layers)


class Structure:
    """The roles of all tensors of one model. Iterates over the roles, sorted by name. Made by :meth:`of`.

    Attributes
    ----------
    roles: name -> role.
    stacks: the stacks of layers, sorted by prefix.
    remarks: sentences on what was not understood.
    vocabulary: embedding and head.
    """

    def __init__(self, shapes: Mapping[str, Shape | None], config: Config, find: StackFinder = find_stacks) -> None:
        known = {name: shape for name, shape in shapes.items() if shape is not None}
        self._config = config
        self.stacks, self.remarks = find(shapes, known, config)
        self._stack_of = {stack.prefix: stack for stack in self.stacks}
        self.roles = {name: self._classify(name, shapes) for name in sorted(shapes)}
        self.vocabulary = Vocabulary({role.name: role.role for role in self}, known, config)

    @classmethod
    def of(cls, names: Iterable[str] | Mapping[str, Iterable[int]], config: Config | None = None) -> Structure:
        """The structure of a model with these tensors: names, or names with shapes (which tell more).

        The order of the names does not matter. Without a config, or for names that it does not explain,
        there are no stacks and every tensor is "loose".
        """
        if isinstance(names, Mapping):
            return cls({name: tuple(shape) for name, shape in names.items()}, config or {})
        return cls(dict.fromkeys(names), config or {})

    @classmethod
    def by_names(cls, shapes: Mapping[str, Shape]) -> Structure:
        """The structure as names and shapes alone tell it: each row of numbered blocks that are alike is a stack."""
        return cls(shapes, {}, stacks_by_names)

    def __getitem__(self, name: str) -> TensorRole:
        return self.roles[name]

    def __contains__(self, name: object) -> bool:
        return name in self.roles

    def __iter__(self) -> Iterator[TensorRole]:
        return iter(self.roles.values())

    def __len__(self) -> int:
        return len(self.roles)

    def get(self, name: str) -> TensorRole | None:
        return self.roles.get(name)

    # --- layers -----------------------------------------------------------------------------------------

    def _classify(self, name: str, stored: Container[str]) -> TensorRole:
        role, expert, cut = role_of(name, stored), expert_in(name), first_index(name)
        stack = self._stack_of.get(cut.container) if cut else None
        if cut is None or stack is None:
            return TensorRole(name, role, self._outside(name, role), expert=expert)
        if cut.number >= stack.count:
            return TensorRole(name, role, "loose", expert=expert)
        if role == "position" and _is_shared(cut, stack, stored):
            return TensorRole(name, role, "pre", stack.prefix)
        return TensorRole(name, role, "layer", stack.prefix, cut.number, stack.count, expert)

    def _outside(self, name: str, role: str) -> Kind:
        if not self.stacks:
            return "loose"
        first_norm = "embed" in name or "pre_l" in name
        return "post" if role.startswith("head") or (role == "norm" and not first_norm) else "pre"

    @property
    def main_stack(self) -> Stack | None:
        """The only stack, which ``slices:`` address; None when there is none, or more than one."""
        return self.stacks[0] if len(self.stacks) == 1 else None

    def rename_layer(self, name: str, layer: int) -> str:
        """``name`` in another layer; names outside of all layers stay as they are."""
        stack, _, rest = self.place(name)
        return f"{stack}.{layer}.{rest}" if stack else name

    def place(self, name: str) -> tuple[str, int, str]:
        """Stack, layer and the rest of a name, stored or not; an empty stack and the whole name outside."""
        cut, role = first_index(name), self.get(name)
        if cut is None or cut.container not in self._stack_of or (role is not None and role.layer is None):
            return "", 0, name
        return cut

    @property
    def layer_count_key(self) -> KeyPath | None:
        """Where config.json states the main stack's number of layers: the first of its ``count_keys``
        (some families repeat the number: all of them change together)."""
        keys = self.main_stack.count_keys if self.main_stack else ()
        return keys[0] if keys else None

    def lists_of(self, stack: Stack) -> dict[KeyPath, list[Any]]:
        """Entries of config.json that are lists with one element per layer of ``stack``."""
        return self._beside_count(stack, lists_per_layer)

    def patterns_of(self, stack: Stack) -> dict[KeyPath, Any]:
        """Entries of config.json that speak of the layers of ``stack`` by period, count or index
        (``mlp_only_layers``, ``first_k_dense_replace``): no longer right when layers move."""
        return self._beside_count(stack, layer_patterns)

    def _beside_count(self, stack: Stack, find: Callable[[Config, int], dict[str, Any]]) -> dict[KeyPath, Any]:
        """What ``find`` sees in the config section that holds the stack's count."""
        if not stack.count_keys:
            return {}
        path = stack.count_keys[0][:-1]
        found = find(section_at(self._config, path), stack.count)
        return {(*path, key): value for key, value in found.items()}

    # --- vocabulary -------------------------------------------------------------------------------------

    def vocabulary_axis(self, name: str) -> int | None:
        """The axis of a stored tensor that runs over tokens, or None. Needs shapes."""
        return self.vocabulary.axis(name)

    def tied_source(self, name: str) -> str | None:
        """The stored embedding that stands for the absent head ``name``, or None."""
        return self.vocabulary.source(name)

    @property
    def tied_groups(self) -> tuple[tuple[str, ...], ...]:
        """Stored tensors that config.json says are one."""
        return self.vocabulary.groups()

    @property
    def heads(self) -> tuple[str, ...]:
        """The stored matrices that give a logit per token."""
        return self.vocabulary.heads


def _is_shared(cut: Indexed, stack: Stack, stored: Container[str]) -> bool:
    """Whether the first layer holds it for all of them, as T5 does with relative positions."""
    return cut.number == 0 and stack.count > 1 and str(cut._replace(number=1)) not in stored
