"""Make the pages of the manual that come from the code: methods.md, commands.md, python.md.

python -m docs.generate            write them
python -m docs.generate --check    exit 1 when one of them is not what the code says
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

import smelt
from smelt import methods
from smelt.cli.group import COMMANDS
from smelt.cli.group import smelt as group
from smelt.cli.methods import LEGEND, comparison
from smelt.methods import REQUIRED, Method, Parameter

HERE = Path(__file__).parent


def pages() -> dict[str, str]:
    """File name -> text of every generated page."""
    return {"methods.md": _methods_page(), "commands.md": _commands_page(), "python.md": _python_page()}


def stale(folder: Path = HERE) -> list[str]:
    """The generated pages that are missing in ``folder``, or are not what the code says."""
    return [name for name, text in pages().items() if not _holds(folder / name, text)]


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def _page(title: str, source: str, *parts: str) -> str:
    note = f"<!-- Made by `make docs` from {source}: change that, not this page. -->"
    return "\n\n".join([note, f"# {title}", *parts]) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# --- methods --------------------------------------------------------------------------------------------

_METHODS_INTRO = """\
Every method that a recipe can name in `merge_method`, and that `smelt.merge_tensors` takes. `smelt methods NAME`
prints the same on the terminal. Where values are written in a recipe, and what gradients and filters are, is in
[recipes.md](recipes.md); what is exact in the arithmetic is in [numerics.md](numerics.md)."""

_VARIANTS_INTRO = """\
Some methods exist in two flavours, `variant: paper` and `variant: mergekit`. A recipe that does not name one, and
uses nothing but what mergekit's method has, gets mergekit's numbers; with a parameter that only smelt has it follows
the paper. `smelt.merge_tensors` follows the paper unless told otherwise."""


def _methods_page() -> str:
    known = [methods.get(name) for name in methods.names()]
    head = ("method", "what it does", "base", "models", "statistics", "random", "reads", "ns", "when to use it")
    rows = [(f"[{m.name}](#{m.name})", *comparison(m)[1:]) for m in known]
    told: dict[str, str] = {}
    sections = [_method_section(method, told) for method in known]
    return _page(
        "Merge methods", "src/smelt/methods", _METHODS_INTRO, _table(head, rows), LEGEND, _VARIANTS_INTRO, *sections
    )


def _count(method: Method) -> str:
    if method.max_models is None:
        return f"{method.min_models} or more"
    same = method.min_models == method.max_models
    return str(method.min_models) if same else f"{method.min_models} to {method.max_models}"


def _method_section(method: Method, told: dict[str, str]) -> str:
    """One method. The text of its file appears once: at the first of the methods that share it."""
    module = inspect.getmodule(method.merge)
    file = str(module.__name__).rpartition(".")[2] if module else ""
    owner = told.setdefault(file, method.name)
    text = (
        as_markdown(inspect.getdoc(module) or "") if owner == method.name else f"How it works: see [{owner}](#{owner})."
    )
    lead = f"{method.summary[0].upper()}{method.summary[1:]}. {method.advice}"
    return "\n\n".join([f"## {method.name}", f"**{method.title}.** {lead}", _needs(method), _parameters(method), text])


def _needs(method: Method) -> str:
    base = {"required": "a base model and ", "optional": "a base model if there is one, and ", "ignored": ""}[
        method.base
    ]
    models = "model" if method.max_models == 1 else "models"
    lines = [f"- Takes {base}{_count(method)} {models}{' beside it' if base else ''}."]
    if len(method.variants) > 1:
        lines.append(f"- Variants: {', '.join(f'`{variant}`' for variant in method.variants)}.")
    if method.statistics:
        lines.append(f"- Statistics that it can use: {', '.join(f'`{kind}`' for kind in method.statistics)}.")
    if method.random:
        lines.append("- Random: `seed` names the draws.")
    return "\n".join([*lines, f"- Paper: {method.citation}"])


def _parameters(method: Method) -> str:
    head = ("parameter", "type", "default", "range", "one per model", "meaning")
    rows = [
        (f"`{p.name}`", p.kind, _default(p, method), p.range, "yes" if p.per_model else "", _meaning(p))
        for p in method.all_parameters
    ]
    return _table(head, rows)


def _default(parameter: Parameter, method: Method) -> str:
    values = {variant: _plain(parameter.default_for(variant)) for variant in method.variants}
    if len(set(values.values())) == 1:
        return values[method.variants[0]]
    return ", ".join(f"{value} ({variant})" for variant, value in values.items())


def _plain(value: Any) -> str:
    if value is REQUIRED:
        return "required"
    if value is None:
        return "unset"
    return "none" if value == () else str(value).lower() if isinstance(value, bool) else str(value)


def _meaning(parameter: Parameter) -> str:
    if parameter.when is None:
        return parameter.help
    name, values = parameter.when
    return f"{parameter.help} (only with {name}{': ' if values else ''}{' or '.join(map(_plain, values))})"


def as_markdown(docstring: str) -> str:
    """A docstring's code marks and roles as Markdown has them."""
    return re.sub(r"(?::\w+:)?`+([^`]+)`+", r"`\1`", docstring)


# --- commands -------------------------------------------------------------------------------------------

