"""Quantised checkpoints as the weights that they stand for: dequantised piece by piece as they are read.

A scheme is one file that finds groups of stored tensors (codes, scales, zero points, indices) from headers and
config.json and tells how each is read as one logical tensor, in the dtype and with the bits of the field's own library.
Every stored tensor is part of a group, a scale of activations, which is dropped, or plain.
"""

from __future__ import annotations

from .checkpoint import Dequantised, dequantised, refusals
from .planes import Window

__all__ = ["Dequantised", "Window", "dequantised", "refusals"]
