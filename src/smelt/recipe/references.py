"""How a recipe names a model: ``path[@revision][+adapter[@revision]]``, or a mapping for odd paths."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ..errors import show, without_secrets
from .language import AdapterReference, ModelReference
from .nodes import Fields, Items, Leaf, Node, Position, Report
from .sections import Section
from .settings import HOLE, is_hole

Part = tuple[str, str | None]
Adapters = tuple[AdapterReference, ...]


def read_reference(node: Node, report: Report, key: str = "model") -> ModelReference | None:
    """A model reference in either form, or None when it is wrong (``report`` tells)."""
    if is_hole(node):
        report.fail(node.position, HOLE)
        return None
    if isinstance(node, Fields):
        return _from_mapping(node, report)
    if not isinstance(node, Leaf) or not isinstance(node.value, str):
        hint = " (quote it to make it text)" if isinstance(node, Leaf) else ""
        report.fail(node.position, f"{key} must name a model, found {node}{hint}")
        return None
    try:
        return parse_reference(node.value, node.position)
    except ValueError as error:
        report.fail(node.position, str(error))
        return None


def parse_reference(text: str, position: Position) -> ModelReference:
    """``path[@revision][+adapter[@revision]]``. ValueError says what is wrong with ``text``."""
    model, *adapters = text.split("+")
    if len(adapters) > 1:
        raise ValueError(f"more than one + in {show(text)}; for a path with + write model: {{model: {{path: ...}}}}")
    return _reference(_part(model), tuple(AdapterReference(*_part(text)) for text in adapters), None, position)


def _part(text: str) -> Part:
    if "://" in text:  # its @ is its own
        return text, None
    path, *revisions = text.split("@")
    if len(revisions) > 1:
        raise ValueError(f"more than one @ in {show(text)}; for a path with @ write model: {{model: {{path: ...}}}}")
    if not path or revisions == [""]:
        raise ValueError(f"{show(text)} does not name a model: it has an empty part")
    return path, revisions[0] if revisions else None


def _from_mapping(node: Fields, report: Report) -> ModelReference | None:
    section = Section(node, ("model", "lora", "override_architecture"), "a model reference", report)
    inner = section.require("model")
    model = _read_part(inner, report) if inner else None
    adapters = _read_adapters(section.get("lora"), report)
    architecture = section.text("override_architecture")
    if model is None or adapters is None:
        return None
    return _reference(model, adapters, architecture, node.position)


def _read_adapters(node: Node | None, report: Report) -> Adapters | None:
    """One adapter or a list of them, each a name or a mapping that may give a weight."""
    if node is None:
        return ()
    found = [_read_adapter(item, report) for item in (node.nodes if isinstance(node, Items) else (node,))]
    return None if None in found else tuple(adapter for adapter in found if adapter is not None)


def _read_adapter(node: Node, report: Report) -> AdapterReference | None:
    weight = 1.0
    if isinstance(node, Fields) and "weight" in node.nodes:
        given = Section(node, ("path", "revision", "weight"), "an adapter", report).number("weight")
        if given is None:
            return None
        weight = given
    part = _read_part(node, report, ("path", "revision", "weight"))
    return AdapterReference(*part, weight) if part else None


def _read_part(node: Node, report: Report, known: tuple[str, ...] = ("path", "revision")) -> Part | None:
    if isinstance(node, Fields):
        section = Section(node, known, "a model path", report)
        section.require("path")
        path, revision = section.text("path"), section.text("revision")
        return (path, revision) if path else None
    if not isinstance(node, Leaf) or not isinstance(node.value, str):
        report.fail(node.position, f"expected the path of a model, found {node}")
        return None
    try:
        return _part(node.value)
    except ValueError as error:
        report.fail(node.position, str(error))
        return None


def _reference(model: Part, adapters: Adapters, architecture: str | None, position: Position) -> ModelReference:
    path, revision = model
    return ModelReference(_text(model, adapters, architecture), path, position, revision, adapters, architecture)


def _text(model: Part, adapters: Adapters, architecture: str | None) -> str:
    """The string form where it says the same, else the mapping as JSON: never one text for two models."""
    parts = [(_told(path), revision) for path, revision in (model, *(adapter[:2] for adapter in adapters))]
    spelt = "+".join("@".join(filter(None, part)) for part in parts)
    plain = architecture is None and len(adapters) < 2 and all(adapter.weight == 1 for adapter in adapters)
    if plain and not any(map(_is_odd, parts)):
        return spelt
    form: dict[str, Any] = {"model": _mapping(parts[0])}
    if adapters:
        weights = [{"weight": adapter.weight} if adapter.weight != 1 else {} for adapter in adapters]
        forms = [_mapping(part) | weight for part, weight in zip(parts[1:], weights, strict=True)]
        form["lora"] = forms if len(forms) > 1 else forms[0]
    if architecture:
        form["override_architecture"] = architecture
    return json.dumps(form)


def _is_odd(part: Part) -> bool:
    """Whether the string form would be read as something else."""
    path, revision = part
    signs = "+" if "://" in path else "+@"
    return any(sign in path for sign in signs) or any(sign in (revision or "") for sign in "+@")


def _told(path: str) -> str:
    """A URL without what may be secret in it; its query, which may tell files apart, by a digest."""
    query = path.partition("?")[2] if "://" in path else ""
    told = without_secrets(path)
    return f"{told}#{hashlib.sha256(query.encode()).hexdigest()[:8]}" if query else told


def _mapping(part: Part) -> dict[str, Any]:
    path, revision = part
    return {"path": path, "revision": revision} if revision else {"path": path}
