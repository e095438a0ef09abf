"""The vocabularies of the inputs, and the output's made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from ..errors import InputRejected, UsageError, show
from ..recipe import ModelReference, TokenizerOptions, TokenRow, TokenRule
from ..tokenizer import (
    FILES,
    SLOW_FILES,
    Lexicon,
    Vocabulary,
    build,
    edited,
    files_in,
    parse_vocabulary,
    stored_vocabulary,
)
from .inputs import Input, Inputs
from .tokens import Donor, Tokens, Vocabularies

_CONVERT = "save it once with transformers' AutoTokenizer, which writes one"


def donor_of(source: ModelReference | str, inputs: Inputs) -> Donor:
    """``base``, ``union``: the model that lends the config; else the one that is named."""
    item = inputs.donor
    if isinstance(source, ModelReference):
        if source not in inputs:
            return Donor(source.text, inputs.side_files(source), None)
        item = inputs[source]
    return Donor(item.label, item.checkpoint.side_files, item.vocabulary_rows)


class _Reader:
    """Reads tokenizer.json files, equal ones once."""

    def __init__(self) -> None:
        self._by_digest: dict[bytes, Vocabulary] = {}

    def __call__(self, label: str, files: Mapping[str, bytes]) -> Vocabulary | None:
        """The vocabulary of a fast tokenizer, or None where there is none."""
        name, content = stored_vocabulary(files) or ("", b"")
        if name != "tokenizer.json":
            return None
        digest = hashlib.sha256(content).digest()
        try:
            if digest not in self._by_digest:
                self._by_digest[digest] = parse_vocabulary(name, content)
        except InputRejected as error:
            raise InputRejected(f"{label}: {error}") from error
        return self._by_digest[digest]


def _vocabularies(
    inputs: Inputs, donor: Donor, theirs: Vocabulary, read: _Reader, notices: list[str]
) -> dict[str, Vocabulary]:
    """What every input has rows for. A model without a tokenizer is taken to have the donor's."""
    known: dict[str, Vocabulary] = {}
    problems: list[str] = []
    for item in inputs:
        files = item.checkpoint.side_files
        whole = read(item.label, files)
        slow = files_in(files, SLOW_FILES) if whole is None else {}
        if whole is None and slow and slow != files_in(donor.files, SLOW_FILES):
            problems.append(f"{item.label} has {', '.join(slow)} but no tokenizer.json: {_CONVERT}")
        elif whole is None and not slow:
            notices.append(f"{item.label} has no tokenizer: its tokens are taken to be those of {donor.label}")
        whole = whole or theirs
        known[item.label] = whole.within(item.vocabulary_rows or whole.end)
        rowless = len(whole.ids) - len(known[item.label].ids)
        if rowless:
            notices.append(f"{item.label}: {rowless} tokens lie beyond its {item.vocabulary_rows} rows: left out")
    InputRejected.gather(problems)
    return known


def _refuse_slow(donor: Donor, options: TokenizerOptions, inputs: Inputs) -> None:
    """Without tokenizer.json nothing can be aligned; where all models have the same files nothing needs to be."""
    files = files_in(donor.files, SLOW_FILES)
    if not files:
        raise InputRejected(f"{donor.label} has no tokenizer: name a model that has one as the tokenizer's source")
    same = all(files_in(item.checkpoint.side_files, SLOW_FILES) == files for item in inputs.merged)
    if not same or options.tokens or options.pad_to_multiple_of or options.padding:
        names = ", ".join(files)
        raise InputRejected(f"{donor.label} has {names} but no tokenizer.json, which this merge needs: {_CONVERT}")


# --- the vocabulary of the output -----------------------------------------------------------------------


def aligned(options: TokenizerOptions, inputs: Inputs) -> Tokens | None:
    """What a ``tokenizer`` section asks for. None where all models share files that cannot be read."""
    donor, read, notices = donor_of(options.source, inputs), _Reader(), list[str]()
    theirs = read(donor.label, donor.files)
    if theirs is None:
        _refuse_slow(donor, options, inputs)
        return None
    merged = [item for item in inputs.merged if item.vocabulary_rows is not None]
    if not merged:
        raise UsageError("the recipe aligns vocabularies, but no model has an embedding of tokens")
    known = _vocabularies(inputs, donor, theirs, read, notices)
    UsageError.gather(_rule_problems(options.tokens, known, inputs))
    others = [known[item.label] for item in merged if item.label != donor.label]
    wanted = {token: _definition(token, known) for token in options.tokens}
    limit = theirs.end if donor.rows is None else donor.rows
    lexicon = build(theirs, others if options.source == "union" else (), wanted, limit)
    rows = _rows(options, lexicon, merged, known, inputs.donor, notices)
    stored = files_in(donor.files, FILES)
    files = edited(stored, theirs, lexicon)
    declared = {token for vocabulary in known.values() for token in vocabulary.added} | options.tokens.keys()
    notices += _file_notices(donor, stored.keys() - files.keys(), lexicon, declared)
    owner = inputs.donor.label
    return Tokens(
        donor, files, lexicon, known, rows, options.pad_to_multiple_of is not None, options.tokens,
        None if owner == donor.label else _new_ids(known[owner], lexicon), _strangers(theirs, others), tuple(notices),
    )  # fmt: skip


