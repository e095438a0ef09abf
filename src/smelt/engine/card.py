"""The model card: README.md with the hub's metadata, the method and its paper, the models, the recipe."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import PurePath

from ..errors import without_secrets
from ..methods import Method

#: Files that only the models of one library have.
_LIBRARIES = {
    "model_index.json": "diffusers", "modules.json": "sentence-transformers", "open_clip_config.json": "open_clip",
}  # fmt: skip

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.-]+)?")


def public_name(text: str, is_local: bool) -> str:
    """How an output may name a model: a hub id or URL as it is, a local path by its last component."""
    if "://" in text:
        return without_secrets(text)
    return PurePath(text).name or "model" if is_local else text


def without_paths(text: str, local_paths: Sequence[str]) -> str:
    """A recipe or notice with local paths cut to their last component: no output tells where its author works.

    Nor does it hold passwords or signatures of URLs.
    """
    for path in sorted(local_paths, key=len, reverse=True):
        if "/" in path or "\\" in path:
            text = text.replace(path, public_name(path, True))
    return without_secrets(text)


def card(
    *, title: str, method: Method, base: str | None, models: Sequence[str], hub_ids: Sequence[str],
    license_name: str | None, recipe: str, notices: Sequence[str], library: str,
) -> str:  # fmt: skip
    """README.md. ``models`` and ``base`` are public names, ``hub_ids`` those of them that are hub ids."""
    lines = ["---"]
    if hub_ids:
        lines += ["base_model:", *(f"- {name}" for name in hub_ids), "base_model_relation: merge"]
    lines += [f"library_name: {library}", *([f"license: {license_name}"] if license_name else [])]
    lines += ["tags:", "- merge", "- smelt", "---", "", f"# {title}", ""]
    lines += [
        f"A merge made with smelt by **{method.title}** (`{method.name}`).",
        "",
        f"> {method.citation}",
        "",
    ]
    if base:
        lines += [f"Base model: `{base}`", ""]
    lines += ["Merged models:", "", *(f"- `{name}`" for name in models), ""]
    if notices:
        lines += ["Notices of the run:", "", *(f"- {notice}" for notice in notices), ""]
    lines += ["The recipe:", "", "```yaml", recipe.rstrip(), "```", ""]
    lines += [
        "`smelt-manifest.json` holds the digests of inputs and outputs; check them with `smelt verify`.",
        "",
    ]
    return "\n".join(lines)


def library_of(files: Collection[str]) -> str:
    """Which library loads a model that needs these files beside the usual ones."""
    return next((library for name, library in _LIBRARIES.items() if name in files), "transformers")


def hub_id(text: str) -> str | None:
    """The hub id that a model is named by, with or without hf://; None for other names."""
    bare = text.removeprefix("hf://")
    return bare if _HUB_ID.fullmatch(bare) is not None else None