_COMMANDS_INTRO = """\
Results go to stdout, everything else to stderr. With `--json` the result is one JSON value. A progress bar is drawn
only on a terminal, for work of more than a second. A model is a folder, one `.safetensors` file, or a hub id
(`owner/name`, or `owner/name@revision`)."""

_EXIT_CODES = (
    ("0", "done"),
    ("1", "the operation failed: I/O, no space, a value that is not finite, a difference found by `verify`"),
    ("2", "the recipe or the command is wrong"),
    ("3", "an input is rejected: malformed, unsafe, or it does not fit the others"),
    ("70", "a bug in smelt: please report it"),
    ("129, 130, 143", "ended by SIGHUP, SIGINT or SIGTERM; nothing is left behind, unless `--resume` was given"),
)


def _commands_page() -> str:
    exits = "## Exit codes\n\n" + _table(("code", "meaning"), _EXIT_CODES)
    general = "## smelt\n\nOptions of `smelt` itself, before the command:\n\n" + _options(group)
    sections = [_command_section(*path) for path in command_paths()]
    return _page("Commands", "src/smelt/cli", _COMMANDS_INTRO, general, *sections, exits)


def command_paths() -> list[tuple[str, click.Command]]:
    """Every command with the words that call it; a group's own commands stand for the group."""
    found: list[tuple[str, click.Command]] = []
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        assert command is not None
        inner = command.commands if isinstance(command, click.Group) else {}
        found += [(f"{name} {word}", part) for word, part in sorted(inner.items())] or [(name, command)]
    return found


def _command_section(name: str, command: click.Command) -> str:
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    usage = " ".join(["smelt", name, *map(_argument, arguments), "[OPTIONS]"])
    text = inspect.cleandoc(command.help or "")
    return f"## smelt {name}\n\n```text\n{usage}\n```\n\n{text}\n\n{_options(command)}"


def _argument(argument: click.Argument) -> str:
    word = argument.metavar or str(argument.name).upper()
    return word if argument.required else f"[{word}]"


def _options(command: click.Command) -> str:
    options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
    rows = [(_spelling(option), _fallback(option), option.help or "") for option in options]
    return _table(("option", "default", "meaning"), [*rows, ("`--help`", "", "Show the help and exit.")])


def _spelling(option: click.Option) -> str:
    words = ", ".join([*option.opts, *option.secondary_opts])
    return f"`{words}`" if option.is_flag else f"`{words} {_value(option)}`"


def _value(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        return "|".join(map(str, option.type.choices))
    return option.metavar or ("N" if isinstance(option.type, click.IntRange) else str(option.name).upper())


def _fallback(option: click.Option) -> str:
    if option.is_flag:
        return option.opts[0] if option.secondary_opts and option.default else ""
    return str(option.default) if option.show_default else ""


# --- Python ---------------------------------------------------------------------------------------------

_PYTHON_INTRO = """\
All that `import smelt` promises. Nothing heavy is imported until it is used. Other modules are private, but for what
the registry hands out (`smelt.methods`, see [methods.md](methods.md)). Errors are all `SmeltError`; `problems` holds
one line for each mistake that was found, and `exit_code` what the command line would return."""


def _python_page() -> str:
    things = {name: getattr(smelt, name) for name in smelt.__all__ if name != "__version__"}
    sections = [_thing(name, thing) for name, thing in things.items() if not inspect.ismodule(thing)]
    registry = [_thing(f"methods.{name}", getattr(methods, name)) for name in ("get", "names")]
    version = "## smelt.\\_\\_version\\_\\_\n\nThe version, as text."
    return _page("Python", "src/smelt/__init__.py", _PYTHON_INTRO, *sections, *registry, version)


def _thing(name: str, thing: Any) -> str:
    text = [f"{name}{_signature(thing)}", "", *_indented(inspect.getdoc(thing) or "")]
    if inspect.isclass(thing) and not issubclass(thing, Exception):
        for member, value in _members(thing):
            text += ["", *_indented(f"{member}{_signature(value) if callable(value) else ''}")]
            text += _indented(inspect.getdoc(value) or "", 8)
    return f"## smelt.{name}\n\n```text\n" + "\n".join(text).rstrip() + "\n```"


def _members(thing: type) -> list[tuple[str, Any]]:
    """Methods and properties of a class's own, those without a docstring left out."""
    own = [(name, value) for name, value in vars(thing).items() if not name.startswith("_")]
    return [(n, v) for n, v in own if (inspect.isfunction(v) or isinstance(v, property)) and inspect.getdoc(v)]


def _indented(text: str, by: int = 4) -> list[str]:
    return [" " * by + line if line else "" for line in text.splitlines()]


class _Spelt:
    """An annotation that prints as it was written, without quotes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _signature(thing: Callable[..., Any]) -> str:
    """The signature as in the source; the same text in every version of Python."""
    found = inspect.signature(thing)
    parameters = [p.replace(annotation=_spelt(p.annotation)) for p in found.parameters.values()]
    spelt = found.replace(parameters=parameters, return_annotation=_spelt(found.return_annotation))
    return re.sub(r" -> None$", "", str(spelt))


def _spelt(annotation: Any) -> Any:
    return _Spelt(annotation) if isinstance(annotation, str) else annotation


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or say which are stale."""
    if "--check" in arguments:
        for name in stale():
            print(f"docs/{name} is stale: run make docs", file=sys.stderr)
        return 1 if stale() else 0
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
