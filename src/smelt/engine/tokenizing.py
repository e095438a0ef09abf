"""Plan the tokenizer of the output: whose it is, its vocabulary, its chat template."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..recipe import Recipe
from ..tokenizer import (
    FILES,
    check_template,
    choose_template,
    files_in,
    parse_vocabulary,
    strange_tokens,
    with_template,
)
from .inputs import Inputs
from .tokens import Tokens
from .vocabularies import aligned, donor_of, padded


def plan_tokens(recipe: Recipe, inputs: Inputs, *, keep_rows: bool = False) -> Tokens | None:
    """The tokenizer that a recipe asks for, or None where the donor's files are taken as they are.

    ``keep_rows``: leave rows where they are unless the recipe aligns them.

    Raises UsageError or InputRejected with everything that is wrong.
    """
    options = recipe.vocabulary
    unasked = None if keep_rows or options is not None else padded(inputs)
    tokens = unasked if options is None else aligned(options, inputs)
    if recipe.chat_template is None:
        return tokens
    if tokens is None:
        donor = donor_of("base" if options is None else options.source, inputs)
        tokens = Tokens(donor, files_in(donor.files, FILES))
    return _with_template(tokens, recipe.chat_template, inputs)


def _with_template(tokens: Tokens, asked: str, inputs: Inputs) -> Tokens:
    ordered = sorted(inputs.merged, key=lambda item: item.label != tokens.donor.label)  # the donor first
    template = choose_template(asked, [item.checkpoint.side_files for item in ordered])
    if template is None:
        return replace(tokens, notices=(*tokens.notices, "chat_template auto: no model has a chat template"))
    check_template(template)
    notices = [*tokens.notices, *_template_notices(tokens, template)]
    return replace(tokens, files=with_template(tokens.files, template), notices=tuple(notices))


def _template_notices(tokens: Tokens, template: str) -> Iterator[str]:
    """Whether the vocabulary has what the template writes."""
    if "tokenizer.json" not in tokens.files:
        return
    ids = (
        tokens.lexicon.ids if tokens.lexicon else parse_vocabulary("tokenizer.json", tokens.files["tokenizer.json"]).ids
    )
    added = [item for vocabulary in tokens.known.values() for item in vocabulary.added.items()]
    strange = strange_tokens(template, ids, [token for token, entry in added if entry.get("special")])
    if strange:
        yield f"the chat template writes {', '.join(strange)}: no token of the vocabulary"
