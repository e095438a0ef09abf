"""Which bad inputs of the project's list are tested where. ``python -m tests.bad_inputs`` prints it as a table.

Generators are named after their numbers in the list ("A31-one-range-twice"); what needs no file of its own is
tested beside what it concerns, and listed here with the name of that test.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator

from tests import (
    adapter_attacks,
    attacks,
    gguf_attacks,
    pickle_attacks,
    quantised_attacks,
    test_bad_models,
    test_bad_recipes,
    test_quantised_models,
)

#: Files and folders, to be given to a command.
FILES = [
    *attacks.ATTACKS, *quantised_attacks.ATTACKS, *gguf_attacks.ATTACKS, *adapter_attacks.ATTACKS,
    *pickle_attacks.ATTACKS,
]  # fmt: skip

SECTIONS = {
    "A safetensors file": range(1, 43), "B index and folder": range(43, 63), "C between models": range(63, 77),
    "D quantised": range(77, 89), "E adapter": range(89, 99), "F recipe and command": range(99, 120),
    "G values": range(120, 126), "H pickle": range(126, 136),
}  # fmt: skip

#: Entry -> module and test.
ELSEWHERE = {
    41: "test_merge.test_an_input_that_changes_meanwhile_stops_the_merge",
    42: "test_safetensors_reader.test_an_input_error_names_file_and_tensor",
    58: "test_hub.test_not_in_the_cache",
    59: "test_hub.test_not_in_the_cache",
    69: "test_bad_models.test_settings_that_training_may_change_are_only_strictly_refused",
    73: "test_bad_values.test_the_same_weights_twice_are_warned_about",
    80: "test_quantised_models.test_a_grid_that_the_blocks_do_not_fill_is_read",
    96: "test_bad_inputs.test_what_an_adapter_says_of_its_base_is_not_opened",
    99: "test_recipe_mistakes.BAD",
    100: "test_recipe_mistakes.test_limits",
    101: "test_recipe_mistakes.test_limits",
    102: "test_recipe_mistakes.BAD",
    103: "test_recipe_mistakes.BAD",
    104: "test_recipe_mistakes.BAD",
    111: "test_publish.test_a_link_does_not_hide_that_the_output_lies_in_an_input",
    112: "test_publish.test_what_is_there_is_left_alone",
    113: "test_publish.test_the_parent_must_exist",
    117: "test_bad_recipes.test_too_little_disk",
    120: "test_bad_values.test_a_bad_value_names_model_and_tensor",
    121: "test_bad_values.test_a_bad_value_names_model_and_tensor",
    122: "test_bad_values.test_what_does_not_fit_the_output_type_is_refused",
    123: "test_bad_values.test_the_base_as_an_expert_is_warned_about",
    124: "test_bad_values.test_denormals_and_signed_zeros_survive_a_copy",
    125: "test_bad_values.test_a_singular_gram_matrix_has_the_answer_that_its_inputs_ask_for",
}

#: What is not refused, and why.
ACCEPTED = {
    39: "masks are arrays in memory; whatever is not 0 counts as 1",
    119: "there are no plug-ins",
}


def generated() -> Iterator[int]:
    """The entries that have generators."""
    rows = [
        *test_bad_models.MODELS, *test_bad_recipes.RECIPES, *test_bad_recipes.OPTIONS, *test_quantised_models.UNREAD,
    ]  # fmt: skip
    names = [*(attack.name for attack in FILES), *(str(row[0]) for row in rows)]
    for name in names:
        found = re.match(r"[A-H]?(\d+)[ -]", name)
        if found:
            yield int(found[1])


def missing_tests() -> list[str]:
    """Tests that are listed and do not exist."""
    places = (place.split(".") for place in sorted(set(ELSEWHERE.values())))
    return [f"{m}.{t}" for m, t in places if not hasattr(importlib.import_module(f"tests.{m}"), t)]


def table() -> str:
    """A row per section: covered and not, by number."""
    covered = {*generated(), *ELSEWHERE}
    lines = ["| section | entries | covered | not refused |", "| --- | --- | --- | --- |"]
    for section, numbers in SECTIONS.items():
        open_ = [number for number in numbers if number not in covered]
        lines.append(f"| {section} | {len(numbers)} | {len(numbers) - len(open_)} | {', '.join(map(str, open_))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
