"""The command line: one file per command, imported when the command is used."""

from .start import main

__all__ = ["main"]
