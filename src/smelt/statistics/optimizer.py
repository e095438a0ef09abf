"""Adam's second moment out of a training checkpoint, by the names of the model's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import storage
from ..checkpoint import Checkpoint, CheckpointWriter, TensorInfo, load, plan_shards
from ..checkpoint.documents import read_json
from ..checkpoint.torch_file import TorchFile
from ..engine.options import SHARD_SIZE
from ..engine.publish import check_destination, check_space, staging
from ..engine.tiles import TILE
from ..errors import InputRejected, show
from ..kernels.dtypes import DTYPES
from .assembled import AssembledCheckpoint
from .deepspeed import Placed, is_zero, read_zero
from .trainer import read_torch

KIND = "exp_avg_sq"


def import_optimizer(
    source: str | Path,
    model: str | Path | Mapping[str, Any],
    out: str | Path | None = None,
    *,
    order: Sequence[str] | None = None,
) -> Checkpoint:
    """Adam's second moment of each trained tensor of ``model``: a statistics checkpoint.

    Parameters
    ----------
    source: a file of ``torch.save(optimizer.state_dict())``, a checkpoint folder of Hugging Face's Trainer
        (optimizer.pt), or a folder of DeepSpeed ZeRO, stages 1 to 3. Neither torch nor DeepSpeed is needed, and
        no code in the files is run.
    model: the model that was trained, for names and shapes: a checkpoint or a dict of arrays.
    out: a new folder to write the statistics to, for ``statistics:`` in a recipe; without it nothing is written.
    order: the names of the trained parameters in the order of ``model.named_parameters()``, for plain optimizer
        states of models whose order is not known here.

    Returns a checkpoint with a tensor ``exp_avg_sq/<name>`` for each trained tensor, of its shape, in the dtype of
    the file; its metadata holds the step and the options of the optimizer that the files tell. The numbers are as
    stored: no bias correction. Raises InputRejected when the files are malformed, unsafe, or do not fit the model.
    """
    known = model if isinstance(model, Checkpoint) else load(model)
    shapes = {name: info.shape for name, info in known.tensors.items()}
    files: list[TorchFile] = []
    try:
        found = _read(Path(source), _untied(shapes, known.config), files, order)
        found.check_unchanged()
        if out is None:
            return found
        return _write(found, Path(out))
    except BaseException:
        for file in files:
            file.close()
        raise


def _untied(shapes: dict[str, tuple[int, ...]], config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Without the head where it is the embedding once more: a tied tensor is one parameter."""
    tied = bool(config.get("tie_word_embeddings"))
    return {name: shape for name, shape in shapes.items() if not (tied and name == "lm_head.weight")}


def _read(
    source: Path, shapes: dict[str, tuple[int, ...]], files: list[TorchFile], order: Sequence[str] | None
) -> AssembledCheckpoint:
    home = _tagged(source)
    try:
        if storage.is_folder(home) and is_zero(home):
            placed, options = read_zero(home, files, KIND)
        else:
            path = home / "optimizer.pt" if storage.is_folder(home) else home
            placed, options = read_torch(path, shapes, files, KIND, order)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InputRejected(f"{storage.shown(home)}: not an optimizer state as it should be: {error!r}") from error
    _check_shapes(home, placed, shapes)
    named = {f"{KIND}/{name}": place for name, place in placed.items()}
    return AssembledCheckpoint(str(source), named, files, {"kind": KIND, **_metadata(source, options)})


def _tagged(source: Path) -> Path:
    """The folder of the newest state, where a file ``latest`` names it."""
    if not storage.is_folder(source) or "latest" not in storage.listdir(source):
        return source
    tag = storage.read_small(source / "latest", 4096).decode("utf-8", "replace").strip()
    if not tag or tag in (".", "..") or any(mark in tag for mark in "/\\\0"):
        raise InputRejected(f"{storage.shown(source / 'latest')} names {show(tag)}, expected a folder beside it")
    return source / tag


def _check_shapes(home: Path, placed: Placed, shapes: Mapping[str, tuple[int, ...]]) -> None:
    where = storage.shown(home)
    strange = sorted(name for name in placed if name not in shapes)
    problems = [f"{where}: no tensor of the model is called {show(name)}" for name in strange[:5]]
    problems += [
        f"{where}: the state of {show(name)} is {list(shape)}, the model's tensor {list(shapes[name])}"
        for name, (shape, _) in sorted(placed.items())
        if name in shapes and shape != shapes[name]
    ]
    if not placed:
        problems.append(f"{where} holds no {KIND}: only optimizers of Adam's kind have it")
    InputRejected.gather(problems)


def _metadata(source: Path, options: Mapping[str, Any]) -> dict[str, str]:
    """What the files tell of the run, as text."""
    told = {name: options[name] for name in ("lr", "betas", "eps", "weight_decay") if name in options}
    if storage.is_folder(source) and "trainer_state.json" in storage.listdir(source):
        state = read_json(source / "trainer_state.json")
        told |= {name: state[name] for name in ("global_step", "train_batch_size") if name in state}
    return {name: str(value) for name, value in told.items() if isinstance(value, int | float | str | tuple | list)}


def _write(found: AssembledCheckpoint, out: Path) -> Checkpoint:
    """Copy tile by tile into a new folder, whole or not at all."""
    infos = [TensorInfo(info.name, info.dtype, info.shape) for info in found.tensors.values()]
    check_destination(out, [])
    check_space(out, sum(info.nbytes for info in infos))
    with staging(out) as folder:
        writer = CheckpointWriter(folder, plan_shards(infos, SHARD_SIZE, found.metadata))
        try:
            for info in infos:
                _copy(found, info, writer)
            writer.finish()
        finally:
            writer.abort()
        found.check_unchanged()
    found.close()
    return load(out)


def _copy(found: Checkpoint, info: TensorInfo, writer: CheckpointWriter) -> None:
    buffer = np.empty(min(TILE, info.count), DTYPES[info.dtype].storage)
    for start in range(0, info.count, TILE):
        part = buffer[: min(TILE, info.count - start)]
        found.read(info.name, start, part)
        writer.write(info.name, start, part)
