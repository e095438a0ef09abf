"""``smelt`` itself: knows the names of its commands, and imports one only when it is called."""

from __future__ import annotations

import importlib

import click

from .._version import __version__
from .options import common

#: Command -> its line in ``smelt --help``; each is the ``command`` of the module of that name.
COMMANDS = {
    "merge": "Run a recipe: merge models into a new folder.",
    "explain": "What a recipe does with each tensor.",
    "check": "Can these models be merged, and how best?",
    "lora": "Make and merge adapters.",
    "stack": "A recipe that stacks, repeats, drops or shuffles layers.",
    "tokenizer": "Give models other vocabularies.",
    "inspect": "What a checkpoint holds.",
    "methods": "The merge methods, their parameters and papers.",
    "convert": "Write a checkpoint in another form.",
    "verify": "Does an output still hold what its manifest says?",
    "reproduce": "Does the recipe of an output give the same bits again?",
    "clean": "What have runs that were killed left behind?",
}


class Commands(click.Group):
    """A group whose help needs no command's module."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f".{cmd_name}", __package__).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            from ..recipe import did_you_mean

            hint = did_you_mean(name, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
            raise click.UsageError(f"no command {name!r}{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="smelt", message="%(prog)s %(version)s")
@common
def smelt() -> None:
    """Merge, compare and verify trained networks in parameter space.

    \b
        smelt check A B C --base BASE     do these share a backbone? what should I use?
        smelt merge recipe.yml OUT        run a recipe, in mergekit's language
        smelt verify OUT                  is it still what was written?

    Exit codes: 0 done, 1 failed, 2 wrong recipe or command, 3 input rejected, 70 a bug in smelt,
    129, 130 and 143 interrupted.
    """
