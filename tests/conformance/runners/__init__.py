"""One function per slug: from the case's spelling to smelt's. A module here lists its own in ``RUNNERS``."""

from __future__ import annotations

import importlib
import pkgutil

from ..case import Runner


def all_runners() -> dict[str, Runner]:
    """Every module's runners by slug."""
    found: dict[str, Runner] = {}
    for module in pkgutil.iter_modules(__path__):
        for slug, runner in importlib.import_module(f"{__name__}.{module.name}").RUNNERS.items():
            if slug in found:
                raise ValueError(f"two runners for {slug}")
            found[slug] = runner
    return found
