"""Chat templates: those with a name, the one that most models have, and whether the vocabulary suits one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from ..checkpoint.documents import parse_json
from ..errors import UsageError, show
from .reading import Files, files_in

#: Each renders as mergekit's of the same name.
BUILT_IN = {
    "alpaca": (
        "{%- for turn in messages -%}"
        "{%- if turn['role'] == 'system' -%}{{- turn['content'] | trim -}}"
        "{%- elif turn['role'] == 'user' -%}{{- '\\n\\n### Instruction:\\n' + turn['content'] | trim -}}"
        "{%- elif turn['role'] == 'assistant' -%}{{- '\\n\\n### Response:\\n' + turn['content'] | trim -}}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt and messages and messages[-1]['role'] == 'user' -%}"
        "{{- '### Response:\\n' -}}{%- endif -%}"
    ),
    "chatml": (
        "{%- for turn in messages -%}"
        "{{- '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    ),
    "exaone": (
        "{%- if messages and messages[0]['role'] != 'system' -%}"
        "{{- '        [|system|][|endofturn|]\\n\\n' -}}{%- endif -%}"
        "{%- for turn in messages -%}"
        "{{- '    [|' + turn['role'] + '|]' + turn['content'] + '\\n        ' -}}"
        "{{- '' if turn['role'] == 'user' else '[|endofturn|]' -}}{{- '\\n\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '    [|assistant|]\\n' -}}{%- endif -%}"
    ),
    "llama3": (
        "{{- bos_token -}}{%- for turn in messages -%}"
        "{{- '<|start_header_id|>' + turn['role'] + '<|end_header_id|>\\n\\n' -}}"
        "{{- turn['content'] | trim + '<|eot_id|>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
    ),
    "mistral": (
        "{{- bos_token -}}{%- set said = namespace(system='') -%}{%- for turn in messages -%}"
        "{%- if turn['role'] == 'system' -%}{%- set said.system = turn['content'] + '\\n\\n' -%}"
        "{%- elif turn['role'] == 'user' -%}"
        "{{- ' [INST] ' + said.system + turn['content'] + ' [/INST]' -}}{%- set said.system = '' -%}"
        "{%- elif turn['role'] == 'assistant' -%}{{- ' ' + turn['content'] + eos_token -}}"
        "{%- endif -%}{%- endfor -%}"
    ),
}  # fmt: skip

#: Words that look like special tokens.
_TOKEN = re.compile(r"<\|[^|<>{}\s]+\|>|\[\|[^|\[\]{}\s]+\|\]|<(?:start|end)_of_\w+>|<\uff5c[^<>{}\n]+\uff5c>")


def choose_template(asked: str, models: Iterable[Files]) -> str | None:
    """The text that ``asked`` stands for: a built-in name, ``auto``, or Jinja itself.

    ``auto`` is the template that most of the models have (the first of them where several are equally
    frequent, blanks around it aside), or None when none has one.
    """
    if asked != "auto":
        return BUILT_IN.get(asked, asked)
    texts = [text for files in models if (text := stored_template(files)) is not None]
    counts = Counter(text.strip() for text in texts)
    return next((text for text in texts if counts[text.strip()] == max(counts.values())), None)


def stored_template(files: Files) -> str | None:
    """The chat template of a model, from whichever of its files the libraries would take it."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8", "replace")
    found = files_in(files, ("tokenizer_config.json", "chat_template.json"))
    texts = (_default(parse_json(data, name).get("chat_template")) for name, data in found.items())
    return next((text for text in texts if text is not None), None)


def _default(stated: object) -> str | None:
    """A template, or the one called "default" of several."""
    if isinstance(stated, list):
        named = (entry for entry in stated if isinstance(entry, dict) and entry.get("name") == "default")
        stated = next(named, {}).get("template")
    return stated if isinstance(stated, str) and stated else None


def check_template(template: str) -> None:
    """UsageError when the Jinja of a template is wrong."""
    import jinja2

    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_without_generation(template))
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"chat_template: line {error.lineno}: {error.message}") from error


def _without_generation(template: str) -> str:
    """Blocks that transformers adds to Jinja, to mark what the assistant says."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


def strange_tokens(template: str, vocabulary: Collection[str], special: Iterable[str]) -> Sequence[str]:
    """Tokens that the template writes and the vocabulary lacks: such text is cut into pieces.

    ``special`` are added tokens of the models, which count whatever they look like.
    """
    found = [match[0] for match in _TOKEN.finditer(template)]
    found += sorted(token for token in special if len(token) > 1 and token in template)
    return [show(token, 40) for token in dict.fromkeys(found) if token not in vocabulary]
