"""Operands: tensors of checkpoints as the engine reads them, fingerprinted on the way.

Every tile that is read is hashed with XXH3-128 (over 10 GB/s per core, where SHA-256 would cost more than
the merge); the digest of a tensor is the XXH3-128 of its tiles' digests in order. It identifies inputs in
the manifest at no extra read. It is no protection against forgery: output tensors get SHA-256.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ..checkpoint import Checkpoint, Factors
from ..errors import OperationFailed, show
from ..kernels.dtypes import DTYPES
from ..kernels.program import Operand
from .tiles import TILE


class Ledger:
    """Digests of the tiles read so far, by (checkpoint label, tensor); those of whole tensors from an earlier run."""

    def __init__(self) -> None:
        self._tiles: dict[tuple[str, str], dict[int, bytes]] = {}
        self._known: dict[tuple[str, str], str] = {}

    def __contains__(self, key: tuple[str, str, int]) -> bool:
        return key[:2] in self._known or key[2] in self._tiles.get(key[:2], {})

    def remember(self, label: str, name: str, digest: str) -> None:
        """What an earlier run found for a tensor, or what it is told by where it is not read element by element."""
        self._known[label, name] = digest

    def digest(self, label: str, name: str, count: int) -> str | None:
        """The digest of a tensor of ``count`` elements; None unless all of its tiles have been read."""
        tiles = self._tiles.get((label, name), {})
        if len(tiles) < -(-count // TILE):
            return self._known.get((label, name))
        return _joined(tiles)

    def untouched(self, label: str, name: str) -> bool:
        """Whether nothing of a tensor has been read."""
        return (label, name) not in self._tiles and (label, name) not in self._known

    def record(self, label: str, name: str, start: int, data: memoryview) -> None:
        self._tiles.setdefault((label, name), {})[start] = xxhash.xxh3_128_digest(data)

    def names(self, label: str) -> list[str]:
        """The tensors of one checkpoint that were read, sorted."""
        return sorted(name for owner, name in self._tiles.keys() | self._known.keys() if owner == label)

    def digests(self, label: str) -> dict[str, str]:
        """Tensor name -> digest of all its tiles, for one checkpoint, sorted by name."""
        tiles, known = self._tiles, self._known
        return {name: known.get((label, name)) or _joined(tiles[label, name]) for name in self.names(label)}


def _joined(tiles: Mapping[int, bytes]) -> str:
    return xxhash.xxh3_128_hexdigest(b"".join(tiles[start] for start in sorted(tiles)))


class CheckpointOperand:
    """One tensor of one checkpoint. ``ledger`` receives the digest of each whole tile on its first read."""

    def __init__(self, checkpoint: Checkpoint, name: str, ledger: Ledger | None = None) -> None:
        info = checkpoint.tensors[name]
        self.checkpoint = checkpoint
        self.name = name
        self.label = checkpoint.label
        self.dtype, self.native = info.dtype, info.native
        self.shape = info.shape
        self.count = info.count
        self._ledger = ledger

    def read(self, start: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` (storage type) with elements from ``start`` on."""
        self.checkpoint.read(self.name, start, out)
        ledger = self._ledger
        if ledger is not None and self._is_tile(start, len(out)) and (self.label, self.name, start) not in ledger:
            ledger.record(self.label, self.name, start, out.data)

    def rank(self, base: Operand | None) -> int | None:
        """Of its factors, where they are known to be those of its change of ``base``; nothing is read."""
        if not isinstance(base, CheckpointOperand) or base.name != self.name:
            return None
        return self.checkpoint.rank(self.name, base.checkpoint)

    def factors(self) -> Factors:
        """How it differs from the base; their digest is the tensor's. OperationFailed where they hold NaN or Inf."""
        found = self.checkpoint.factors(self.name)
        assert found is not None, "whoever asks knows the rank"
        if not (np.isfinite(found.left).all() and np.isfinite(found.right).all()):
            raise OperationFailed(f"{self.label}: tensor {show(self.name)}: the adapter's factors hold NaN or Inf")
        if self._ledger is not None:
            parts = (found.left.tobytes(), found.right.tobytes(), np.float64(found.scaling).tobytes())
            self._ledger.remember(self.label, self.name, xxhash.xxh3_128_hexdigest(b"".join(parts)))
        return found

    def fingerprint(self) -> None:
        """Read the tiles that were not read whole, so that the digest covers the tensor."""
        out = np.empty(min(TILE, self.count), DTYPES[self.dtype].storage)
        for start in range(0, self.count, TILE):
            if self._ledger is not None and (self.label, self.name, start) not in self._ledger:
                self.read(start, out[: self.count - start])

    def _is_tile(self, start: int, count: int) -> bool:
        return start % TILE == 0 and count == min(TILE, self.count - start)
