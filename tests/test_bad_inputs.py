"""Every bad input through the command line: what is told, what is touched, and what is left."""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest

import smelt
from tests import bad_inputs
from tests.attacks import ATTACKS, Attack
from tests.commands import refused_merge

_OPENED: list[tuple[str, Any]] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _OPENED is not None and event in ("open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
        _OPENED.append((event, arguments[0]))


sys.addaudithook(_audit)  # it stays for good, but listens only when asked to

#: Where Python and its packages are read from.
OURS = tuple(map(os.path.realpath, (sys.prefix, sys.base_prefix, sysconfig.get_paths()["stdlib"],
                                    Path(smelt.__file__).parents[1], os.devnull)))  # fmt: skip


def strange(opened: list[tuple[str, Any]], home: Path) -> list[tuple[str, Any]]:
    """What has no business in a merge of models below ``home``."""

    def known(event: str, what: Any) -> bool:
        if event != "open" or isinstance(what, int):
            return event == "open"
        # A link below home is what the user has named, as those of the hub's cache are.
        return os.path.abspath(what).startswith(str(home)) or os.path.realpath(what).startswith(OURS)

    return [found for found in opened if not known(*found)]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_refused_on_the_command_line(
    attack: Attack, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    source = attack.make(tmp_path / "model")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps({"merge_method": "passthrough", "models": [{"model": str(source)}]}))
    monkeypatch.setattr(sys.modules[__name__], "_OPENED", opened := [])
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, told = refused_merge(capsys, recipe, tmp_path / "out")
    monkeypatch.undo()
    assert code == attack.exit_code
    message = "\n".join(told)
    assert re.search(attack.pattern, message), message
    assert all(name in message for name in attack.mentions), message
    assert strange(opened, tmp_path) == []
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kB
    assert sorted(os.listdir(tmp_path)) == ["model", "recipe.yml"]


def test_every_entry_of_the_list_has_its_place() -> None:
    covered = {*bad_inputs.generated(), *bad_inputs.ELSEWHERE}
    assert covered | set(bad_inputs.NOT_YET) == set(range(1, 136))
    assert bad_inputs.missing_tests() == []
    assert covered & set(bad_inputs.NOT_YET) == set()


def test_a_stranger_is_seen(tmp_path: Path) -> None:
    """The test above would pass on anything if this failed."""
    opened = [("open", str(tmp_path / "a")), ("open", "/etc/passwd"), ("socket.connect", None), ("open", 3)]
    assert strange(opened, tmp_path) == opened[1:3]
