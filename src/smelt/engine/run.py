"""`smelt merge`: plan, run, publish."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from .. import storage
from ..checkpoint import Part, plan_shards
from ..errors import InputRejected, UsageError, show
from ..kernels.program import Copy, Operand
from ..methods import Model
from ..recipe import Stage
from .backbone import compare_backbones
from .card import card, hub_id, library_of, without_paths
from .config import patched_configs
from .device import mapper_for
from .execute import Executor
from .findings import Finding
from .inputs import Input, identity, licence_of
from .jobs import Job, Steps
from .journal import NAME as JOURNAL
from .journal import Journal, reads_of
from .manifest import NAME, dump, manifest, sums_of
from .options import options_of
from .outputs import STATE, Output
from .packing import PackingSink
from .planning import Plan, RecipeLike, make_plan
from .progress import Progress, Silent
from .publish import check_destination, check_space, claim, staging, work_folder, write_files
from .running import PART, StateSink
from .sink import DiskSink, write_gguf_tensors, write_tensors
from .stages import fingerprint, home_of, local_paths, plan_stages, stages_of, workplace
from .views import alike
from .whole import read_whole


@dataclass
class Artifact:
    """What a merge published."""

    path: Path
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path), "tensors": self.tensors, "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written, "seconds": round(self.seconds, 3), "warnings": self.warnings,
        }  # fmt: skip


def merge(
    recipe: RecipeLike, out: str | Path, *, models: Mapping[str, Any] | None = None, progress: Progress | None = None,
    **options: Any,
) -> Artifact:  # fmt: skip
    """Run a recipe and publish the result as the new folder ``out``: whole, or not at all.

    Parameters
    ----------
    recipe: path to a YAML file, a mapping of the same content, or parsed recipes.
    out: a folder that does not exist yet, or is empty; with ``overwrite`` also one that smelt has made.
    models: what names in the recipe stand for that are neither paths nor on the hub: a dict of arrays, a
        ``torch.nn.Module``, an opened checkpoint.
    options: device ("cpu", "cuda"), threads, memory ("1GiB"), seed, shard_size ("5GB"; default: the recipe's), on_extra
        ("error", "copy", "drop", "merge": a tensor that only some models have), on_nonfinite ("error", "warn",
        "allow"), force (merge models that do not share a backbone), strict (warnings are errors), card, raw
        (bare tensors: no config, layers, ties or side files), stages (a folder that keeps the results of the
        recipes that others take, for a later run; by default they do not last), truncate_embeddings (cut
        embeddings of different vocabularies to their common length), allow_pickle (read pickled weights, too),
        overwrite (replace ``out`` at once, when the result is whole), save_state (write what it takes to add models
        later, see :func:`smelt.continue_merge`; only some methods can), resume (None: continue what a run of the same
        recipe, options and files left when it was killed, and leave nothing after a failure; True: leave it, to be
        continued; False: begin anew).

    Raises UsageError, InputRejected or OperationFailed; then ``out`` is what it was before.
    """
    started = time.monotonic()
    out, chosen, shown = Path(out), options_of(**options), progress or Silent()
    places = dict(models or {})
    stages = stages_of(recipe, places)
    paths = local_paths(stages)
    if len(stages) == 1:
        return carry_out(replace(make_plan(stages[0].recipe, chosen, places), paths=paths), out, shown, started)
    if chosen.save_state:
        raise UsageError("save_state: what takes the results of other documents is not continued: merge these first")
    plan_stages(stages, chosen, places).close()
    check_destination(out, [], overwrite=chosen.overwrite)
    notices: list[str] = []
    with claim(out) as work, workplace(work, chosen) as place:
        for stage in stages[:-1]:
            plan = replace(make_plan(stage.recipe, chosen, places), paths=paths)
            places[stage.name], told = _finished(stage, plan, place, shown)
            notices += [f"stage {show(stage.name)}: {notice}" for notice in told]
        last = replace(make_plan(stages[-1].recipe, chosen, places), paths=paths)
        artifact = carry_out(last, out, shown, started, work)
    return replace(artifact, warnings=[*notices, *artifact.warnings])


def _finished(stage: Stage, plan: Plan, work: Path, progress: Progress) -> tuple[Path, list[str]]:
    """The folder that holds the result of a stage, and what there is to tell: run now, or by an earlier run."""
    home = home_of(stage, plan, work)
    if storage.exists(home):
        plan.close()
        return home, [f"taken from {show(home.name)}, where an earlier run left it"]
    return home, carry_out(plan, home, progress, time.monotonic()).warnings


def carry_out(plan: Plan, out: Path, progress: Progress, started: float, work: Path | None = None) -> Artifact:
    """Carry out a plan, and close it. ``work``: the destination's work folder where it is claimed already."""
    options, told = plan.options, list[str]()
    try:
        name = fingerprint(plan)
        warnings = [*plan.notices, *_check_before_running(plan, out, work_folder(out) / name, progress)]
        if options.resume is False:
            name = secrets.token_hex(8)
        with staging(
            out, work=work, name=name, overwrite=options.overwrite, keep=bool(options.resume), warn=told.append
        ) as folder:
            digests = _write_weights(plan, folder, progress, warnings, told)
            plan.inputs.check_unchanged()
            if plan.running is not None:
                plan.running.check_unchanged()
                warnings += _repeated(plan)
            _write_side_files(plan, folder, out.name, digests, warnings)
    finally:
        plan.close()
    seconds = time.monotonic() - started
    return Artifact(out, len(plan.outputs), plan.bytes_read, plan.bytes_written, seconds, [*warnings, *told])


# --- before ---------------------------------------------------------------------------------------------


def _check_before_running(plan: Plan, out: Path, begun: Path, progress: Progress) -> list[str]:
    """Destination, disk, backbone, integers: everything that can fail before the first byte is written.

    ``begun``: where an earlier attempt may have allocated its disk space.
    """
    check_destination(out, [*plan.inputs.folders(), *_continued(plan, out)], overwrite=plan.options.overwrite)
    check_space(out, plan.disk_needed - storage.allocated(begun))
    InputRejected.gather(problem for output in plan.outputs for problem in _differing_integers(output))
    warnings = _check_backbones(plan)
    if plan.running is not None:
        plan.running.check_intact(_base(plan), plan.inputs.ledger, plan.outputs, plan.options.threads, progress)
    return warnings


def _continued(plan: Plan, out: Path) -> list[Path]:
    """The folder of the merge that is continued, unless it is to be replaced, when the new one is whole."""
    earlier = plan.running.earlier if plan.running is not None else None
    replaced = earlier is not None and plan.options.overwrite and out.resolve() == earlier.folder.resolve()
    return [] if earlier is None or replaced else [earlier.folder]


def _base(plan: Plan) -> Input:
    assert plan.recipe.base_model is not None
    return plan.inputs[plan.recipe.base_model]


def _repeated(plan: Plan) -> Iterator[str]:
    """Models that were merged before, under whatever name."""
    assert plan.running is not None
    earlier = plan.running.earlier
    for entry in _added(plan) if earlier is not None else ():
        known = earlier.repeated(entry) if earlier is not None else None
        if known is not None:
            yield f"{show(entry['model'])} has been merged before, as {show(known)}: it counts twice"


def _added(plan: Plan) -> list[dict[str, Any]]:
    """The manifest's entries of the models that this run merges."""
    return [identity(item, plan.inputs.ledger) for item in plan.inputs if item is not _base(plan)]


def _check_backbones(plan: Plan) -> list[str]:
    """Refuse models of different descent unless forced; returns what is only worth a warning.

    Stacking layers of strangers is what people do on purpose, so with slices it is a warning at most; and so it
    is where the recipe aligns vocabularies that differ by more than a few added tokens.
    """
    if plan.method.max_models == 1 and plan.method.base == "ignored":
        return []
    base = plan.inputs[plan.recipe.base_model] if plan.recipe.base_model is not None else None
    seen = alike(plan.inputs.merged, plan.inputs.donor)
    models = [seen[item.label] for item in plan.inputs.merged if item is not base]
    aligned = plan.alignment.names if plan.alignment is not None else frozenset()
    findings = compare_backbones(models, seen[base.label] if base is not None else None, aligned)
    errors = [finding.message + _remedy(finding) for finding in findings if finding.severity == "error"]
    on_purpose = any(plan.recipe.output_slices()) or (plan.tokens is not None and plan.tokens.strangers)
    if errors and not on_purpose and not plan.options.force:
        InputRejected.gather([*errors[:-1], f"{errors[-1]} (--force merges them all the same)"])
    warnings = [finding.message for finding in findings if finding.severity == "warning"]
    if plan.options.strict:
        InputRejected.gather(warnings)
    return [*errors, *warnings]


def _remedy(finding: Finding) -> str:
    align = "; tokenizer_source: base, or union, merges each token with itself"
    return align if finding.code == "tokens-differ" else ""


def _differing_integers(output: Output) -> list[str]:
    """Integer tensors are copied, so all models must have the same."""
    sources = output.piece.sources
    if output.tensor is not None or len(sources) < 2:
        return []
    first = read_whole(sources[0].operand(None))
    return [
        f"tensor {show(output.name)} ({output.dtype}) is not merged but copied, and differs between "
        f"{sources[0].input.label} and {source.input.label}"
        for source in sources[1:]
        if (read_whole(source.operand(None)) != first).any()
    ]


# --- the weights ----------------------------------------------------------------------------------------


def _write_weights(
    plan: Plan, folder: Path, progress: Progress, warnings: list[str], told: list[str]
) -> dict[str, Any]:
    """Merge and write every tensor, but those that an earlier run has finished.

    Returns name -> dtype, shape, file, sha256. ``warnings`` are part of the result, what is ``told`` is not.
    """
    progress.start(plan.bytes_read + plan.bytes_made, "merging")
    parts = (Part(),) if plan.recipe.in_parts else plan.inputs.donor.checkpoint.parts
    seen: list[str] = []
    parts = (*parts, *([PART] if plan.running is not None else []))
    outputs = {output.name: output for output in plan.made}
    with Journal(folder.parent / JOURNAL, lambda name: reads_of(plan.inputs.ledger, outputs[name])) as journal:

        def warn(message: str) -> None:
            journal.paused = True  # the next run is to say the same
            seen.append(message)

        def fill(sink: DiskSink) -> None:
            told.extend(_remember(plan, sink, journal))
            if plan.running is not None:
                plan.running.read = sink.read
            with PackingSink(sink, plan.float8.forms if plan.float8 is not None else {}, folder) as packing:
                _execute(plan, packing, progress, warn)
            for notice in packing.notices():
                warn(notice)

        try:
            if plan.gguf is not None:
                return write_gguf_tensors(folder, plan.gguf, fill, journal)
            return write_tensors(folder, plan_shards(plan.stored(), plan.shard_size, parts=parts), fill, journal)
        finally:
            progress.finish()
            warnings += sorted(seen)


def _remember(plan: Plan, sink: DiskSink, journal: Journal) -> Iterator[str]:
    """Take over what an earlier run has read for the tensors that it has finished, and tell of it."""
    for read in (read for name in sink.done for read in journal.reads[name]):
        plan.inputs.ledger.remember(*read)
    if sink.done:
        yield f"continued a run that had ended early: {len(sink.done)} of {len(plan.made)} tensors were there"


def _execute(plan: Plan, sink: PackingSink, progress: Progress, warn: Callable[[str], None]) -> None:
    options = plan.options
    begin = partial(
        Executor, mapper=mapper_for(options.device, options.on_nonfinite, warn), threads=options.threads,
        memory=plan.budget.matrices, ahead=plan.budget.ahead, needs=_needs(plan), progress=progress,
    )  # fmt: skip
    progress.advance(sum(output.input_bytes + output.nbytes for output in plan.made if output.name in sink.done))
    if plan.running is not None:
        with begin(StateSink(sink)) as executor:
            executor.run(_jobs(plan, plan.running.outputs, sink.done))
    with begin(sink) as executor:
        executor.run(_jobs(plan, _surveyed(plan, executor), sink.done))
    for gathered in (source.gathered for output in plan.outputs for source in output.piece.sources):
        if gathered is not None:
            gathered.fingerprint()


def _needs(plan: Plan) -> Callable[[Operand], int]:
    """What a tensor takes whose operand it is, where it is held whole."""
    merged = [(output.tensor, plan.budget.matrix(output)) for output in plan.outputs if output.tensor is not None]
    known = {id(operand): whole for tensor, whole in merged for operand in (tensor.base, *tensor.models)}
    return lambda operand: known.get(id(operand), 0)


def _surveyed(plan: Plan, executor: Executor) -> Sequence[Output]:
    """Give every merged tensor what the method knows of the whole model."""
    tensors = tuple(output.tensor for output in plan.outputs if output.tensor is not None)
    if plan.method.survey is None or not tensors:
        return plan.outputs
    before = {} if plan.running is None else plan.running.before
    model = Model(tuple(sorted(tensors, key=lambda tensor: tensor.name)), before)
    known = executor.survey(plan.method.survey(model))
    if plan.running is not None:
        plan.running.known = known
    return [
        output if output.tensor is None else replace(output, tensor=replace(output.tensor, survey=known))
        for output in plan.outputs
    ]


def _jobs(plan: Plan, outputs: Iterable[Output], done: Collection[str]) -> list[Job]:
    return [_job(plan, output) for output in sorted(outputs, key=_disk_order) if output.name not in done]


def _disk_order(output: Output) -> tuple[str, int]:
    """Where the tensor's first source lies, so that files are read front to back."""
    source = output.piece.sources[0]
    info = source.input.checkpoint.tensors[source.name]
    return info.file, info.offset


def _job(plan: Plan, output: Output) -> Job:
    operands = [source.operand(plan.inputs.ledger) for source in output.piece.sources]
    tensor, dtype = output.tensor, plan.dtype_made(output)
    if tensor is None:
        return Job(output.name, dtype, output.count, operands[:1], lambda: Copy(operands[0]))

    def begin() -> Steps | Any:
        if plan.running is not None and output.part == STATE:
            return plan.running.begin(tensor)
        if output.part is not None and plan.method.parts is not None:
            return plan.method.parts(tensor)[output.part]
        return plan.method.merge(tensor)

    name = tensor.name if output.part == STATE else output.name
    return Job(name, dtype, tensor.count, operands, begin, plan.budget.matrix(output))


# --- what travels with them -----------------------------------------------------------------------------


def _write_side_files(plan: Plan, folder: Path, title: str, tensors: dict[str, Any], warnings: list[str]) -> None:
    """Config, tokenizer, model card, and last the manifest with the SHA-256 of all of them.

    A result in parts is no model that others could load, so it gets the manifest alone.
    """
    earlier = plan.running.earlier if plan.running is not None else None
    told = [] if earlier is None else earlier.content["notices"]
    notices = list(dict.fromkeys([*told, *(_public(plan, warning) for warning in warnings)]))
    state = {} if plan.running is None else {output.name: tensors.pop(output.name) for output in plan.running.outputs}
    files = {} if plan.recipe.in_parts else _model_files(plan, title, notices)
    write_files(folder, files)
    content = manifest(
        recipe=_public(plan, plan.recipe.text), method=plan.method.name, variant=plan.variant, seed=plan.seed,
        inputs=_entries(plan),
        statistics=[identity(item, plan.inputs.ledger) for item in plan.inputs.beside.values()],
        measured=[_measured(plan, *found) for found in plan.measured],
        tensors=tensors, files=sums_of(folder, files), notices=notices, options=_options(plan),
        state=_state(plan, state),
    )  # fmt: skip
    storage.write_small(folder / NAME, dump(content))


def _entries(plan: Plan) -> list[dict[str, Any]]:
    """The inputs, with those of the merge that is continued."""
    if plan.running is None or plan.running.earlier is None:
        return [identity(item, plan.inputs.ledger) for item in plan.inputs]
    return plan.running.earlier.joined(_added(plan))


def _state(plan: Plan, tensors: Mapping[str, Any]) -> dict[str, Any] | None:
    if plan.running is None:
        return None
    return plan.running.record([entry["model"] for entry in _added(plan)], tensors)


def _options(plan: Plan) -> dict[str, Any]:
    """What must be the same for the same bits."""
    options = plan.options
    return {
        "on_extra": options.on_extra, "on_nonfinite": options.on_nonfinite, "raw": options.raw, "card": options.card,
        "shard_size": plan.shard_size, "truncate_embeddings": options.truncate_embeddings,
        **({"save_state": True} if options.save_state else {}),
    }  # fmt: skip


def _model_files(plan: Plan, title: str, notices: Sequence[str]) -> dict[str, bytes]:
    """Of a GGUF file only the card: it holds the rest itself."""
    files = {} if plan.gguf is not None else plan.side_files() | patched_configs(plan)
    if plan.options.card:
        files["README.md"] = _card(plan, title, notices).encode()
    return files


def _card(plan: Plan, title: str, notices: Sequence[str]) -> str:
    base = plan.recipe.base_model
    names = [name for item in plan.inputs.merged if not item.is_local for name in item.label.split("+")]
    items = [item for item in plan.inputs.merged if base is None or item.label != base.text]
    earlier = plan.running.earlier if plan.running is not None else None
    before = [] if earlier is None else earlier.models
    names = [*(name for entry in before if entry["revision"] for name in entry["model"].split("+")), *names]
    return card(
        title=title,
        method=plan.method,
        base=None if base is None else plan.inputs[base].public,
        models=[*(entry["model"] for entry in before), *(item.public for item in items)],
        hub_ids=[name for text in dict.fromkeys(names) if (name := hub_id(text))],
        license_name=licence_of(plan.inputs, None if earlier is None else earlier.folder),
        recipe=_public(plan, plan.recipe.text),
        notices=notices,
        library=library_of(plan.inputs.donor.checkpoint.beside),
    )


def _measured(plan: Plan, label: str, values: dict[str, float]) -> dict[str, Any]:
    item = next(item for item in plan.inputs if item.label == label)
    return {"model": item.public, **values}


def _public(plan: Plan, text: str) -> str:
    return without_paths(text, [plan.recipe.origin, *plan.inputs.local_paths(), *plan.paths])
