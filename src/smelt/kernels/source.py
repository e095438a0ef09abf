"""From one formula to source code with every constant pinned to the computing precision.

A stray Python literal silently turns fp32 arithmetic into fp64 (Numba) or int64 (``where(c, 1, -1)`` in
numpy), so each numeric literal becomes a named constant of the computing type, in every backend alike.
The same pass collects the formulas that a formula calls, so that the compiled module is self-contained,
and refuses what the vocabulary does not have.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from . import vocabulary

Formula = Callable[..., Any]

_BUILTINS = {"abs", "zip", "range", "len", "enumerate"}
_REFUSED = (
    ast.Pow,
    ast.FloorDiv,
    ast.Mod,
    ast.MatMult,
    ast.Try,
    ast.While,
    ast.Lambda,
    ast.Import,
    ast.ImportFrom,
)


@dataclass(frozen=True)
class Source:
    """A formula and all it calls as text, and the constants by the names they have in that text."""

    name: str
    text: str
    constants: dict[str, float] = field(hash=False)


@dataclass(frozen=True)
class Then:
    """``outer`` of what ``inner`` gives, as one formula.

    Its arguments are those of ``inner`` and, but for the first, those of ``outer``: the names must differ.
    """

    inner: Formula
    outer: Formula

    @property
    def __name__(self) -> str:
        return f"{self.outer.__name__}_of_{self.inner.__name__}"

    def __call__(self, **arguments: Any) -> Any:
        """On arrays: numpy or torch."""
        own = {name: arguments.pop(name) for name in names_of(self.outer)[1:]}
        return self.outer(self.inner(**arguments), **own)

    @property
    def text(self) -> str:
        names, own = names_of(self.inner), names_of(self.outer)[1:]
        inner = f"{self.inner.__name__}({', '.join(names)})"
        return (
            f"def {self.__name__}({', '.join([*names, *own])}):\n"
            f"    return {self.outer.__name__}({', '.join([inner, *own])})"
        )


def names_of(formula: Formula) -> list[str]:
    """The names of a formula's arguments, in order."""
    if isinstance(formula, Then):
        return [*names_of(formula.inner), *names_of(formula.outer)[1:]]
    return list(inspect.signature(formula).parameters)


#: Some CPython releases (3.11.7 is one) raise SystemError when two threads are in ast.parse at once.
_PARSING = threading.Lock()


@cache
def source_of(formula: Formula) -> Source:
    """The pinned source of ``formula`` and of the formulas it calls. TypeError when it is not one."""
    constants: dict[str, float] = {}
    done: dict[str, str] = {}
    with _PARSING:
        _collect(formula, constants, done)
    return Source(formula.__name__, "\n\n".join(done.values()), constants)


def _collect(formula: Formula, constants: dict[str, float], done: dict[str, str]) -> None:
    """Append the pinned text of ``formula`` to ``done``, behind everything it calls."""
    if isinstance(formula, Then):
        _collect(formula.inner, constants, done)
        _collect(formula.outer, constants, done)
        done[formula.__name__] = formula.text
        return
    if formula.__closure__:
        raise TypeError(f"{formula.__qualname__} is a closure; a formula may only use its arguments")
    tree = ast.parse(textwrap.dedent(inspect.getsource(formula))).body[0]
    if not isinstance(tree, ast.FunctionDef):
        raise TypeError(f"{formula!r} is not a plain function")
    _strip(tree)
    pin = _Pin(constants)
    pin.visit(tree)
    for name in sorted(_free_names(tree)):
        called = vocabulary.WORDS.get(name) or formula.__globals__.get(name)
        if name in vocabulary.WORDS and called is vocabulary.WORDS[name] and name in {"where", "sqrt"}:
            continue
        if not inspect.isfunction(called):
            raise TypeError(f"{formula.__qualname__} uses {name!r}, which is not in the vocabulary")
        if name not in done:
            _collect(called, constants, done)
    done[formula.__name__] = ast.unparse(ast.fix_missing_locations(tree))


def _strip(tree: ast.FunctionDef) -> None:
    """Drop what only people read: the docstring, decorators and annotations."""
    tree.decorator_list = []
    tree.returns = None
    for argument in [*tree.args.args, *tree.args.kwonlyargs]:
        argument.annotation = None
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]


class _Pin(ast.NodeTransformer):
    """Replace numeric literals by named constants; leave indices alone."""

    def __init__(self, constants: dict[str, float]) -> None:
        self.constants = constants

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, _REFUSED):
            raise TypeError(f"{type(node).__name__} is not in the vocabulary of element formulas")
        return super().visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        if isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
            raise TypeError("a formula must not divide by a literal: multiply by the reciprocal instead")
        return self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        """``a += b`` becomes ``a = a + b``: on arrays the short form would write into an operand."""
        target = ast.Name(node.target.id, ast.Load())  # type: ignore[union-attr]
        return self.visit(ast.Assign([node.target], ast.BinOp(target, node.op, node.value)))

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        node.value = self.visit(node.value)
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        if isinstance(node.func, ast.Name) and node.func.id == "range":
            return node
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> Any:
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            return node
        value = float(node.value)
        name = f"CONSTANT_{value.hex()}".replace("-", "m").replace(".", "_").replace("+", "p")
        self.constants[name] = value
        return ast.Name(name, ast.Load())


def _free_names(tree: ast.FunctionDef) -> set[str]:
    """Names that a function reads and does not bind itself."""
    bound = {argument.arg for argument in [*tree.args.args, *tree.args.kwonlyargs]}
    read: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (bound if isinstance(node.ctx, ast.Store) else read).add(node.id)
    return {name for name in read - bound - _BUILTINS if not name.startswith("CONSTANT_")}
