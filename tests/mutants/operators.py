"""The faults: what a mutant has in place of one expression or statement."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

#: What takes the place of an operator: the neighbour that is most easily confused with it.
_OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip

#: Calls of these with their arguments swapped mean the same, or are a type error at once.
_UNORDERED = {"min", "max", "isinstance", "getattr", "hasattr", "samestat", "range"}

#: What is looked at in the text of generated code.
_MARKS = re.compile(r"(?<= )(?:\+|-|<|>=|<<|>>|==|!=|\+=|\|=|//)(?= )|(?<![\w.])\d+")
_IN_TEXT = {
    "+": "-", "-": "+", "<": "<=", ">=": ">", "<<": ">>", ">>": "<<", "==": "!=", "!=": "==", "+=": "-=", "|=": "&=",
    "//": "%",
}  # fmt: skip

#: Parts of the tree that have no effect when the code runs, or are seen by people alone.
_UNSEEN = {"annotation", "returns", "decorator_list", "type_comment", "type_params", "format_spec"}


@dataclass(frozen=True)
class Mutant:
    """``field`` of ``holder`` (its item ``at``, where it is a list) becomes ``new``; ``scope`` names the function."""

    module: str
    scope: str
    statement: ast.stmt
    tree: ast.Module
    holder: ast.AST
    field: str
    at: int | None
    new: ast.AST

    def __str__(self) -> str:
        change = f"{_brief(self._here())} -> {_brief(self.new)}"
        inside = "" if isinstance(self._here(), ast.stmt) else f", in {_brief(self.statement)}"
        return f"{self.module}: {self.scope}: {change}{inside}"

    def text(self) -> str:
        """The whole module with the fault in it."""
        old = self._here()
        self._put(self.new)
        try:
            return ast.unparse(ast.fix_missing_locations(self.tree))
        finally:
            self._put(old)

    def _here(self) -> ast.AST:
        value = getattr(self.holder, self.field)
        return value if self.at is None else value[self.at]

    def _put(self, node: ast.AST) -> None:
        if self.at is None:
            setattr(self.holder, self.field, node)
        else:
            getattr(self.holder, self.field)[self.at] = node


def mutants(module: str, source: str, *, generates: bool = False) -> list[Mutant]:
    """All of a module; in one that ``generates`` code also those of the text that it puts together."""
    tree = ast.parse(source)
    return [
        Mutant(module, scope, statement, tree, holder, field, at, new)
        for scope, statement, holder, field, at, node in _places(tree, "", tree)
        for new in (*_instead(node), *(_text(node) if generates else ()))
    ]


def _places(
    holder: ast.AST, scope: str, statement: Any
) -> Iterator[tuple[str, Any, ast.AST, str, int | None, ast.AST]]:
    """Every node that counts, where it hangs, and the function or class and the statement that it is in."""
    for field, value in ast.iter_fields(holder):
        if field in _UNSEEN:
            continue
        for at, node in enumerate(value) if isinstance(value, list) else ((None, value),):
            if isinstance(node, ast.AST) and not _is_idle(node):
                within = node if isinstance(node, ast.stmt) else statement
                yield scope, within, holder, field, at, node
                if not isinstance(node, ast.Raise):  # what it says is for people
                    named = [part for part in (scope, node.name) if part] if isinstance(node, _SCOPES) else [scope]
                    yield from _places(node, ".".join(named), within)


_SCOPES = ast.FunctionDef | ast.ClassDef


def _is_idle(node: ast.AST) -> bool:
    """Docstrings, and what only a type checker reads."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _instead(node: Any) -> Iterator[ast.AST]:
    match node:
        case ast.Raise() | ast.Expr() | ast.AugAssign() | ast.Continue() | ast.Break():
            yield ast.Pass()
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Call(args=[_, _, *_]) if _name(node) not in _UNORDERED:
            yield from _swapped(node)
        case ast.If() | ast.While() | ast.IfExp() if not isinstance(node.test, ast.Constant | ast.UnaryOp):
            yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
        case ast.comprehension(ifs=[test]):
            yield _with(node, ifs=[ast.UnaryOp(ast.Not(), test)])
    yield from _confused(node)


def _confused(node: Any) -> Iterator[ast.AST]:
    """Another operator."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield _with(node, ops=[*node.ops[:i], _OPERATORS[type(op)](), *node.ops[i + 1 :]])
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in _OPERATORS:
        yield _with(node, op=_OPERATORS[type(node.op)]())


def _swapped(node: ast.Call) -> Iterator[ast.Call]:
    """Each two neighbouring arguments the other way round."""
    for i, (one, other) in enumerate(zip(node.args, node.args[1:], strict=False)):
        if not isinstance(one, ast.Starred) and not isinstance(other, ast.Starred):
            yield _with(node, args=[*node.args[:i], other, one, *node.args[i + 2 :]])


def _text(node: Any) -> Iterator[ast.AST]:
    """Another operator or number in a text."""
    if isinstance(node, ast.Constant) and isinstance(text := node.value, str) and " " in text:
        for mark in _MARKS.finditer(text):
            found = mark.group()
            other = _IN_TEXT.get(found) or str(int(found) + 1)
            yield ast.Constant(text[: mark.start()] + other + text[mark.end() :])


def _with(node: Any, **changed: Any) -> Any:
    return type(node)(**{**dict(ast.iter_fields(node)), **changed})


def _name(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _brief(node: ast.AST) -> str:
    """The node as code on one line; of a block its head."""
    text = ast.unparse(ast.fix_missing_locations(node)).strip()
    return " ".join((text.partition("\n")[0] if isinstance(node, ast.stmt) else text).split())
