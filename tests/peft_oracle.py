"""Adapters of every kind, made and merged by PEFT itself; ``python -m tests.peft_oracle`` records them anew.

Beside one base for all of them, each case is an adapter's folder with what ``merge_and_unload`` changes in it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "data" / "adapters"

LORA: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q", "k"], "r": 3, "lora_alpha": 5},
    "rslora_patterns": {
        "target_modules": ["q", "k", "up"], "r": 4, "lora_alpha": 6, "use_rslora": True,
        "rank_pattern": {"layers.1.q": 2, "^layers.0.k$": 3}, "alpha_pattern": {r"layers\.\d\.up": 9},
    },
    "dora": {"target_modules": ["q", "up", "embed", "conv2d"], "r": 2, "lora_alpha": 3, "use_dora": True},
    "lora_bias": {"target_modules": ["up", "conv2d"], "r": 2, "lora_alpha": 3, "lora_bias": True},
    "bias_all": {"target_modules": ["up"], "r": 2, "lora_alpha": 3, "bias": "all"},
    "bias_lora_only": {"target_modules": ["up"], "r": 2, "lora_alpha": 3, "bias": "lora_only"},
    "modules_to_save": {"target_modules": ["q"], "r": 2, "modules_to_save": ["head", "embed"]},
    "embedding": {"target_modules": ["embed", "q"], "r": 2, "lora_alpha": 3},
    "tokens": {"target_modules": ["q"], "r": 2, "trainable_token_indices": {"embed": [1, 5, 2]}},
    "conv": {"target_modules": ["conv1d", "conv2d", "pointwise", "conv3d"], "r": 2, "lora_alpha": 3},
    "conv1d_layer": {"target_modules": ["c_attn"], "r": 2, "lora_alpha": 3, "fan_in_fan_out": True},
    "dora_conv1d_layer": {
        "target_modules": ["c_attn"], "r": 2, "lora_alpha": 3, "fan_in_fan_out": True, "use_dora": True,
    },
    "experts": {
        "target_modules": [], "r": 2, "lora_alpha": 3,
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
    "experts_one": {"target_modules": ["q"], "r": 2, "lora_alpha": 3, "target_parameters": ["experts.down_proj"]},
}  # fmt: skip
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ia3": ("IA3Config", {"target_modules": ["q", "up"], "feedforward_modules": ["up"]}),
    "ia3_bias": ("IA3Config", {"target_modules": ["up"], "feedforward_modules": []}),
    "ia3_conv1d_layer": (
        "IA3Config", {"target_modules": ["c_attn"], "feedforward_modules": [], "fan_in_fan_out": True},
    ),
    "loha": ("LoHaConfig", {"target_modules": ["q", "conv2d", "conv1d"], "r": 2, "alpha": 3}),
    "loha_effective": ("LoHaConfig", {"target_modules": ["conv2d"], "r": 2, "alpha": 3, "use_effective_conv2d": True}),
    "lokr": ("LoKrConfig", {"target_modules": ["q", "up", "conv2d"], "r": 2, "alpha": 3}),
    "lokr_both": (
        "LoKrConfig", {"target_modules": ["q", "conv2d"], "r": 1, "alpha": 3, "decompose_both": True,
                       "use_effective_conv2d": True},
    ),
    "trainable_tokens": ("TrainableTokensConfig", {"target_modules": ["embed"], "token_indices": [3, 0]}),
}  # fmt: skip


def make(name: str, folder: Path) -> None:
    """Write one case: the adapter's files, and merged.safetensors with the tensors that differ from the base's."""
    import peft
    import torch
    from safetensors.torch import save_file

    base = model()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    torch.manual_seed(sum(map(ord, name)))
    kind, options = OTHERS.get(name) or ("LoraConfig", LORA[name])
    adapted = peft.get_peft_model(base, getattr(peft, kind)(**options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)
    merged = adapted.merge_and_unload().state_dict()
    changed = {key: value.contiguous() for key, value in merged.items() if not torch.equal(value, before[key])}
    save_file(changed, folder / "merged.safetensors")
    _tidy(folder)


def _tidy(folder: Path) -> None:
    """Only what is needed, and the same bytes whatever machine it was made on."""
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config.pop("auto_mapping")
    config = {key: sorted(value) if _is_set(value) else value for key, value in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def _is_set(value: object) -> bool:
    """PEFT keeps lists of names in sets, and writes them in any order."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def model() -> Any:
    """One of every kind of module that adapters attach to, always with the same weights."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 5))
            self.down_proj = nn.Parameter(torch.randn(3, 5, 4))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(6, 6, bias=False), nn.Linear(6, 4, bias=False)
            self.up = nn.Linear(6, 10)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 6)
            self.layers = nn.ModuleList([Layer(), Layer()])
            self.conv1d, self.conv2d = nn.Conv1d(3, 4, 2), nn.Conv2d(4, 6, 3)
            self.pointwise, self.conv3d = nn.Conv2d(4, 6, 1), nn.Conv3d(2, 3, 2)
            self.grouped = nn.Conv2d(4, 6, 3, groups=2)
            self.c_attn = Conv1D(8, 6)
            self.experts = Experts()
            self.head = nn.Linear(6, 7, bias=False)

        def get_input_embeddings(self) -> Any:
            return self.embed

    torch.manual_seed(0)
    return Model()


def main() -> None:
    from safetensors.torch import save_file

    RECORDED.mkdir(parents=True, exist_ok=True)
    save_file(model().state_dict(), RECORDED / "base.safetensors")
    for name in (*LORA, *OTHERS):
        with tempfile.TemporaryDirectory() as scratch:
            make(name, Path(scratch) / name)
            shutil.rmtree(RECORDED / name, ignore_errors=True)
            shutil.move(Path(scratch) / name, RECORDED / name)


if __name__ == "__main__":
    main()
