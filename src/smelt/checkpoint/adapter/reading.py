"""From a PEFT folder to the list of what it does. Every tensor of the file is accounted for, or it is an error."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputRejected, show
from ...kernels.dtypes import DTYPES
from ..base import Checkpoint, TensorInfo
from ..folder import FolderCheckpoint
from ..place import LocalPlace, Place
from . import packs
from .config import Config, checked, is_part, read_config
from .flora import PART, tuckers
from .mos import INDEX, POOL, shards
from .packs import KIND
from .updates import Hadamard, Kronecker, LowRank, Product, Rows, Saved, Scaled, Update

_PREFIX = "base_model.model."
_BASE = ".base_layer"

#: What the parts of an adapted module are called in the file, after the module's name.
_PARTS = {
    "LORA": ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "lora_embedding_A",
             "lora_embedding_B"),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "IA3": ("ia3_l",),
    "TRAINABLE_TOKENS": (),
    "FLORA": (),
    "MOS": (),
    KIND: (),
    "KOHYA": ("lora_A.weight", "lora_B.weight", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1",
              "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
}  # fmt: skip
_TOKENS = ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta")

#: Modules whose weight PEFT stores unasked, when they were resized or are adapted.
_EMBEDDINGS = ("embed_tokens", "lm_head")

#: The order in which expert modules define their parameters, which PEFT wraps from the inside out.
_EXPERT_PARAMETERS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")

Parts = Mapping[str, TensorInfo]


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter, understood. ``file`` reads its tensors, by the names that they have in it.

    updates: what it does, in the order in which it is to be done; a tensor may be changed by more than one.
    """

    file: Checkpoint
    config: Config
    updates: tuple[Update, ...]

    @property
    def kind(self) -> str:
        """PEFT's name of it: "LORA", "LOHA", ..."""
        return self.config.kind

    @property
    def label(self) -> str:
        return self.file.label


def read_adapter(
    folder: Path | Place, label: str | None = None, revision: str | None = None, *, allow_pickle: bool = False
) -> Adapter:
    """Open the PEFT adapter in a folder; only its headers are read.

    Raises InputRejected when a file is missing or malformed, and for anything in it that is not understood.
    """
    place = LocalPlace(folder) if isinstance(folder, Path) else folder
    config = read_config(place)
    label = str(folder) if label is None else label
    file = FolderCheckpoint((place, None), label, revision, adapter=True, allow_pickle=allow_pickle)
    try:
        return understood(file, config)
    except BaseException:
        file.close()
        raise


def parse(file: Checkpoint, config: Mapping[str, Any]) -> Adapter:
    """As :func:`read_adapter`, of tensors that are open already and the content of their config."""
    return understood(file, checked(config, f"{file.label}: adapter config"))


def understood(file: Checkpoint, config: Config, tensors: Parts | None = None, beside: Collection[str] = ()) -> Adapter:
    """``tensors``: those of the file as PEFT would call them, without its prefix. ``beside``: what is known of it."""
    if tensors is None:
        tensors = {name.removeprefix(_PREFIX): info for name, info in file.tensors.items()}
    updates = tuple(_Reader(file, config, tensors).updates())
    InputRejected.gather(_left_over(file, updates, beside))
    return Adapter(file, config, updates)


def _left_over(file: Checkpoint, updates: Sequence[Update], beside: Collection[str]) -> Iterator[str]:
    """Tensors that no update takes, and those that say the same as another."""
    used = {tensor.name for update in updates for tensor in update.tensors()}
    for name in sorted(file.tensors.keys() - used - set(beside)):
        yield f"{file.label}: tensor {show(name)} is not understood beside the others of its module"
    whole = Counter(update.target for update in updates if isinstance(update, Saved))
    yield from (f"{file.label}: {show(name)} is stored {n} times" for name, n in whole.items() if n > 1)


