"""What PEFT's ``add_weighted_adapter`` makes of three small adapters; ``python -m tests.peft_merge_oracle`` records it.

Where PEFT draws at random, it is given smelt's own draws: what is compared is everything else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smelt.kernels.random import drawn, key_of, words

RECORDED = Path(__file__).parent / "data" / "lora_merge"
WEIGHTS = [0.7, -0.4, 1.3]
SEED = 5

#: Three adapters of one base. The second lacks a module; the third has another scaling.
ADAPTERS: list[dict[str, Any]] = [
    {"target_modules": ["q", "embed", "conv"], "r": 3, "lora_alpha": 5},
    {"target_modules": ["q", "embed"], "r": 3, "lora_alpha": 3},
    {"target_modules": ["q", "embed", "conv"], "r": 3, "lora_alpha": 7, "use_rslora": True},
]

#: By name: the options beside the weights.
CASES: dict[str, dict[str, Any]] = {
    "linear": {}, "cat": {}, "svd": {}, "svd_wide": {"combination_type": "svd", "svd_rank": 4},
    "ties": {"density": 0.5}, "ties_frequency": {"combination_type": "ties", "density": 0.7,
                                                "majority_sign_method": "frequency"},
    "magnitude_prune": {"density": 0.35}, "dare_linear": {"density": 0.6}, "dare_ties": {"density": 0.6},
    "ties_svd": {"density": 0.5, "svd_rank": 5}, "magnitude_prune_svd": {"density": 0.35, "svd_rank": 2},
    "dare_linear_svd": {"density": 0.6, "svd_rank": 3},
    "dare_ties_svd": {"density": 0.6, "svd_rank": 3, "majority_sign_method": "frequency"},
}  # fmt: skip


def model() -> Any:
    """One layer of each kind that PEFT merges."""
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = torch.nn.Linear(7, 6, bias=False)
            self.embed = torch.nn.Embedding(9, 7)
            self.conv = torch.nn.Conv2d(3, 8, (2, 2), bias=False)

    torch.manual_seed(0)
    return Model()


def make_adapters(folder: Path) -> None:
    """Write the adapters, their factors random."""
    import peft
    import torch

    for place, options in enumerate(ADAPTERS):
        torch.manual_seed(place + 1)
        wrapped = peft.get_peft_model(model(), peft.LoraConfig(**options))
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
        wrapped.save_pretrained(folder / str(place), save_embedding_layers=False)
        (folder / str(place) / "README.md").unlink()


def opened(folders: list[Path]) -> Any:
    """The model with all the adapters, called by their places."""
    import peft

    wrapped = peft.PeftModel.from_pretrained(model(), str(folders[0]), adapter_name="0")
    for place, folder in enumerate(folders[1:], 1):
        wrapped.load_adapter(str(folder), adapter_name=str(place))
    return wrapped


def merged(folders: list[Path], case: str) -> dict[str, Any]:
    """Module -> what PEFT's merged adapter adds to its weight, in the order of B A."""
    wrapped, options = opened(folders), dict(CASES[case])
    kind, names = options.pop("combination_type", case), [str(place) for place in range(len(folders))]
    with smelts_draws(wrapped):
        wrapped.base_model.add_weighted_adapter(
            names, WEIGHTS[: len(names)], "merged", combination_type=kind, svd_full_matrices=False, **options
        )
    return deltas(wrapped, "merged")


def deltas(wrapped: Any, adapter: str) -> dict[str, Any]:
    """Module -> (rows, columns) of B A, times its scaling."""
    found = {}
    for name, layer in wrapped.base_model.model.named_modules():
        scaling = getattr(layer, "scaling", None)
        if isinstance(scaling, dict) and adapter in scaling:
            delta = layer.get_delta_weight(adapter).detach()
            matrix = delta.reshape(len(delta), -1)
            found[name] = (matrix.T if name == "embed" else matrix).contiguous().numpy()
    return found


@contextmanager
def smelts_draws(wrapped: Any) -> Iterator[None]:
    """Let ``torch.bernoulli`` give the draws that smelt takes for the tensor at hand."""
    import torch
    from peft.tuners.lora import model as home

    names = {id(layer): name for name, layer in wrapped.base_model.model.named_modules()}
    kinds = ("_generalized_task_arithmetic_weighted_adapter", "_svd_generalized_task_arithmetic_weighted_adapter")
    before, bernoulli = [getattr(home.LoraModel, kind) for kind in kinds], torch.bernoulli
    asked: list[tuple[str, int]] = []

    def at(function: Any, parts: tuple[str, ...]) -> Any:
        def called(self: Any, combination: str, adapters: Any, *rest: Any, **more: Any) -> Any:
            target = next(argument for argument in rest if hasattr(argument, "lora_A"))
            holders = [n for n in adapters if n in target.lora_A or n in target.lora_embedding_A]
            asked[:] = [(names[id(target)] + part, int(holder)) for part in parts for holder in holders]
            return function(self, combination, adapters, *rest, **more)

        return called

    def draw(chances: Any) -> Any:
        name, place = asked.pop(0)
        kept = drawn(words(key_of(SEED, name, place), 0, chances.numel()), float(chances.flatten()[0]))
        # smelt draws on B A, of which PEFT turns that of an embedding round.
        turned = name == "embed"
        shape = tuple(chances.shape[::-1]) if turned else tuple(chances.shape)
        mask = torch.from_numpy(kept.reshape(shape).astype("float32"))
        return mask.T if turned else mask

    home.LoraModel._generalized_task_arithmetic_weighted_adapter = at(before[0], (".lora_A", ".lora_B"))
    home.LoraModel._svd_generalized_task_arithmetic_weighted_adapter = at(before[1], ("",))
    torch.bernoulli = draw
    try:
        yield
    finally:
        torch.bernoulli = bernoulli
        for kind, function in zip(kinds, before, strict=True):
            setattr(home.LoraModel, kind, function)


def main() -> None:
    from safetensors.numpy import save_file

    shutil.rmtree(RECORDED, ignore_errors=True)
    make_adapters(RECORDED)
    folders = [RECORDED / str(place) for place in range(len(ADAPTERS))]
    found = {f"{case}/{module}": delta for case in CASES for module, delta in merged(folders, case).items()}
    save_file(found, RECORDED / "expected.safetensors")
    for path in sorted(RECORDED.glob("*/adapter_config.json")):
        content = {key: value for key, value in json.loads(path.read_text()).items() if value and key != "auto_mapping"}
        content["target_modules"].sort()
        path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
