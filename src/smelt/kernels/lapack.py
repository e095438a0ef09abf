"""The eigenproblem of a symmetric matrix in its steps: all eigenvalues first, then as many vectors as are wanted.

``numpy.linalg.eigh`` copies the matrix, and always makes every vector. The same LAPACK that numpy brings is called
here, with no copy, rows that do not lie a multiple of 4 KiB apart (which caches bear badly: half as long again), and
the last third of the work in proportion to the vectors wanted. Where that library cannot be told by its names, numpy
does it all.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from math import frexp
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

#: Those of the ``count`` largest eigenvalues (n, count).
Vectors = Callable[[int], Matrix]

#: The names of a routine in numpy's own build of OpenBLAS and in a system's. Integers are passed as 64 bits by
#: reference, which a library that takes 32 reads all the same: the lower ones come first in memory.
_NAMES = ("scipy_{}_64_", "{}_64_", "scipy_{}_", "{}_")

#: Columns that nothing is in, beyond rows that would lie a multiple of 4 KiB apart.
_PAD = 8

#: Columns of workspace for each row of a back-transformation.
_BLOCK = 64


def square(size: int) -> Matrix:
    """Zeros (n, n) in memory as :func:`eigenproblem` wants them, which saves it a copy."""
    return np.zeros((size, size + (0 if size % 512 else _PAD)))[:, :size]


def eigenproblem(matrix: Matrix) -> tuple[Matrix, Vectors]:
    """Of a positive semi-definite matrix (n, n), which is used up: eigenvalues, the largest first, and their vectors.

    The latter are made when they are asked for, once. Raises numpy's LinAlgError where the iteration does not end.
    """
    # Of the negative matrix, because LAPACK has the least first; by a power of two, so that nothing is rounded.
    exponent = frexp(float(matrix.diagonal().max(initial=0.0)))[1]
    scale = 2.0 ** min(max(exponent, -1000), 1000)
    matrix *= -1 / scale
    values, vectors = (_by_lapack if len(matrix) and library() else _by_numpy)(matrix)
    return values * -scale, vectors


def _by_numpy(matrix: Matrix) -> tuple[Matrix, Vectors]:
    values, vectors = np.linalg.eigh(matrix)
    return values, lambda count: vectors[:, :count]


def _by_lapack(matrix: Matrix) -> tuple[Matrix, Vectors]:
    """To a tridiagonal matrix, its eigenproblem, and the way back: Fortran's columns are numpy's rows."""
    size = len(matrix)
    if matrix.strides[1] != 8 or (size > 1 and matrix.strides[0] % 4096 == 0):
        matrix, given = square(size), matrix
        matrix[:] = given
    diagonal, beside, turns, work = (np.empty(length) for length in (size, size, size, _BLOCK * size))
    _call("sytrd", "L", size, matrix, _apart(matrix), diagonal, beside, turns, work, len(work))
    rows, much = square(size), np.empty(1 + 4 * size + size * size)
    indices = np.empty(3 + 5 * size, np.int64)
    _call("stedc", "I", size, diagonal, beside, rows, _apart(rows), much, len(much), indices, len(indices))

    def vectors(count: int) -> Matrix:
        if count:
            both = matrix, _apart(matrix), turns, rows, _apart(rows)
            _call("ormtr", "L", "L", "N", size, count, *both, work, len(work))
        return rows.T if count == size else rows[:count].copy().T

    return diagonal, vectors


def _apart(matrix: Matrix) -> int:
    """Elements from one row to the next."""
    return max(matrix.strides[0] // 8, len(matrix))


def _call(name: str, *arguments: Any) -> None:
    """A routine of LAPACK for fp64. The lengths of texts come last, as Fortran has them."""
    texts = [argument for argument in arguments if isinstance(argument, str)]
    failed = ctypes.c_int64()
    function = library()
    assert function is not None
    function(name)(*map(_reference, arguments), ctypes.byref(failed), *(ctypes.c_size_t(1) for _ in texts))
    if failed.value:
        raise np.linalg.LinAlgError(f"LAPACK's {name} failed ({failed.value})")


def _reference(argument: Any) -> Any:
    if isinstance(argument, str):
        return ctypes.c_char_p(argument.encode())
    if isinstance(argument, int):
        return ctypes.byref(ctypes.c_int64(argument))
    return argument.ctypes.data_as(ctypes.c_void_p)


@cache
def library() -> Callable[[str], Any] | None:
    """Finds a routine in the library that numpy was linked with; None where it has other names for them."""
    from numpy.linalg import _umath_linalg

    loaded = ctypes.CDLL(_umath_linalg.__file__)
    for name in _NAMES if sys.byteorder == "little" else ():
        if all(hasattr(loaded, name.format(f"d{routine}")) for routine in ("sytrd", "stedc", "ormtr")):
            return lambda routine, name=name: getattr(loaded, name.format(f"d{routine}"))  # type: ignore[misc]
    return None
