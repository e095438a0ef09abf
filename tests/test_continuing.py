"""Models that are added one by one to a merge give the bits of all at once, without those merged before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import smelt
from smelt import methods
from smelt.cli import main
from smelt.engine import journal, plan_continued, reproduce
from smelt.errors import InputRejected, OperationFailed, UsageError
from tests.faults.checker import files_of
from tests.recipes import Family
from tests.small_models import TOKENS, Arrays, bf16, fine_tuned, llama, save

MANIFEST = "smelt-manifest.json"
STATE = "smelt-state/state.safetensors"
ABLE = ("opcm", "task_arithmetic")
PARAMETERS = {"opcm": {"alpha": 0.4}, "task_arithmetic": {"weight": 0.4, "lambda": 0.7}}


@pytest.fixture(scope="module")
def experts(family: Family, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Five fine-tunes of the family's base."""
    folder = tmp_path_factory.mktemp("experts")
    more = (bf16(fine_tuned(llama(0), seed)) for seed in (7, 8))
    return (*family.models, *(save(folder / f"late{i}", arrays, tokens=TOKENS) for i, arrays in enumerate(more)))


def tree(method: str, models: Any, base: str, **more: Any) -> dict[str, Any]:
    parameters = {**PARAMETERS[method], **more.pop("parameters", {})}
    listed = [{"model": str(model)} for model in models]
    return {"merge_method": method, "models": listed, "base_model": str(base), "parameters": parameters, **more}


