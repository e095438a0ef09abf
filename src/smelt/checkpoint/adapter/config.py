"""adapter_config.json: what it may say, and how PEFT finds the rank and alpha of a module in it.

Every key is either used, known to have no effect on merged weights, or an error: a key that is not understood
could change what the adapter means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

from ...errors import InputRejected, show
from ..documents import MAX_BYTES, brief, parse_json
from ..place import Place

CONFIG = "adapter_config.json"

#: Say nothing about the merged weights: how it was trained, where it attaches (the file itself tells).
_NEUTRAL = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core",
    "lora_dropout", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights",
    "use_effective_conv2d", "decompose_both", "decompose_factor", "init_ia3_weights", "feedforward_modules",
    "ensure_weight_tying", "target_modules_to_tie", "modules_to_tie",
}  # fmt: skip
_USED = {
    "LORA": {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias", "use_rslora", "use_dora",
             "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "init_lora_weights"},
    "LOHA": {"r", "alpha", "rank_pattern", "alpha_pattern", "modules_to_save"},
    "LOKR": {"r", "alpha", "rank_pattern", "alpha_pattern", "modules_to_save"},
    "IA3": {"fan_in_fan_out", "modules_to_save"},
    "TRAINABLE_TOKENS": {"token_indices"},
    "FLORA": {"r", "scale", "modules_to_save"},
    "MOS": {"r", "lora_alpha", "equivalent_rank", "private_rank", "shards_per_vector"},
    "SMELT_DELTA": set(),
}  # fmt: skip

#: Starts of LoRA that leave the base as it is. The others subtract the start from it, so that the adapter means
#: nothing beside the unchanged base.
_PLAIN_STARTS = (True, False, "true", "false", "gaussian", "orthogonal", "eva")

#: A pattern with more open-ended parts than this could take forever on a long name.
_MOST_REPEATS = 3
_LONGEST_PATTERN = 1000


@dataclass(frozen=True)
class Config:
    """The checked content. ``where`` opens every message about it."""

    where: str
    content: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.content["peft_type"])

    @property
    def base(self) -> str | None:
        """What the adapter's author called the base. Only to be shown: nothing is ever opened by it."""
        value = self.content.get("base_model_name_or_path")
        return value if isinstance(value, str) and value else None

    def flag(self, key: str) -> bool:
        value = self.content.get(key)
        if value not in (True, False, None):
            raise InputRejected(f"{self.where}: {key} is {brief(value)}, expected true or false")
        return bool(value)

    def names(self, key: str) -> tuple[str, ...]:
        """A list of names; none when it is absent."""
        value = self.content.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InputRejected(f"{self.where}: {key} is {brief(value)}, expected a list of names")
        return tuple(value)

    def rank(self, module: str) -> int:
        """r of a module, after rank_pattern."""
        value = self._resolved("rank_pattern", "r", module)
        if type(value) is not int or value < 1:
            raise InputRejected(f"{self.where}: the rank of {show(module)} is {brief(value)}, expected 1 or more")
        return value

    def count(self, key: str, least: int = 1) -> int:
        value = self.content.get(key)
        if type(value) is not int or value < least:
            raise InputRejected(f"{self.where}: {key} is {brief(value)}, expected a whole number of {least} or more")
        return value

    def number(self, key: str) -> float:
        value: Any = self.content.get(key)
        if not _is_number(value):
            raise InputRejected(f"{self.where}: {key} is {brief(value)}, expected a number but 0")
        return float(value)

    def scaling(self, module: str) -> float:
        """alpha / r of a module, or alpha / sqrt(r) with use_rslora, both after their patterns."""
        key = "lora_alpha" if self.kind in ("LORA", "MOS") else "alpha"
        alpha = self._resolved("alpha_pattern", key, module)
        if not _is_number(alpha):
            raise InputRejected(f"{self.where}: {key} of {show(module)} is {brief(alpha)}, expected a number but 0")
        rank = self.rank(module)
        return float(alpha) / (sqrt(rank) if self.flag("use_rslora") else rank)

    def tokens(self, module: str) -> tuple[int, ...]:
        """The rows of an embedding that were trained."""
        found: Any = self.content.get("token_indices" if self.kind == "TRAINABLE_TOKENS" else "trainable_token_indices")
        if isinstance(found, Mapping):
            found = next((rows for name, rows in found.items() if is_part(module, name)), None)
        valid = isinstance(found, list) and all(type(row) is int and row >= 0 for row in found)
        if not valid or len(set(found)) != len(found):
            raise InputRejected(f"{self.where}: the tokens of {show(module)} are {brief(found)}, expected row numbers")
        return tuple(found)

    def _resolved(self, patterns: str, key: str, module: str) -> Any:
        """PEFT's rule: the first pattern that matches the end of the module's name, else the common value."""
        table = self.content.get(patterns) or {}
        if not isinstance(table, Mapping):
            raise InputRejected(f"{self.where}: {patterns} is {brief(table)}, expected an object")
        for pattern, value in table.items():
            if self._expression(pattern, patterns).match(module):
                return value
        return self.content.get(key)

    def _expression(self, pattern: str, key: str) -> re.Pattern[str]:
        """Of PEFT's own making. A pattern that could backtrack without end is refused instead of run."""
        bare = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern)
        endless = re.search(r"\)\s*[*+{]|[*+?}]\s*[*+{]", bare) or len(re.findall(r"[*+{]", bare)) > _MOST_REPEATS
        if endless or len(pattern) > _LONGEST_PATTERN or "(?" in bare.replace("(?:", ""):
            raise InputRejected(f"{self.where}: {key}: {show(pattern)} is too complex: write the modules' names out")
        try:
            return re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise InputRejected(f"{self.where}: {key}: {show(pattern)} is no regular expression: {error}") from None


