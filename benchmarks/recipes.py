"""The recipes that are timed, in mergekit's YAML, which both programs read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shapes import BASE, FINE_TUNES, model_dir


@dataclass(frozen=True, slots=True)
class Timed:
    """One merge: its method, the models that take part beside a base, and what they are given.

    ``ours``: mergekit has no such method.
    """

    method: str
    models: tuple[str, ...] = FINE_TUNES
    base: bool = True
    per_model: tuple[tuple[str, float], ...] = ()
    shared: tuple[tuple[str, float | str], ...] = ()
    ours: bool = False

    def inputs(self, size: str) -> list[Path]:
        """Folder of every model that is read, each once."""
        names = dict.fromkeys((BASE, *self.models) if self.base else self.models)
        return [model_dir(size, name) for name in names]

    def yaml(self, size: str) -> str:
        """The recipe; JSON is YAML, and absolute paths keep mergekit from asking a hub about them."""
        settings = {"parameters": dict(self.per_model)} if self.per_model else {}
        recipe: dict[str, object] = {
            "merge_method": self.method,
            "models": [{"model": str(model_dir(size, model)), **settings} for model in self.models],
            "dtype": "bfloat16",
        }
        if self.base:
            recipe["base_model"] = str(model_dir(size, BASE))
        if self.shared:
            recipe["parameters"] = dict(self.shared)
        return json.dumps(recipe, indent=2) + "\n"


_MERGES = (
    Timed("linear", base=False, per_model=(("weight", 1.0),)),
    Timed("slerp", models=(BASE, FINE_TUNES[0]), shared=(("t", 0.5),)),
    Timed("task_arithmetic", per_model=(("weight", 0.4),)),
    Timed("ties", per_model=(("weight", 1.0), ("density", 0.2))),
    Timed("dare", per_model=(("drop_rate", 0.5),), shared=(("merge", "task_arithmetic"), ("lambda", 0.4)), ours=True),
    Timed("dare_linear", per_model=(("weight", 0.4), ("density", 0.5))),
    Timed("dare_ties", per_model=(("weight", 0.4), ("density", 0.5))),
)
MERGES = {merge.method: merge for merge in _MERGES}
