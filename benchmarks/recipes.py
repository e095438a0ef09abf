"""The recipes that are timed, in mergekit's YAML, which both programs read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shapes import BASE, FINE_TUNES, STATISTICS, model_dir


@dataclass(frozen=True, slots=True)
class Timed:
    """One merge: its method, the models that take part beside a base, and what they are given.

    ``ours``: mergekit has no such method. ``statistics``: each model brings what its parameters are weighted by.
    """

    method: str
    models: tuple[str, ...] = FINE_TUNES
    base: bool = True
    per_model: tuple[tuple[str, float], ...] = ()
    shared: tuple[tuple[str, float | str], ...] = ()
    ours: bool = False
    statistics: bool = False

    def inputs(self, size: str) -> list[Path]:
        """Folder of every model and statistic that is read, each once."""
        beside = [STATISTICS[name] for name in self.models] if self.statistics else []
        names = dict.fromkeys((BASE, *self.models, *beside) if self.base else (*self.models, *beside))
        return [model_dir(size, name) for name in names]

    def yaml(self, size: str) -> str:
        """The recipe; JSON is YAML, and absolute paths keep mergekit from asking a hub about them."""
        settings = {"parameters": dict(self.per_model)} if self.per_model else {}
        recipe: dict[str, object] = {
            "merge_method": self.method,
            "models": [self._entry(size, model) | settings for model in self.models],
            "dtype": "bfloat16",
        }
        if self.base:
            recipe["base_model"] = str(model_dir(size, BASE))
        if self.shared:
            recipe["parameters"] = dict(self.shared)
        return json.dumps(recipe, indent=2) + "\n"

    def _entry(self, size: str, model: str) -> dict[str, object]:
        beside = {"statistics": str(model_dir(size, STATISTICS[model]))} if self.statistics else {}
        return {"model": str(model_dir(size, model)), **beside}


_ONE, _TWO = FINE_TUNES[:1], FINE_TUNES[:2]

_MERGES = (
    Timed("linear", base=False, per_model=(("weight", 1.0),)),
    Timed("slerp", models=(BASE, FINE_TUNES[0]), shared=(("t", 0.5),)),
    Timed("task_arithmetic", per_model=(("weight", 0.4),)),
    Timed("ties", per_model=(("weight", 1.0), ("density", 0.2))),
    Timed("dare", per_model=(("drop_rate", 0.5),), shared=(("merge", "task_arithmetic"), ("lambda", 0.4)), ours=True),
    Timed("dare_linear", per_model=(("weight", 0.4), ("density", 0.5))),
    Timed("dare_ties", per_model=(("weight", 0.4), ("density", 0.5))),
    Timed("breadcrumbs", per_model=(("weight", 0.4), ("density", 0.5))),
    Timed("breadcrumbs_ties", per_model=(("weight", 0.4), ("density", 0.5))),
    Timed("della", per_model=(("weight", 0.4), ("density", 0.5))),
    Timed("della_linear", per_model=(("weight", 0.4), ("density", 0.5))),
    Timed("nuslerp", models=_TWO, base=False, per_model=(("weight", 0.5),)),
    Timed("multislerp", base=False, per_model=(("weight", 1.0),)),
    Timed("karcher", base=False),
    Timed("model_stock"),
    Timed("sce", shared=(("select_topk", 0.2),)),
    Timed("nearswap", models=_ONE, shared=(("t", 0.0005),)),
    Timed("arcee_fusion", models=_ONE),
    Timed("ram"),
    Timed("ramplus_tl"),
    Timed("lines", models=_ONE, shared=(("beta", 0.9),), ours=True),
    Timed("tall_masks", ours=True),
    Timed("consensus", ours=True),
    Timed("emr_merging", ours=True),
    Timed("pcb", ours=True),
    Timed("varm", ours=True),
    Timed("fisher", base=False, ours=True, statistics=True),
    Timed("ota", ours=True, statistics=True),
    Timed("ffg", models=_ONE, ours=True, statistics=True),
)
MERGES = {merge.method: merge for merge in _MERGES}