def _is_number(value: Any) -> bool:
    """Finite and not 0: an adapter times 0 is none."""
    return type(value) in (int, float) and isfinite(value) and value != 0


def is_part(name: str, end: str) -> bool:
    """Whether ``end`` names the module: its full name, or the last parts of it."""
    return name == end or name.endswith("." + end)


def read_config(place: Place) -> Config:
    """The config in an adapter's folder. InputRejected when it is missing, malformed or not understood."""
    raw = place.small(CONFIG, MAX_BYTES)
    if raw is None:
        raise InputRejected(f"{place.shown()} holds no {CONFIG}, which says how its adapter is meant")
    where = place.shown(CONFIG)
    return checked(parse_json(raw, where), where)


def checked(content: Mapping[str, Any], where: str) -> Config:
    """InputRejected when the config says anything that is not understood."""
    kind = content.get("peft_type")
    if not isinstance(kind, str) or kind not in _USED:
        known = ", ".join(_USED)
        raise InputRejected(f"{where}: peft_type is {brief(kind)}, which cannot be added to weights; known: {known}")
    config = Config(where, content)
    InputRejected.gather([*_not_understood(config), *_wrong_start(config)])
    return config


def _not_understood(config: Config) -> Iterator[str]:
    for key, value in config.content.items():
        if key not in _NEUTRAL | _USED[config.kind] and value not in (None, False, [], {}):
            yield f"{config.where}: {show(key)} is {brief(value)}, which this version cannot merge"
    if config.kind == "LORA" and (bias := config.content.get("bias", "none")) not in ("none", "all", "lora_only"):
        yield f"{config.where}: bias is {brief(bias)}, expected none, all or lora_only"


def _wrong_start(config: Config) -> Iterator[str]:
    start = config.content.get("init_lora_weights", True)
    if (start.lower() if isinstance(start, str) else start) not in (*_PLAIN_STARTS, None):
        yield (
            f"{config.where}: init_lora_weights is {brief(start)}, which changed the base as well: save the adapter "
            "again with path_initial_model_for_weight_conversion"
        )
