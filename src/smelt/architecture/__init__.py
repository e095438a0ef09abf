"""Which tensor is what: layer, depth, role, expert, ties. Classification only, from names and config.json."""

from .config import comparable_facts
from .depth import Stack
from .modules import Module, module_of, parts
from .names import aligned, renamed, renaming
from .roles import role_of
from .structure import Structure, TensorRole

__all__ = [
    "Module", "Stack", "Structure", "TensorRole", "aligned", "comparable_facts", "module_of", "parts", "renamed",
    "renaming", "role_of",
]  # fmt: skip