def begun(recipe: dict[str, Any], out: Path, **options: Any) -> Path:
    """A merge that saves its state."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return smelt.merge(recipe, out, save_state=True, **options).path


def one_by_one(recipe: dict[str, Any], folder: Path, *steps: int, **options: Any) -> Path:
    """The same models, so many at each step; every result is called ``out``."""
    listed, first = recipe["models"], steps[0]
    made = begun({**recipe, "models": listed[:first]}, folder / "0" / "out", **options)
    for number, size in enumerate(steps[1:], 1):
        added, first = [entry["model"] for entry in listed[first : first + size]], first + size
        (folder / str(number)).mkdir()
        made = smelt.continue_merge(made, added, folder / str(number) / "out", base=recipe["base_model"]).path
    return made


def contents(folder: Path) -> dict[str, Any]:
    """Every file byte by byte; the manifest without its steps."""
    files: dict[str, Any] = dict(files_of(folder))
    told = json.loads(files[MANIFEST])
    told["state"].pop("steps")
    return {**files, MANIFEST: told}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "opcm": ("opcm", {}),
    "in float32": ("opcm", {"dtype": "float32"}),
    "without a diagonal": ("opcm", {"parameters": {"zero_diagonal": True, "alpha": 0.5}}),
    "in shards": ("opcm", {"output": {"shard_size": "50kB"}}),
    "partly": ("opcm", {"parameters": {"exclude": [".*mlp.*", "lm_head"]}}),
    "by filter": ("task_arithmetic", {"parameters": {"weight": [{"filter": "mlp", "value": 0.2}, {"value": [0, 1]}]}}),
    "task arithmetic": ("task_arithmetic", {}),
    "mergekit's": ("task_arithmetic", {"parameters": {"variant": "mergekit"}, "out_dtype": "float32"}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_by_one_gives_all_at_once(case: str, family: Family, experts: tuple[str, ...], tmp_path: Path) -> None:
    """Weights, state, card and manifest, but for its list of steps; and saving the state changes no weight."""
    method, more = CASES[case]
    recipe = tree(method, experts, family.base, **more)
    whole = begun(recipe, tmp_path / "at-once" / "out", threads=2)
    plain = files_of(smelt.merge(recipe, tmp_path / "plain").path)
    assert all(files_of(whole)[name] == plain[name] for name in plain if name.startswith("model"))
    for number, steps in enumerate([(1, 1, 1, 1, 1), (2, 3), (3, 1, 1)]):
        made = one_by_one(recipe, tmp_path / str(number), *steps, threads=1)
        assert contents(made) == contents(whole)
        assert [len(step["models"]) for step in json.loads((made / MANIFEST).read_text())["state"]["steps"]] == [*steps]


def test_mixed_types_and_what_is_not_merged(tmp_path: Path) -> None:
    """float64 after and before others, float16 beside bfloat16, integers, embeddings, vectors, three axes, nothing."""
    random = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (11, 6),
        "w": (9, 6),
        "wide": (6, 40),
        "b": (6,),
        "c": (4, 3, 2),
        "e": (0, 6),
    }
    base = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    ids = {"position_ids": np.arange(6)}
    for kinds in (("f8", "f4", "f4"), ("f4", "f2", "f4"), ("f2", "f2", "f2")):
        home = tmp_path / "".join(kinds)
        home.mkdir()
        paths = [save(home / f"m{i}", {**fine_tuned(base, i, 0.1), **ids}, config={}) for i in range(3)]
        for path, kind in zip(paths, kinds, strict=True):
            arrays = load_file(Path(path) / "model.safetensors")
            save_file({k: v.astype(kind) if v.dtype == np.float32 else v for k, v in arrays.items()},
                      Path(path) / "model.safetensors")  # fmt: skip
        recipe = tree("opcm", paths, save(home / "base", {**base, **ids}, config={}))
        assert contents(one_by_one(recipe, home, 1, 2)) == contents(begun(recipe, home / "all" / "out"))


def test_float64_after_float32_is_refused(family: Family, tmp_path: Path) -> None:
    """The bits would not be those of all at once."""
    arrays = {name: array.astype(np.float64) for name, array in family.model_arrays[1].items()}
    made = begun(tree("opcm", family.models[:1], family.base), tmp_path / "out")
    with pytest.raises(InputRejected, match=r"is in float64, but 'out' has added it up in float32: merge all"):
        smelt.continue_merge(made, [save(tmp_path / "wide", arrays)], tmp_path / "next", base=family.base)


# --- what the folder is to others -----------------------------------------------------------------------


@pytest.fixture
def made(family: Family, tmp_path: Path) -> Path:
    """A merge of two models with its state."""
    return begun(tree("opcm", family.models[:2], family.base), tmp_path / "made")


def test_the_state_is_no_weight(family: Family, made: Path) -> None:
    """Nothing beside config.json and no index names it: what loaders take for weights are the weights."""
    assert sorted(path.name for path in made.glob("*.safetensors*")) == ["model.safetensors"]
    with smelt.load(made) as model:
        assert sorted(model) == sorted(family.base_arrays)
    state = load_file(made / STATE)
    assert sorted(state) == sorted(family.base_arrays)
    assert {array.dtype for array in state.values()} == {np.dtype(np.float32)}


def test_the_models_of_before_are_not_needed(family: Family, experts: tuple[str, ...], tmp_path: Path) -> None:
    copies = [shutil.copytree(path, tmp_path / Path(path).name) for path in experts[:2]]
    out = begun(tree("opcm", copies, family.base), tmp_path / "out")
    for copy in copies:
        shutil.rmtree(copy)
    shutil.copytree(family.base, tmp_path / "base")  # found beside what is continued
    more = smelt.continue_merge(out, [experts[3]], tmp_path / "more").path
    assert smelt.verify(more).ok
    with pytest.raises(InputRejected, match="'expert0': no such folder"):
        reproduce(more, {"base": family.base, "late0": experts[3]})
    everything = {Path(path).name: path for path in (*experts, family.base)}
    assert reproduce(more, everything).ok


def test_what_is_planned_does_not_grow(family: Family, experts: tuple[str, ...], tmp_path: Path) -> None:
    """Memory, bytes read and written after one model and after four."""
    few, many = (begun(tree("opcm", experts[:n], family.base), tmp_path / str(n)) for n in (1, 4))
    plans = [plan_continued(made, [experts[4]], base=family.base, threads=1) for made in (few, many)]
    figures = [(p.peak_memory, p.bytes_read, p.bytes_written, p.disk_needed) for p in plans]
    assert figures[0] == figures[1]
    for plan in plans:
        plan.close()


def test_verify_and_reproduce_cover_the_state(family: Family, made: Path) -> None:
    assert smelt.verify(made).ok
    stored = (made / STATE).read_bytes()
    for offset in (100, len(stored) // 2, len(stored) - 1):
        changed = bytearray(stored)
        changed[offset] ^= 1
        (made / STATE).write_bytes(changed)
        assert any("state.safetensors" in problem for problem in smelt.verify(made).problems)
    (made / STATE).write_bytes(stored)
    told = json.loads((made / MANIFEST).read_text())
    told["state"]["tensors"]["lm_head.weight"]["sha256"] = "0" * 64
    (made / MANIFEST).write_text(json.dumps(told))
    assert any("'lm_head.weight'" in problem for problem in smelt.verify(made).problems)
    found = reproduce(made, family.folder)
    assert found.problems == ["tensor 'lm_head.weight' of the state came out differently"]


def test_a_state_that_no_manifest_tells_of_is_found(family: Family, made: Path, tmp_path: Path) -> None:
    plain = smelt.merge(tree("opcm", family.models[:2], family.base), tmp_path / "plain").path
    shutil.copytree(made / "smelt-state", plain / "smelt-state")
    assert smelt.verify(plain).problems == [f"file '{STATE}' is not in the manifest"]


# --- runs -----------------------------------------------------------------------------------------------


def test_the_command_line(
    family: Family, experts: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Save, look, add two; then add in place, where the folder is replaced when the new one is whole."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.json").write_text(json.dumps(tree("opcm", experts[:2], family.base)))
    assert main(["merge", "recipe.json", "a", "--save-state"]) == 0
    assert main(["merge", "--continue", "a", *experts[2:4], "b", "--base", family.base, "--dry-run"]) == 0
    assert not Path("b").exists()
    assert main(["merge", "--continue", "a", *experts[2:4], "b", "--base", family.base, "--threads", "1"]) == 0
    assert capsys.readouterr().out.endswith("b\n")
    assert smelt.verify("b").ok
    before = files_of(Path("b"))
    assert main(["merge", "--continue", "b", experts[4], "b", "--base", family.base]) == 2
    assert files_of(Path("b")) == before
    assert main(["merge", "--continue", "b", experts[4], "b", "--base", family.base, "--overwrite"]) == 0
    whole = begun(tree("opcm", experts, family.base), tmp_path / "all" / "b")
    assert contents(Path("b")) == contents(whole)


class Stopping:
    """Progress that ends the run when so much of the merge itself is done."""

    def __init__(self, after: int) -> None:
        self.left, self.label = after, ""

    def start(self, total_bytes: int, label: str) -> None:
        self.label = label

    def advance(self, nbytes: int) -> None:
        self.left -= nbytes if self.label == "merging" else 0
        if self.left < 0:
            raise OperationFailed("stopped")

    def finish(self) -> None: ...


@pytest.mark.parametrize("after", [300_000, 900_000, 1_500_000])
def test_a_stopped_run_is_taken_up(
    after: int, family: Family, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of the state, of the survey, of the weights."""
    monkeypatch.setattr(journal, "INTERVAL", 1)
    added, base = [family.models[2]], {"base": family.base}
    (tmp_path / "whole").mkdir()
    whole = smelt.continue_merge(made, added, tmp_path / "whole" / "out", **base).path
    with pytest.raises(OperationFailed, match="stopped"):
        smelt.continue_merge(made, added, tmp_path / "out", progress=Stopping(after), threads=1, resume=True, **base)
    again = smelt.continue_merge(made, added, tmp_path / "out", **base)
    assert any("continued a run" in warning for warning in again.warnings)
    assert files_of(again.path) == files_of(whole)


