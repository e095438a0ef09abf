"""MoS (Wang et al., ICLR 2025, https://arxiv.org/abs/2410.00938): LoRA whose vectors are cut from shared pools.

All modules of one type ("q_proj") share ``pool.<type>.lora_A.weight`` (e L n, in / n) and ``pool.<type>.lora_B.weight``
(out / n, e L n). ``index_A.<module>`` and ``index_B.<module>`` (r n) say which shards make up a module's r vectors, n
for each. Which they are is drawn when an adapter is made, so that without the tables it means nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...errors import InputRejected, show
from ..base import Checkpoint, TensorInfo
from .config import Config
from .updates import Shards

INDEX = ("index_A.", "index_B.")
POOL = "pool."


def shards(file: Checkpoint, tensors: Mapping[str, TensorInfo], config: Config) -> Iterator[Shards]:
    """The update of each module. InputRejected for pools and tables that are missing or do not fit."""
    modules = sorted({name.removeprefix(prefix) for name in tensors for prefix in INDEX if name.startswith(prefix)})
    used = set()
    for module in modules:
        kind = module.rpartition(".")[2]
        names = [f"{POOL}{kind}.lora_A.weight", f"{POOL}{kind}.lora_B.weight", *(f"{table}{module}" for table in INDEX)]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise InputRejected(f"{file.label}: {show(missing[0])} is missing, which {show(module)} is made of")
        used.update(names)
        pool_a, pool_b, index_a, index_b = (tensors[name] for name in names)
        update = Shards(module, pool_a, pool_b, index_a, index_b, config.rank(module), config.scaling(module))
        InputRejected.gather(_problems(file, update, config))
        yield update
    unknown = sorted(tensors.keys() - used)
    InputRejected.gather(f"{file.label}: tensor {show(name)} is not understood: no module uses it" for name in unknown)


def _problems(file: Checkpoint, update: Shards, config: Config) -> Iterator[str]:
    rank, each = update.rank, config.count("shards_per_vector")
    own, private = config.count("equivalent_rank"), config.count("private_rank", least=0)
    size = update.pool_a.shape[0]
    where = f"{file.label}: {show(update.module)}"
    if len(update.pool_a.shape) != 2 or update.pool_b.shape[1:] != (size,) or size % (own * each):
        yield (
            f"{where}: pools of {list(update.pool_a.shape)} and {list(update.pool_b.shape)} do not hold "
            f"{each} shards for each of {own} vectors per layer"
        )
    elif not private <= own or rank - private > (own - private) * (size // (own * each)):
        yield f"{where}: {rank} vectors, {private} of them private, cannot be drawn from {own} per layer"
    for index in (update.index_a, update.index_b):
        if index.dtype not in ("I32", "I64") or index.shape != (rank * each,):
            yield (
                f"{file.label}: tensor {show(index.name)} is {index.dtype} {list(index.shape)}, "
                f"expected I64 [{rank * each}]: {each} shards for each of {rank} vectors"
            )
        elif not 0 <= int(file[index.name].min()) <= int(file[index.name].max()) < size:
            yield f"{file.label}: tensor {show(index.name)} points outside of a pool of {size} shards"