class _Reader:
    """Sorts the tensors of a file by module and gives each its meaning."""

    def __init__(self, file: Checkpoint, config: Config, tensors: Parts) -> None:
        self._file, self._label, self._config = file, file.label, config
        self._modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
        self._whole: dict[str, TensorInfo] = {}
        self._tuckers: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
        self._pooled: dict[str, TensorInfo] = {}
        self._packs: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
        for name, info in tensors.items():
            self._place(name, info)

    def _place(self, name: str, info: TensorInfo) -> None:
        if self._config.kind == "MOS" and name.startswith((*INDEX, POOL)):
            self._pooled[name] = info
            return
        if self._config.kind == KIND and (match := packs.PART.fullmatch(name)):
            self._packs[match[1]][match[2]] = info
            return
        if not DTYPES[info.dtype].arithmetic:
            raise InputRejected(f"{self._label}: tensor {show(info.name)} is {info.dtype}, expected floating numbers")
        if self._config.kind == "FLORA" and (match := PART.fullmatch(name)):
            self._tuckers[match[1]][match[2]] = info
            return
        for part in (*_PARTS[self._config.kind], *_TOKENS):
            if name.endswith("." + part):
                self._modules[name.removesuffix("." + part)][part] = info
                return
        self._whole[name] = info

    def updates(self) -> Iterator[Update]:
        problems: list[str] = []
        saved: list[Update] = [*self._saved(problems)]
        found: list[Update] = [
            *tuckers(self._file, self._tuckers, self._config),
            *shards(self._file, self._pooled, self._config),
            *packs.packed(self._file, self._packs),
        ]
        for module in sorted(self._modules):
            try:
                found += self._of_module(module, self._modules[module])
            except InputRejected as error:
                problems += error.problems
        InputRejected.gather(problems)
        if not saved and not found:
            raise InputRejected(f"{self._label} holds no tensor of an adapter")
        yield from saved
        yield from found

    # --- tensors stored whole -----------------------------------------------------------------------------

    def _saved(self, problems: list[str]) -> Iterator[Update]:
        for name, info in sorted(self._whole.items()):
            module, _, parameter = name.rpartition(".")
            if not self._is_expected(module, parameter):
                problems.append(f"{self._label}: tensor {show(info.name)} is not understood: no part of the adapter")
            yield Saved(module.replace(_BASE, ""), info, parameter)

    def _is_expected(self, module: str, parameter: str) -> bool:
        config, inner = self._config, module.replace(_BASE, "")
        if parameter == "bias" and config.content.get("bias") in ("all", "lora_only"):
            return True
        if module.endswith(_BASE):
            return parameter == "weight" and inner in self._modules
        *_, last = parts = inner.split(".")
        around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        named = config.names("modules_to_save")
        return last in _EMBEDDINGS or any(is_part(outer, name) for outer in around for name in named)

    # --- adapted modules ----------------------------------------------------------------------------------

    def _of_module(self, module: str, parts: Parts) -> Iterator[Update]:
        tokens = next((parts[name] for name in _TOKENS if name in parts), None)
        rest = {name: info for name, info in parts.items() if name not in _TOKENS}
        if tokens is not None:
            yield self._rows(module, tokens)
        if "lora_embedding_A" in rest or "lora_embedding_B" in rest:
            yield self._embedding(module, rest)
        elif rest:
            kind = next(iter(rest))[:4]
            makers = {"lora": self._low_rank, "hada": self._hadamard, "lokr": self._kronecker, "ia3_": self._scaled}
            if any(not name.startswith(kind) for name in rest):
                raise InputRejected(f"{self._label}: {show(module)} has factors of two kinds: {', '.join(rest)}")
            yield makers[kind](module, rest)

    def _rows(self, module: str, values: TensorInfo) -> Update:
        rows = self._config.tokens(module)
        if len(values.shape) != 2 or values.shape[0] != len(rows):
            raise self._wrong(values, f"for {len(rows)} tokens")
        return Rows(module, values, rows)

    def _embedding(self, module: str, parts: Parts) -> Update:
        a, b = self._both(module, parts, "lora_embedding_A", "lora_embedding_B")
        self._check_factors(module, a, b)
        magnitude = self._magnitude(module, parts, b.shape[0])
        return LowRank(module, a, b, self._config.rank(module), self._config.scaling(module), "embedding",
                       magnitude=magnitude)  # fmt: skip

    def _low_rank(self, module: str, parts: Parts) -> Update:
        inner = module.replace(_BASE, "")
        if self._targets(inner):
            return self._experts(module, inner, parts)
        a, b = self._both(module, parts, "lora_A.weight", "lora_B.weight")
        self._check_factors(module, a, b)
        bias, magnitude = self._bias(module, parts, b), self._magnitude(module, parts, b.shape[0])
        form = "linear" if len(a.shape) == 2 else "convolution"
        return LowRank(
            module, a, b, self._config.rank(module), self._config.scaling(module), form,  # type: ignore[arg-type]
            form == "linear" and self._config.flag("fan_in_fan_out"), magnitude, bias,
        )  # fmt: skip

    def _targets(self, module: str) -> list[str]:
        """The parameters of a module that are adapted by themselves, the innermost first."""
        pairs = [name.rpartition(".") for name in self._config.names("target_parameters")]
        found = {parameter for owner, _, parameter in pairs if is_part(module, owner)}
        order = {name: place for place, name in enumerate(_EXPERT_PARAMETERS)}
        return sorted(found, key=lambda name: (order.get(name, len(order)), name))

    def _experts(self, module: str, inner: str, parts: Parts) -> Update:
        """PEFT nests the modules of several parameters: the deepest ``base_layer`` is the first of them."""
        names = self._targets(inner)
        deepest = max(name.count(_BASE) for name in self._modules if name.replace(_BASE, "") == inner)
        place = deepest - module.count(_BASE)
        if deepest + 1 != len(names) or (len(names) > 1 and not set(names) <= set(_EXPERT_PARAMETERS)):
            raise InputRejected(f"{self._label}: which of {names} the factors of {show(module)} belong to is not clear")
        a, b = self._both(module, parts, "lora_A.weight", "lora_B.weight")
        rank = self._config.rank(f"{inner}.{names[place]}")
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] % rank:
            raise self._wrong(b, f"beside {list(a.shape)}, a multiple of rank {rank}")
        scaling = self._config.scaling(f"{inner}.{names[place]}")
        form = "experts" if a.shape[0] > rank else "linear"
        return LowRank(inner, a, b, rank, scaling, form, parameter=names[place])  # type: ignore[arg-type]

    def _hadamard(self, module: str, parts: Parts) -> Update:
        cores = [parts.get(f"hada_t{n}") for n in (1, 2)]
        if (cores[0] is None) != (cores[1] is None):
            raise InputRejected(f"{self._label}: {show(module)} has one of hada_t1 and hada_t2, expected both or none")
        left, right = (
            Product(None, *self._both(module, parts, f"hada_w{n}_a", f"hada_w{n}_b"), cores[n - 1]) for n in (1, 2)
        )
        return Hadamard(module, left, right, self._config.rank(module), self._config.scaling(module))

    def _kronecker(self, module: str, parts: Parts) -> Update:
        left, right = (self._kronecker_part(module, parts, n) for n in (1, 2))
        return Kronecker(module, left, right, self._config.rank(module), self._config.scaling(module))

    def _kronecker_part(self, module: str, parts: Parts, n: int) -> Product:
        whole, core = parts.get(f"lokr_w{n}"), parts.get(f"lokr_t{n}")
        if whole is None:
            return Product(None, *self._both(module, parts, f"lokr_w{n}_a", f"lokr_w{n}_b"), core)
        if any(f"lokr_{part}" in parts for part in (f"w{n}_a", f"w{n}_b", f"t{n}")):
            raise InputRejected(f"{self._label}: {show(module)} has lokr_w{n} both whole and as factors")
        return Product(whole)

    def _scaled(self, module: str, parts: Parts) -> Update:
        vector = parts["ia3_l"]
        wide = len(vector.shape) >= 2 and vector.shape[0] == 1
        if len(vector.shape) < 2 or (not wide and vector.shape[1] != 1):
            raise self._wrong(vector, "expected a row or a column")
        if len(vector.shape) > 2:
            raise InputRejected(f"{self._label}: {show(vector.name)} scales a convolution, which cannot be merged yet")
        return Scaled(module, vector, wide, self._config.flag("fan_in_fan_out"))

    # --- checks -------------------------------------------------------------------------------------------

    def _both(self, module: str, parts: Parts, a: str, b: str) -> tuple[TensorInfo, TensorInfo]:
        missing = a if a not in parts else b
        if missing not in parts:
            given = next(iter(parts.values())).name
            raise InputRejected(f"{self._label}: {show(given)} is there, but {show(f'{module}.{missing}')} is missing")
        return parts[a], parts[b]

    def _check_factors(self, module: str, a: TensorInfo, b: TensorInfo) -> None:
        rank = self._config.rank(module)
        if len(a.shape) != len(b.shape) or not 2 <= len(a.shape) <= 5 or a.shape[0] != rank:
            raise self._wrong(a, f"for rank {rank} in {self._config.where}")
        if b.shape[1:] != (rank, *(1 for _ in b.shape[2:])):
            grouped = " (factors of grouped convolutions cannot be merged)" if len(b.shape) > 2 else ""
            raise self._wrong(b, f"beside {list(a.shape)} of {show(a.name)}{grouped}")

    def _bias(self, module: str, parts: Parts, b: TensorInfo) -> TensorInfo | None:
        bias = parts.get("lora_B.bias")
        if (bias is not None) != self._config.flag("lora_bias"):
            state = "without the" if bias is None else "with a"
            raise InputRejected(f"{self._label}: {show(module)} is {state} bias, against lora_bias in its config")
        if bias is not None and bias.shape != b.shape[:1]:
            raise self._wrong(bias, f"beside {list(b.shape)} of {show(b.name)}")
        return bias

    def _magnitude(self, module: str, parts: Parts, size: int) -> TensorInfo | None:
        magnitude = parts.get("lora_magnitude_vector")
        if (magnitude is not None) != self._config.flag("use_dora"):
            state = "without" if magnitude is None else "with"
            raise InputRejected(
                f"{self._label}: {show(module)} is {state} lora_magnitude_vector, against use_dora in its config"
            )
        if magnitude is not None and magnitude.count != size:
            raise self._wrong(magnitude, f"expected {size} numbers")
        return magnitude

    def _wrong(self, info: TensorInfo, why: str) -> InputRejected:
        return InputRejected(f"{self._label}: tensor {show(info.name)} is {list(info.shape)}, {why}")
