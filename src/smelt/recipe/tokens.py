"""The ``tokenizer`` section and the chat template."""

from __future__ import annotations

from ..errors import show
from .language import ModelReference, TokenizerOptions, TokenRow, TokenRule
from .nodes import Fields, Leaf, Node, Report
from .references import read_reference
from .sections import Section
from .words import did_you_mean

TEMPLATES = ("auto", "alpaca", "chatml", "exaone", "llama3", "mistral")
_LEAST_TEMPLATE = 20


def read_source(node: Node, report: Report) -> ModelReference | str | None:
    """``union``, ``base`` or a model."""
    if isinstance(node, Leaf) and node.value in ("union", "base"):
        return str(node.value)
    return read_reference(node, report, "the tokenizer's source")


def read_tokenizer(node: Node, report: Report) -> TokenizerOptions:
    section = Section(node, ("source", "tokens", "pad_to_multiple_of", "padding"), "tokenizer", report)
    source = section.get("source")
    tokens = section.get("tokens")
    padding = section.word("padding", ("keep", "drop"))
    if padding and section.get("pad_to_multiple_of"):
        section.fail("padding", "padding and pad_to_multiple_of both say how many rows there are: give only one")
    return TokenizerOptions(
        (read_source(source, report) if source else None) or "union",
        _rules(tokens, report) if tokens else {},
        section.integer("pad_to_multiple_of", least=1),
        padding,
    )


def _rules(node: Node, report: Report) -> dict[str, TokenRule]:
    if not isinstance(node, Fields):
        report.fail(node.position, f"tokens must be a mapping token: rule, found {node}")
        return {}
    return {token: _rule(child, report) for token, child in node.nodes.items()}


def _rule(node: Node, report: Report) -> TokenRule:
    section = Section(node, ("source", "force"), "the rule of a token", report)
    source, force = section.get("source"), bool(section.boolean("force"))
    if force and not source:
        section.fail("force", "force has nothing to put in the place of the models' own rows: give a source")
    return TokenRule(_row(source, report) if source else None, force)


def _row(node: Node, report: Report) -> ModelReference | TokenRow | str | None:
    if not isinstance(node, Fields) or "kind" not in node.nodes:
        return read_reference(node, report, "the token's source")
    section = Section(node, ("kind", "model", "token", "token_id"), "the source of a token", report)
    kind = section.word("kind", ("model_token", "zero"))
    if kind == "model_token":
        return _token_row(section, report)
    for extra in (key for key in ("model", "token", "token_id") if kind == "zero" and key in section.nodes):
        section.fail(extra, f"{extra} has no meaning beside kind: zero")
    return kind


def _token_row(section: Section, report: Report) -> TokenRow | None:
    model = section.require("model")
    reference = read_reference(model, report) if model else None
    if ("token" in section.nodes) == ("token_id" in section.nodes):
        section.fail("token", "kind: model_token takes exactly one of token and token_id")
    token, token_id = section.text("token"), section.integer("token_id", least=0)
    return TokenRow(reference, token, token_id) if reference else None


def read_template(section: Section) -> str | None:
    """A built-in name, or a Jinja text."""
    text = section.text("chat_template")
    if text is None or text in TEMPLATES or ("{" in text and len(text) >= _LEAST_TEMPLATE):
        return text
    meant = did_you_mean(text, TEMPLATES) or f"; known names: {', '.join(TEMPLATES)}"
    section.fail(
        "chat_template",
        f"chat_template is neither a known name nor a Jinja template: {show(text, 40)}{meant}",
    )
    return None