def test_arrays_and_entries_of_a_recipe(family: Family, tmp_path: Path) -> None:
    """Models in memory, the base too, and parameters beside a model."""
    places = {"one": family.model_arrays[0], "two": family.model_arrays[1]}
    entries = [{"model": "one", "parameters": {"weight": 0.25}}, {"model": "two", "parameters": {"weight": 2.0}}]
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": entries}
    options: dict[str, Any] = {"raw": True, "save_state": True}
    whole = smelt.merge(recipe, tmp_path / "all", models={**places, "base": family.base_arrays}, **options).path
    first = {**recipe, "models": entries[:1]}
    made = smelt.merge(first, tmp_path / "out", models={"one": places["one"], "base": family.base_arrays}, **options)
    more = smelt.continue_merge(
        made.path, entries[1:], tmp_path / "more", base=family.base_arrays, models={"two": places["two"]}
    )
    assert (more.path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (more.path / STATE).read_bytes() == (whole / STATE).read_bytes()


def test_paths_and_names_that_recur(family: Family, made: Path, tmp_path: Path) -> None:
    """A path as an entry has it, and two models of one name, of which one is in memory."""
    save(tmp_path / "expert2", family.model_arrays[1])
    added = [{"model": Path(family.models[2])}, tmp_path / "expert2", "expert0"]
    places = {"expert0": family.model_arrays[2]}
    more = smelt.continue_merge(made, added, tmp_path / "out", base=family.base, models=places)
    assert [entry["model"] for entry in json.loads((more.path / MANIFEST).read_text())["inputs"]] == [
        "expert0", "expert1", "expert2", "expert2-2", "expert0-2", "base",
    ]  # fmt: skip


def test_not_a_number_is_told_by_the_name_of_its_tensor(family: Family, made: Path, tmp_path: Path) -> None:
    arrays = {name: array.copy() for name, array in family.model_arrays[2].items()}
    arrays["model.norm.weight"][3] = np.nan
    with pytest.raises(OperationFailed, match=r"bad: tensor 'model.norm.weight' holds"):
        smelt.continue_merge(made, [save(tmp_path / "bad", arrays)], tmp_path / "out", base=family.base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "made"]


def test_the_same_model_twice_is_told(family: Family, made: Path, tmp_path: Path) -> None:
    """It gets a name of its own, by which the result can be made again."""
    again = smelt.continue_merge(made, [family.models[1]], tmp_path / "again", base=family.base)
    assert again.warnings == ["'expert1-2' has been merged before, as 'expert1': it counts twice"]
    assert smelt.verify(again.path).ok
    everything = {Path(path).name: path for path in (*family.models, family.base)}
    assert reproduce(again.path, {**everything, "expert1-2": family.models[1]}).ok


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in methods.names() if methods.get(name).running is None])
def test_other_methods_are_refused(method: str, family: Family, tmp_path: Path) -> None:
    """Where the state is to be saved, and where it is to be continued."""
    chosen = methods.get(method)
    recipe: dict[str, Any] = {"merge_method": method, "models": [{"model": m} for m in family.models[:2]]}
    with pytest.raises(UsageError):
        smelt.merge({**recipe, "base_model": family.base}, tmp_path / "out", save_state=True)
    folder = tmp_path / "made"
    folder.mkdir()
    known = {"format": 1, "method": method, "tensors": {}, "files": {}, "recipe": json.dumps(recipe)}
    (folder / MANIFEST).write_text(json.dumps(known))
    with pytest.raises(UsageError, match="cannot be continued, only opcm and task_arithmetic can") as error:
        smelt.continue_merge(folder, family.models[2:], tmp_path / "out")
    assert chosen.title in str(error.value)
    assert len(error.value.problems) == 1


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "shuffled": ({"parameters": {"shuffle": True}}, {}, "with shuffle the order of the models is drawn from how many"),
    "nan": ({}, {"on_nonfinite": "allow"}, "on_nonfinite allow would let NaN into the state"),
    "gguf": ({"output": {"format": "gguf"}}, {}, "the result must be plain safetensors"),
    "tokens": ({"tokenizer_source": "union"}, {}, "vocabularies that are brought into line depend on all models"),
    "lines": ({"lines": {"beta": 0.5, "alpha": 0.5}}, {}, "OPCM, orthogonal projection with LiNeS merges cannot be"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_state_that_would_not_do_is_not_saved(case: str, family: Family, tmp_path: Path) -> None:
    more, options, told = REFUSED[case]
    with pytest.raises(UsageError, match=told):
        begun(tree("opcm", family.models[:2], family.base, **more), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_sum_that_is_divided_by_its_weights_is_not_saved(family: Family, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="save_state: with normalize it is divided by the weights of all models"):
        begun(tree("task_arithmetic", family.models, family.base, parameters={"normalize": True}), tmp_path / "out")


def test_a_tensor_of_one_model_alone_is_not_saved(family: Family, tmp_path: Path) -> None:
    more: Arrays = {**family.model_arrays[0], "extra.weight": np.ones((3, 3), np.float32)}
    recipe = tree("opcm", [save(tmp_path / "more", more), family.models[1]], family.base)
    with pytest.raises(UsageError, match=r"tensor 'extra.weight' is not made of the base and all models"):
        begun(recipe, tmp_path / "out", on_extra="copy")
    assert smelt.verify(begun(recipe, tmp_path / "out", on_extra="drop")).ok


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    told = json.loads((folder / MANIFEST).read_text())
    change(told)
    (folder / MANIFEST).write_text(json.dumps(told))


def no_state(folder: Path) -> None:
    changed(folder, lambda told: told.pop("state"))


def another_format(folder: Path) -> None:
    changed(folder, lambda told: told["state"].update(format=2))


def another_manifest(folder: Path) -> None:
    changed(folder, lambda told: told["state"].update(numbers=[]))


def fewer_inputs(folder: Path) -> None:
    changed(folder, lambda told: told["inputs"].pop())


def no_files(folder: Path) -> None:
    shutil.rmtree(folder / "smelt-state")


def a_flipped_bit(folder: Path) -> None:
    stored = bytearray((folder / STATE).read_bytes())
    stored[-1] ^= 1
    (folder / STATE).write_bytes(stored)


def fewer_tensors(folder: Path) -> None:
    state = load_file(folder / STATE)
    save_file({name: array for name, array in state.items() if "norm" not in name}, folder / STATE)


def no_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


SPOILT = {
    no_state: "holds no state to continue from: merge with --save-state",
    another_format: "its state is not one that this version reads: format 2, expected 1",
    another_manifest: "does not tell what there is to continue",
    fewer_inputs: "does not tell what there is to continue",
    no_files: "smelt-state': no such file or folder",
    a_flipped_bit: "tensor 'model.norm.weight' differs from the manifest: merge all models again",
    fewer_tensors: "tensor 'model.norm.weight' is not what the manifest says",
    no_manifest: "it was not made by smelt, or is not whole",
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_a_state_that_is_not_whole_is_refused(
    spoil: Callable[[Path], None], family: Family, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line or more, exit code 3, and nothing is left."""
    spoil(made)
    out = made.parent / "next"
    assert main(["merge", "--continue", str(made), family.models[2], str(out), "--base", family.base]) == 3
    told = capsys.readouterr().err
    assert SPOILT[spoil] in told
    assert "Traceback" not in told
    assert [path.name for path in made.parent.iterdir()] == ["made"]


def test_another_base_is_refused(family: Family, made: Path, tmp_path: Path) -> None:
    """By its content, whatever it is called; and by its absence."""
    other = save(tmp_path / "other", bf16(llama(5)), tokens=TOKENS)
    with pytest.raises(InputRejected, match=r"base is not the base that '.*made' was merged on: say where that is"):
        smelt.continue_merge(made, [family.models[2]], tmp_path / "out", base=other, force=True)
    with pytest.raises(InputRejected, match=r"the base 'base' is not here: say where it is, with --base \(base=\)"):
        smelt.continue_merge(made, [family.models[2]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit_are_refused(family: Family, made: Path, tmp_path: Path) -> None:
    fewer = {name: array for name, array in family.model_arrays[2].items() if name != "lm_head.weight"}
    where = save(tmp_path / "fewer", fewer, tokens=TOKENS)
    with pytest.raises(InputRejected, match=r"lm_head.weight"):
        smelt.continue_merge(made, [where], tmp_path / "out", base=family.base)
    with pytest.raises(UsageError, match="there is no model to add"):
        smelt.continue_merge(made, [], tmp_path / "out", base=family.base)


@pytest.mark.parametrize("option", ["seed=3", "on_extra=drop", "raw=1", "save_state=1", "on_nonfinite=warn"])
def test_what_is_settled_is_not_changed(option: str, family: Family, made: Path, tmp_path: Path) -> None:
    name, _, value = option.partition("=")
    with pytest.raises(UsageError, match=f"{name} is that of the merge that is continued: leave it out"):
        smelt.continue_merge(made, [family.models[2]], tmp_path / "out", base=family.base, **{name: value})


LINES = {
    "merge --continue made": "takes the models to add and OUT",
    "merge --continue made new": "takes the models to add and OUT",
    "merge recipe.yml out --base b": "--base has no effect without --continue",
    "merge recipe.yml a b": "unexpected extra arguments (b)",
    "merge": "Missing argument 'RECIPE'",
    "merge --continue made new out --seed 1": "seed is that of the merge that is continued",
}


@pytest.mark.parametrize("line", LINES)
def test_command_lines_that_are_wrong(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert LINES[line] in capsys.readouterr().err
