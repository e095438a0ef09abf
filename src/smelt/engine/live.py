"""Live models: modules as dicts of their tensors, and which of these are one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def arrays_of(model: Any) -> Any:
    """A module's ``state_dict()`` with its parameters themselves, so that gradients find them; else ``model``."""
    is_module = not isinstance(model, Mapping) and callable(getattr(model, "state_dict", None))
    return model.state_dict(keep_vars=True) if is_module else model


def ties(models: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, str]:
    """Name -> the first name of a torch tensor that shares its memory in every model, where there is one."""
    first: dict[tuple[Any, ...], str] = {}
    places = {name: tuple(_place(model.get(name)) for model in models) for name in names}
    return {name: first.setdefault(place, name) for name, place in places.items() if None not in place}


def _place(array: Any) -> tuple[Any, ...] | None:
    """Where a torch tensor's memory lies and how it is read; None for other arrays."""
    if not hasattr(array, "data_ptr") or array.is_meta or not array.numel():
        return None
    return array.device, array.data_ptr(), array.dtype, tuple(array.shape), array.stride()
