"""Which tensor is what: layer, depth, role, expert, ties. Classification only, from names and config.json."""

from .config import comparable_facts
from .depth import Stack
from .names import aligned
from .roles import role_of
from .structure import Structure, TensorRole

__all__ = ["Stack", "Structure", "TensorRole", "aligned", "comparable_facts", "role_of"]
