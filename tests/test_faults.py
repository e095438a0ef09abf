"""A small part of each experiment of ``make faults``: runs that are killed, starved and lied to."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import smelt
from tests.faults import campaign, plan, room
from tests.faults.campaign import Result, Share
from tests.faults.scene import Scene, scene


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("faults")) as found:
        yield found


BOTH_WAYS: list[tuple[Callable[..., Result], int]] = [
    (campaign.kills_at_random, 5), (campaign.kills_at_points, 1), (campaign.operations_fail, 15),
    (campaign.syncs_fail, 2), (campaign.power_fails, 15), (campaign.rivals, 2), (campaign.signals, 5),
    (campaign.signals_at_places, 5),
]  # fmt: skip
ONE_WAY: list[tuple[Callable[..., Result], int]] = [
    (campaign.short_transfers, 5), (campaign.full_disk, 2), (campaign.inputs_change, 10), (campaign.surroundings, 6),
    (campaign.bit_rot, 8), (room.memory_is_short, 2),
]  # fmt: skip


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("experiment", "trials"), BOTH_WAYS, ids=lambda value: getattr(value, "__name__", ""))
def test_old_or_new(experiment: Callable[..., Result], trials: int, overwrite: bool, place: Scene) -> None:
    check(experiment(place, trials, overwrite))


@pytest.mark.parametrize(("experiment", "trials"), ONE_WAY, ids=lambda value: getattr(value, "__name__", ""))
def test_right_or_refused(experiment: Callable[..., Result], trials: int, place: Scene) -> None:
    check(experiment(place, trials))


def test_calls_of_the_c_library_fail(tmp_path: Path) -> None:
    library = campaign.shim(tmp_path)
    if library is None:
        pytest.skip("no C compiler")
    with scene(tmp_path, LD_PRELOAD=str(library)) as shimmed:
        check(campaign.below_python(shimmed, 10, False))


def check(result: Result) -> None:
    assert result.trials, "nothing was tried"
    assert result.problems == []


def test_the_checker_sees_what_it_forbids(place: Scene) -> None:
    """The tests above would pass on anything if this failed."""
    kinds: dict[str, Any] = {
        "I1": lambda out: (out / "config.json").write_text("{}"),
        "I2": lambda out: model.touch(),
        "I3": lambda out: (out.parent / "stranger").mkdir(),
        "I4": lambda out: None,
        "I5": lambda out: (out / "model-00001-of-00004.safetensors").unlink(),
    }
    model = place.folder / "inputs" / "m0" / "model.safetensors"
    when = model.stat().st_mtime_ns
    for kind, damage in kinds.items():
        with place.trial(overwrite=True) as out:
            assert campaign.violations(out, place.overwriting, 1) == []
            if kind != "I4":
                copy_instead_of_links(out)
            damage(out)
            found = campaign.violations(out, place.overwriting, 0 if kind == "I4" else 1)
            os.utime(model, ns=(when, when))
            assert any(problem.startswith(kind) for problem in found)


def test_a_limit_of_memory_is_felt(place: Scene) -> None:
    """Or methods would keep to anything: one that holds whole matrices, with more budget than there is memory."""
    method = smelt.methods.get("opcm")
    path = room.Models(place.folder / "felt", 1).recipe(method, "paper")
    assert room._run(place, path, 4096, 768)[0] == 1


def test_all_of_the_campaign_is_known() -> None:
    tasks = list(plan.tasks(0.001))
    assert {task.number for task in tasks} == {"1", "2", "3", "4", "5", "6", "7", "8", "10", "11", "12", "13", "17"}
    assert all(task.trials is None or task.trials > 0 for task in tasks)


def test_the_table_is_put_into_its_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{plan.BEGIN}old\n{plan.END}after\n")
    parts = [Result("1 a", 2, [], Counter({"old": 2})), Result("1 a", 1, ["bad"], Counter({"new": 1}))]
    plan.report(page, [parts[0].and_(parts[1])], 3.0)
    assert "old\n" not in page.read_text()
    assert "| 1 a | 3 | 1 | 0 | 1 new, 2 old |" in page.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")


def test_shares_make_up_the_whole() -> None:
    parts = [Share(number, 3).of(range(10)) for number in range(3)]
    assert sorted(trial for part in parts for trial in part) == list(range(10))


def copy_instead_of_links(folder: Path) -> None:
    """The old result is linked into each trial, so that damage would reach all of them."""
    for path in folder.iterdir():
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
