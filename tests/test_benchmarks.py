"""The benchmarks' own machinery: what they write, run and print."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml
from benchmarks import cache, floor, measure, models, plot, recipes, report, run
from benchmarks.records import Rate, Run, Session, machine
from benchmarks.shapes import SIZES, Shape
from safetensors import safe_open
from safetensors.numpy import load_file

TINY = Shape(layers=2, hidden=64, inner=96, heads=4, kv_heads=2, vocabulary=300)
TIED = Shape(layers=1, hidden=64, inner=96, heads=4, kv_heads=2, vocabulary=300, tied=True)
LIMIT = 60_000


def write(folder: Path, shape: Shape, task_vector: int | None = None) -> Path:
    folder.mkdir()
    own = None if task_vector is None else models.Noise.task_vector(task_vector)
    models.write_model(folder, shape, models.Weights(models.Noise.weights(0), own), LIMIT)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models") / "base", TINY)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for path in folder.glob("*.safetensors") for name, array in load_file(path).items()}


def test_models_open_in_safetensors_with_the_shapes_of_the_config(base: Path) -> None:
    found = {name: array.shape for name, array in tensors_of(base).items()}
    assert found == TINY.tensors()
    config = json.loads((base / "config.json").read_text())
    assert found["model.embed_tokens.weight"] == (config["vocab_size"], config["hidden_size"])
    assert "lm_head.weight" in found
    assert "lm_head.weight" not in TIED.tensors()


def test_the_index_names_the_shard_that_holds_each_tensor(base: Path) -> None:
    index = json.loads((base / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(TINY.tensors())
    for file in set(index["weight_map"].values()):
        with safe_open(base / file, "numpy") as shard:
            assert set(shard.keys()) == {name for name, place in index["weight_map"].items() if place == file}
    assert index["metadata"]["total_size"] == TINY.nbytes


def test_a_shard_exceeds_the_limit_only_for_one_tensor() -> None:
    shards = models.plan_shards(SIZES["3B"].tensors())
    assert [name for names in shards for name in names] == list(SIZES["3B"].tensors())
    sizes = [sum(2 * int(np.prod(SIZES["3B"].tensors()[name])) for name in names) for names in shards]
    assert all(size <= models.SHARD_BYTES or len(names) == 1 for size, names in zip(sizes, shards, strict=True))


def test_models_are_the_same_bytes_every_time(base: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "again", TINY)
    names = sorted(path.name for path in base.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert all((base / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_task_vectors_are_small_heavy_tailed_and_differ(base: Path, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    start, *ends = (tensors_of(path)[name].astype(np.float32) for path in (
        base, write(tmp_path / "a", TINY, 1), write(tmp_path / "b", TINY, 2)
    ))  # fmt: skip
    first, second = (end - start for end in ends)
    assert np.std(first) == pytest.approx(7e-4, rel=0.2)
    assert np.abs(first).max() > 6 * np.std(first)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05


def test_rounding_to_bf16_is_to_nearest_even() -> None:
    values = np.random.default_rng(0).standard_normal(10_000, dtype=np.float32)
    halfway = (values.view(np.uint32) & 0xFFFF0000 | 0x8000).view(np.float32)
    for given in (values, halfway):
        assert np.array_equal(models.to_bf16(given), given.astype(ml_dtypes.bfloat16).view(np.uint16))


@pytest.mark.parametrize("merge", recipes.MERGES.values(), ids=list(recipes.MERGES))
def test_recipes_name_every_model_that_counts_as_input(merge: recipes.Timed) -> None:
    recipe = yaml.safe_load(merge.yaml("0.1B"))
    named = {path for entry in recipe["models"] for key, path in entry.items() if key in ("model", "statistics")}
    named |= {recipe.get("base_model")} - {None}
    assert named == {str(folder) for folder in merge.inputs("0.1B")}
    assert recipe["merge_method"] == merge.method


@pytest.mark.parametrize("flags", [[], ["--overlap"]], ids=["plain", "overlap"])
def test_the_floor_writes_as_many_bytes_as_a_model(base: Path, tmp_path: Path, flags: list[str]) -> None:
    out = tmp_path / "out"
    subprocess.run([sys.executable, floor.__file__, out, base, base, *flags], check=True)
    sizes = {path.name: path.stat().st_size for path in base.glob("*.safetensors")}
    assert {path.name: path.stat().st_size for path in out.iterdir()} == sizes


def test_a_cost_counts_children(tmp_path: Path) -> None:
    eat = "b = bytearray(100 << 20); b[::4096] = b[::4096].replace(bytes(1), bytes([1]))"
    cost = measure.run(["sh", "-c", f'"{sys.executable}" -c "{eat}" && true'], log=tmp_path / "log")
    assert cost.peak > 100 << 20
    assert cost.wall > 0 < cost.cpu


def test_a_failing_command_is_an_error_with_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code 3:\nno luck"):
        measure.run(["sh", "-c", "echo no luck; exit 3"], log=tmp_path / "log")


def test_warmed_files_are_in_the_page_cache(base: Path) -> None:
    files = list(base.glob("*.safetensors"))
    cache.warm(files)
    assert cache.cached(files) == 1


def test_entrants_alternate_and_mergekit_can_sit_out() -> None:
    order = [name for _, name in run.alternate(["floor", "smelt", "mergekit"], 2, 1)]
    assert order == ["floor", "smelt", "mergekit", "floor", "smelt"]


def session(*walls: tuple[str, int, float]) -> Session:
    runs = [Run("0.5B", "ties", "warm", who, number, 1.0, wall, wall, 10**8, 10**8, 0.0) for who, number, wall in walls]
    return Session("python -m benchmarks.run", machine(Path.cwd()), {"smelt": "0"}, runs, [Rate("ties", 4, 7.0, 3.0)])


def test_ratios_are_taken_within_a_round() -> None:
    (course,) = report.courses([session(("floor", 0, 1), ("smelt", 0, 2), ("floor", 1, 4), ("smelt", 1, 6))])
    assert course.ratios("smelt") == [2.0, 1.5]
    assert course.wall("mergekit") is None


def test_a_later_session_replaces_the_same_merge() -> None:
    (course,) = report.courses([session(("smelt", 0, 9)), session(("smelt", 0, 2))])
    assert course.wall("smelt") == 2


def test_records_survive_the_file(tmp_path: Path) -> None:
    saved = session(("floor", 0, 1))
    saved.save(tmp_path / "session.json")
    assert Session.load(tmp_path / "session.json") == saved


def test_the_table_has_one_cell_per_column() -> None:
    text = report.markdown([session(("floor", 0, 1), ("smelt", 0, 1.5), ("mergekit", 0, 60))])
    rows = [line for line in text.splitlines() if line.startswith(("| 0.5B", "| size"))]
    assert len({row.count("|") for row in rows}) == 1
    assert "| 1.50 | 1.50 |" in rows[1]
    assert rows[1].endswith("| 40.0 |")


def test_the_plot_is_well_formed_and_longer_times_have_longer_bars() -> None:
    svg = ElementTree.fromstring(
        plot.bar_chart("a < b", [("ties & more", {"floor": 1.2, "smelt": 1.5, "mergekit": 80})])
    )
    bars = [float(bar.get("width", 0)) for bar in svg.findall("{*}rect") if bar.get("x") == str(plot.LEFT)]
    assert bars == sorted(bars)
    assert len(set(bars)) == 3
