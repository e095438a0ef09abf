"""The numbers of the format: types of metadata values and of tensors, and what is accepted of each."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ...kernels.blocks import BLOCK_TYPES
from ...kernels.dtypes import DTYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"

#: Kinds of metadata values, in the order of their numbers: how struct spells them.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U32, I32, F32, BOOL, TEXT, ARRAY = 4, 5, 6, 7, 8, 9

MAX_RANK = 4

#: The names of all tensor types that ggml ever had, by number.
TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 4: "Q4_2", 5: "Q4_3", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0",
    35: "TQ2_0", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
TYPE_NUMBERS = {name: number for number, name in TYPE_NAMES.items()}

#: Types whose elements are stored one by one, as they are in other checkpoints.
PLAIN = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
READABLE = (*PLAIN, *BLOCK_TYPES)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as its header states it; ``shape`` has the slowest axis first, ``offset`` counts from the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return bytes_of(self.kind, self.count)


def elements_of(kind: str) -> int:
    """How many elements a block of this type has."""
    return BLOCK_TYPES[kind].elements if kind in BLOCK_TYPES else 1


def bytes_of(kind: str, count: int) -> int:
    """The size of ``count`` elements, which are whole blocks."""
    block = BLOCK_TYPES.get(kind)
    return count * DTYPES[kind].bits // 8 if block is None else count // block.elements * block.size


def aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