def _new_ids(vocabulary: Vocabulary, lexicon: Lexicon) -> dict[int, int]:
    pairs = ((index, lexicon.ids.get(token)) for index, token in vocabulary.tokens.items())
    return {index: new for index, new in pairs if new is not None}


def _strangers(donor: Vocabulary, others: Sequence[Vocabulary]) -> bool:
    """Whether an id of the ordinary vocabulary stands for two strings."""
    return any(
        donor.tokens.get(index, token) != token
        for other in others
        for index, token in other.tokens.items()
        if token not in other.added and donor.tokens.get(index) not in donor.added
    )


def _definition(token: str, known: Vocabularies) -> Mapping[str, Any]:
    """How the first model that has it defines an added token."""
    return next((vocabulary.added[token] for vocabulary in known.values() if token in vocabulary.added), {})


def _rule_problems(rules: Mapping[str, TokenRule], known: Vocabularies, inputs: Inputs) -> Iterator[str]:
    for token, rule in rules.items():
        source = rule.source
        if source is None and not any(token in vocabulary.ids for vocabulary in known.values()):
            yield f"token {show(token)} is in no vocabulary: give it a source, such as {{kind: zero}}"
        elif isinstance(source, TokenRow) and source.token_id is not None:
            rows = inputs[source.model].vocabulary_rows or 0
            if source.token_id >= rows:
                yield f"token {show(token)}: {source.model.text} has {rows} rows, none of id {source.token_id}"
        elif isinstance(source, TokenRow | ModelReference):
            model, wanted = (source.model, source.token) if isinstance(source, TokenRow) else (source, token)
            if wanted not in known[model.text].ids:
                yield f"token {show(token)}: {model.text} has no row for {show(wanted)}"


def _rows(
    options: TokenizerOptions, lexicon: Lexicon, merged: Sequence[Input], known: Vocabularies, donor: Input,
    notices: list[str],
) -> int:  # fmt: skip
    """How many rows the output has: those of tokens, rounded up if asked; else with padding if all models have it."""
    if options.pad_to_multiple_of:
        return -(-lexicon.end // options.pad_to_multiple_of) * options.pad_to_multiple_of
    padding = {item.label: (item.vocabulary_rows or 0) - known[item.label].end for item in merged}
    keep = options.padding == "keep" or (options.padding is None and all(padding.values()))
    if keep:
        return max(lexicon.end, donor.vocabulary_rows or 0)
    padded = [f"{label} {count}" for label, count in padding.items() if count]
    if padded and options.padding is None:
        notices.append(
            f"rows that no token has are left out ({', '.join(padded)}), since not all models have some: "
            "tokenizer.padding keep or drop decides"
        )
    return lexicon.end


def _file_notices(donor: Donor, left: Set[str], lexicon: Lexicon, declared: Set[str]) -> Iterator[str]:
    """What the files cannot say: how another vocabulary's plain tokens are made, what slow tokenizers read."""
    plain = [entry["content"] for entry in lexicon.added if entry["content"] not in declared]
    if plain:
        shown = ", ".join(show(token, 20) for token in plain[:3]) + (", ..." if len(plain) > 3 else "")
        yield (
            f"{len(plain)} plain tokens of other vocabularies ({shown}) are added to the tokenizer of {donor.label} "
            "as whole words, since merge rules are not imported: they are cut out of a text before all else"
        )
    if left:
        yield f"{', '.join(sorted(left))} of {donor.label}: left out, tokenizer.json holds more tokens"


def padded(inputs: Inputs) -> Tokens | None:
    """Models with the same tokens and different padding are aligned unasked: rows are as in the donor."""
    counts = {item.label: item.vocabulary_rows for item in inputs.merged if item.vocabulary_rows is not None}
    item = inputs.donor
    if len(set(counts.values())) < 2 or item.label not in counts:
        return None
    read = _Reader()
    found = {item.label: read(item.label, item.checkpoint.side_files) for item in inputs.merged if item.label in counts}
    known = {label: vocabulary for label, vocabulary in found.items() if vocabulary is not None}
    theirs = known.get(item.label)
    if theirs is None or any(vocabulary.ids != theirs.ids for vocabulary in known.values()):
        return None
    if len(known) < len(counts) or theirs.end > min(rows for rows in counts.values() if rows):
        return None
    rows = counts[item.label] or 0
    said = ", ".join(f"{label} {count}" for label, count in counts.items())
    notice = f"the tokenizers are the same, the rows differ in padding only ({said}): {rows} as in {item.label}"
    donor = donor_of("base", inputs)
    return Tokens(donor, files_in(donor.files, FILES), Lexicon(theirs.ids), known, rows, notices=(notice,))
