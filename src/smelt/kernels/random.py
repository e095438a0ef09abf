"""Counter-based random numbers: a function of (seed, tensor name, model index, element index).

The stream is Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011). The key is a hash of seed, tensor and model; the counter is the element's position. So a mask does
not depend on tiles, threads, shards, device or dtype, and is regenerated instead of stored. The compiled
kernels draw the same words (``scalars.philox_block``).

Layout: element e belongs to block e // 1024; inside it, word (e % 1024) // 256 of counter
256 * block + e % 256.
"""

from __future__ import annotations

import hashlib
from typing import Any

BLOCK = 1024

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def key_of(seed: int, tensor: str, model: int) -> tuple[int, int]:
    """Two 32-bit key words for the draws of one model on one tensor."""
    text = f"{seed}\x00{model}\x00{tensor}".encode()
    digest = hashlib.blake2b(text, digest_size=8, person=b"smelt-draw").digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def threshold_of(density: float) -> int:
    """Keep a draw when it is at least this: round((1 - density) * 2^32). ``density`` in (0, 1]."""
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must lie in (0, 1], not {density}")
    return min(round((1.0 - density) * 2.0**32), _LOW)


def drawn(words: Any, density: Any) -> Any:
    """Which draws are kept: with one ``density`` for all, or an array (numpy or torch, float32) of their own."""
    if isinstance(density, int | float):
        return words >= threshold_of(density)
    wide = density.double() if hasattr(density, "double") else density.astype("float64")
    return words >= (1.0 - wide) * 2.0**32


def words(key: tuple[int, int], start: int, count: int, like: Any = None) -> Any:
    """The 32-bit draws of elements start .. start + count.

    A numpy uint32 array; with ``like`` (a torch tensor) an int64 tensor on its device.
    """
    first, last = start // BLOCK, -(-(start + count) // BLOCK)
    if like is None:
        import numpy as np

        counters = np.arange(first * 256, last * 256, dtype=np.uint64)
        rounds = _philox(counters, key, np.uint64)
        blocks = np.stack(rounds).reshape(4, last - first, 256).transpose(1, 0, 2).reshape(-1)
        return blocks[start - first * BLOCK :][:count].astype(np.uint32)
    import torch

    counters = torch.arange(first * 256, last * 256, dtype=torch.int64, device=like.device)
    rounds = _philox(counters, key, int)
    blocks = torch.stack(rounds).reshape(4, last - first, 256).permute(1, 0, 2).reshape(-1)
    return blocks[start - first * BLOCK :][:count]


def _philox(counters: Any, key: tuple[int, int], word: Any) -> list[Any]:
    """Ten rounds on 64-bit integers that hold 32-bit words; works on uint64 and on wrapping int64."""
    low, shift = word(_LOW), word(32)
    x0, x1 = counters & low, (counters >> shift) & low
    x2, x3 = counters ^ counters, counters ^ counters
    k0, k1 = key
    for _ in range(10):
        p0, p1 = x0 * word(_M0), x2 * word(_M1)
        y0 = ((p1 >> shift) & low) ^ x1 ^ word(k0)
        y2 = ((p0 >> shift) & low) ^ x3 ^ word(k1)
        x0, x1, x2, x3 = y0, p1 & low, y2, p0 & low
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return [x0, x1, x2, x3]
