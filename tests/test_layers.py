"""The layers: imports point down only, files are touched in one place, nothing heavy comes along unasked."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import smelt

PACKAGE = Path(smelt.__file__).parent
MODULES = {
    ".".join(["smelt", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

#: From the ground up. What stands on one floor may not import each other.
FLOORS = (
    ("errors", "_version"), ("storage",), ("kernels",), ("checkpoint",), ("recipe", "architecture"),
    ("methods", "tokenizer"), ("engine",),
    ("adapters", "conversion", "diagnosis", "stacking", "statistics", "transplant"), ("cli",), ("smelt",),
)  # fmt: skip
FLOOR = {part: height for height, parts in enumerate(FLOORS) for part in parts}

#: Third-party packages and where they may be imported when a module is loaded (elsewhere: inside functions).
AT_LOADING = {
    "numpy": set(FLOOR) - {"smelt", "cli", "recipe", "errors", "storage"}, "click": {"cli"}, "yaml": {"recipe"},
    "numba": {"kernels"}, "llvmlite": {"kernels"}, "xxhash": {"engine"},
}  # fmt: skip

#: What reaches the file system. ``pathlib`` has no place that may do so either.
FORBIDDEN_IN_OS = {
    "open", "rename", "replace", "remove", "unlink", "rmdir", "mkdir", "makedirs", "link", "symlink", "truncate",
    "ftruncate", "write", "pwrite", "preadv", "fsync", "listdir", "scandir", "walk", "chmod",
}  # fmt: skip
FORBIDDEN_ON_PATHS = {
    "read_text", "read_bytes", "write_text", "write_bytes", "iterdir", "rglob", "unlink", "rmdir", "touch",
    "mkdir", "symlink_to", "hardlink_to",
}  # fmt: skip


class Import(NamedTuple):
    """One import: of a module or of a name in it, wherever it stands."""

    importer: str
    line: int
    module: str
    name: str | None
    loading: bool  # runs when the importing module is loaded
    typing: bool  # under TYPE_CHECKING

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.module}{f'.{self.name}' if self.name else ''}"


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[Import]:
    yield from _imports(module, tree(module), loading=True, typing=False)


def _imports(module: str, node: ast.AST, loading: bool, typing: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(module, child.lineno, alias.name, None, loading, typing) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            source = _absolute(module, child)
            yield from (Import(module, child.lineno, source, alias.name, loading, typing) for alias in child.names)
        else:
            lazily = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _imports(module, child, loading and not lazily and not checking, typing or checking)


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """The module that a ``from`` import names, dots resolved."""
    if not node.level:
        return node.module or ""
    is_package = MODULES[module].name == "__init__.py"
    parts = module.split(".")[: None if is_package and node.level == 1 else is_package - node.level]
    return ".".join([*parts, *([node.module] if node.module else [])])


def own(found: Import) -> bool:
    return found.module.partition(".")[0] == "smelt"


def part_of(module: str) -> str:
    """The package that a module belongs to, or the module itself on the ground floor."""
    names = module.split(".")
    return names[1] if len(names) > 1 and names[1] != "__main__" else "smelt"


def target_of(found: Import) -> str:
    """The part that an import reaches: ``from .. import methods`` reaches methods."""
    whole = f"{found.module}.{found.name}"
    return part_of(whole if whole in MODULES else found.module)


EVERY = [found for module in MODULES for found in imports(module)]
OWN = [found for found in EVERY if own(found)]


def test_imports_point_down() -> None:
    """Also those inside functions, and those that only a type checker sees."""
    across = [(found, part_of(found.importer), target_of(found)) for found in OWN]
    upward = [str(found) for found, here, there in across if here != there and FLOOR[there] >= FLOOR[here]]
    assert upward == []
    assert {here for _, here, _ in across} >= {"smelt", "cli", "engine", "kernels"}, "too little was looked at"


def test_every_part_has_a_floor() -> None:
    assert {part_of(module) for module in MODULES} == set(FLOOR)


def test_imports_inside_functions_exist() -> None:
    """What is imported late fails late; so it is looked up here."""
    assert [str(found) for found in OWN if not exists(found)] == []


def exists(found: Import) -> bool:
    if found.name in (None, "*") or f"{found.module}.{found.name}" in MODULES:
        return True
    return hasattr(importlib.import_module(found.module), str(found.name))


def test_heavy_packages_are_imported_late() -> None:
    """torch, transformers and the hub only inside functions; numba only where kernels are compiled."""
    light = {*sys.stdlib_module_names, "__future__"}
    loaded = [found for found in EVERY if found.loading and not own(found) and package_of(found) not in light]
    early = [found for found in loaded if part_of(found.importer) not in AT_LOADING.get(package_of(found), ())]
    assert {"numpy", "click", "numba"} <= {package_of(found) for found in loaded}
    assert [str(found) for found in early] == []


def package_of(found: Import) -> str:
    return found.module.partition(".")[0]


def test_files_are_touched_in_storage_alone() -> None:
    others = [module for module in MODULES if module != "smelt.storage"]
    calls = [(module, node) for module in others for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    assert [f"{module}:{node.lineno}: {ast.unparse(node)}" for module, node in calls if touches_files(node)] == []
    assert [str(found) for found in EVERY if found.module == "shutil" and found.importer in others] == []


def touches_files(node: ast.Call) -> bool:
    if isinstance(node.func, ast.Name):
        return node.func.id == "open"
    if not isinstance(node.func, ast.Attribute):
        return False
    name, owner = node.func.attr, ast.unparse(node.func.value)
    if owner == "os":
        return name in FORBIDDEN_IN_OS and "os.devnull" not in ast.unparse(node)
    return owner != "storage" and name in FORBIDDEN_ON_PATHS


def test_the_rules_see_what_they_forbid() -> None:
    """The tests above would pass on nothing if these failed."""
    calls = ["open(p)", "os.rename(a, b)", "Path(p).read_text()", "p.write_bytes(b'')", "os.open(p, 0)"]
    assert all(map(touches_files, map(call_in, calls)))
    allowed = ["storage.mkdir(p)", "os.open(os.devnull, 1)", "os.path.join(a, b)", "text.replace(a, b)"]
    assert not any(map(touches_files, map(call_in, allowed)))
    code = "def f():\n    import torch\nif TYPE_CHECKING:\n    from .. import methods\nimport numpy"
    late, typed, loaded = _imports("smelt.cli.merge", ast.parse(code), loading=True, typing=False)
    assert (late.module, late.loading) == ("torch", False)
    assert (target_of(typed), typed.typing) == ("methods", True)
    assert (loaded.module, loaded.loading) == ("numpy", True)


def call_in(code: str) -> ast.Call:
    node = ast.parse(code, mode="eval").body
    assert isinstance(node, ast.Call)
    return node
