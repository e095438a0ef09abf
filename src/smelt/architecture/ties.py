"""Which axis of a tensor counts tokens, and which tensors are one and the same."""

from __future__ import annotations

from collections.abc import Mapping

from .config import Config, ties_embeddings, vocabulary_sizes
from .roles import role_of

Shape = tuple[int, ...]


class Vocabulary:
    """The embedding and the head of one model.

    Attributes
    ----------
    embeddings, heads: the names of the stored matrices with these roles.
    tied: whether config.json says that they are one; None when it does not say.
    """

    def __init__(self, roles: Mapping[str, str], shapes: Mapping[str, Shape], config: Config) -> None:
        self._roles, self._shapes = roles, shapes
        self.embeddings, self.heads = self._matrices("embedding"), self._matrices("head")
        self.tied = ties_embeddings(config)
        rows = {shapes[name][0] for name in self.embeddings if name in shapes}
        self._sizes = rows | vocabulary_sizes(config)

    def _matrices(self, role: str) -> tuple[str, ...]:
        named = [name for name, found in self._roles.items() if found == role and not name.endswith(".bias")]
        return tuple(sorted(name for name in named if len(self._shapes.get(name, (0, 0))) == 2))

    def axis(self, name: str) -> int | None:
        """The axis of a stored tensor that runs over tokens; None when there is none or the shape is unknown."""
        shape = self._shapes.get(name)
        if shape is None:
            return None
        if name in self.embeddings or name in self.heads:
            return next((axis for axis, size in enumerate(shape) if size in self._sizes), 0)
        is_bias = self._roles.get(name) == "head" and len(shape) == 1 and shape[0] in self._sizes
        return 0 if is_bias else None

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Stored matrices that the config ties: embedding and head of equal shape, when both are stored."""
        if not self.tied or not self.embeddings:
            return ()
        shape = self._shapes.get(self.embeddings[0])
        group = tuple(name for name in self.embeddings + self.heads if self._shapes.get(name) == shape)
        return (group,) if len(group) > 1 else ()

    def source(self, name: str) -> str | None:
        """The stored embedding that stands for ``name``, an absent head or a second embedding.

        None when ``name`` is stored or is neither, when the config says that they are not tied, and when
        it cannot be told which embedding is meant.
        """
        role = role_of(name)
        if name in self._roles or self.tied is False or name.endswith(".bias") or role not in ("head", "embedding"):
            return None
        if role == "embedding":
            return next((stored for stored in self.embeddings if stored.endswith("shared.weight")), None)
        return self.embeddings[0] if len(self.embeddings) == 1 else None
