"""What making an adapter gives back: the artefact, and how well each module is reproduced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import Any, Literal

from ..engine import Artifact
from ..engine.card import hub_id
from ..errors import show

Stored = Literal["low rank", "entries", "signs", "whole", "nothing"]

#: A relative error that users must hear of, and how many names a notice lists.
_MUCH, _SHOWN = 0.3, 4


@dataclass(frozen=True)
class ModuleReport:
    """One module.

    Attributes
    ----------
    stored: "low rank", "whole", or "nothing" where it is left out; ``why`` says why. Of a tensor in a delta pack also
        "entries" or "signs".
    rank: of its factors.
    norm: Frobenius norm of the change that was wanted of the weights; NaN where it was not looked at.
    error: norm of what the adapter does not reproduce, measured with the factors as they are stored.
    above_rounding: how many singular values exceed what rounding the weights to their dtype makes.
    """

    module: str
    stored: Stored
    rank: int = 0
    norm: float = float("nan")
    error: float = float("nan")
    above_rounding: int | None = None
    why: str = ""

    @property
    def relative_error(self) -> float:
        """error / norm; 0 where nothing differs."""
        return self.error / self.norm if self.norm else 0.0


@dataclass
class AdapterArtifact(Artifact):
    """An adapter that was published; ``modules`` in the order of their names."""

    modules: list[ModuleReport] = field(default_factory=list)

    @property
    def error(self) -> float:
        """The relative error over all modules together; 0 where nothing of what was asked for is lost."""
        return total_error(self.modules)

    def as_dict(self) -> dict[str, Any]:
        rows = [{**asdict(module), "relative_error": module.relative_error} for module in self.modules]
        return {**super().as_dict(), "error": self.error, "modules": rows}


def total_error(modules: Iterable[ModuleReport]) -> float:
    known = [module for module in modules if module.norm == module.norm]
    norm = sqrt(sum(module.norm**2 for module in known))
    return sqrt(sum(module.error**2 for module in known)) / norm if norm else 0.0


def notices(modules: Sequence[ModuleReport]) -> list[str]:
    """What is worth a warning: much that is lost, and modules that an adapter cannot hold."""
    lost = [m.module for m in modules if m.why in ("an adapter has no place for it", "cannot be decomposed")]
    found = [f"left out although they differ: {_listed(lost)}"] if lost else []
    resized = [module.module for module in modules if module.why == "another vocabulary"]
    if resized:
        found.append(
            f"stored whole with another number of tokens than the base: {_listed(resized)}: resize the base first"
        )
    error = total_error(modules)
    if error > _MUCH:
        found.append(
            f"{error:.0%} of the fine-tune's norm is not in the adapter: it is not of low rank; raise the rank"
        )
    return found


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(show, names[:_SHOWN])) + more


def readme(title: str, base: str, modules: Sequence[ModuleReport]) -> str:
    """The card: what the adapter is for, and the table of errors."""
    lines = [
        "---", "library_name: peft", "tags:", "- lora", "- smelt", "---", "", f"# {title}", "",
        f"A low-rank adapter for `{base}`, extracted from a fine-tune with smelt. Relative error over all modules: "
        f"{total_error(modules):.2%}.", "", *_table(modules),
    ]  # fmt: skip
    return "\n".join(lines)


def merge_card(
    title: str, adapters: Sequence[str], weights: Sequence[float], base: str | None, how: str,
    modules: Sequence[ModuleReport],
) -> str:  # fmt: skip
    """The card of merged adapters: what they were, how they were merged, and the table of errors."""
    where = f" for `{base}`" if base else ""
    found = hub_id(base) if base else None
    lines = [
        "---", "library_name: peft", *([f"base_model: {found}"] if found else []), "tags:", "- lora", "- merge",
        "- smelt", "---", "", f"# {title}", "",
        f"A low-rank adapter{where}, merged with smelt from others {how}. What it leaves out of that, over all "
        f"modules: {total_error(modules):.2%}.", "", "| adapter | weight |", "| --- | --- |",
        *(f"| `{name}` | {weight:g} |" for name, weight in zip(adapters, weights, strict=True)), "",
        *_table(modules),
    ]  # fmt: skip
    return "\n".join(lines)


def pack_card(title: str, base: str, form: str, tensors: Sequence[ModuleReport]) -> str:
    """The card of a delta pack."""
    lines = [
        "---", "tags:", "- smelt", "---", "", f"# {title}", "",
        f"What a fine-tune of `{base}` adds to it, packed ({form}) with smelt, which reads `base+pack` as a model. "
        f"Relative error over all tensors: {total_error(tensors):.2%}.", "", *_table(tensors),
    ]  # fmt: skip
    return "\n".join(lines)


def _table(modules: Sequence[ModuleReport]) -> list[str]:
    rows = [
        f"| `{m.module}` | {m.stored} | {m.rank or ''} | {m.norm:.4g} | {m.relative_error:.2%} |"
        for m in modules
        if m.stored != "nothing"
    ]
    return ["| module | stored | rank | norm of the change | error |", "| --- | --- | --- | --- | --- |", *rows, ""]
