"""One thread inside numpy's matrix routines, because their results depend on how many there are.

Matrices are independent, so smelt runs many at once instead, each on a thread of its own. The C library keeps what a
thread has freed for that thread: after a matrix it is told to give it back.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

#: The pairs that the builds of OpenBLAS and MKL in use export: how many threads, and set them.
_NAMES = (
    ("scipy_openblas_get_num_threads64_", "scipy_openblas_set_num_threads64_"),
    ("scipy_openblas_get_num_threads", "scipy_openblas_set_num_threads"),
    ("openblas_get_num_threads64_", "openblas_set_num_threads64_"),
    ("openblas_get_num_threads", "openblas_set_num_threads"),
    ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
)

_lock = threading.Lock()
_users = 0
_before = 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrix products and decompositions inside run on the calling thread alone, also on other threads' calls."""
    global _users, _before
    controls = _controls()
    if controls is None:
        yield
        return
    count, set_count = controls
    with _lock:
        _users += 1
        if _users == 1:
            _before = count()
            set_count(1)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                set_count(_before)


@cache
def _controls() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """The two functions of the library that numpy was linked with; None where it has other names for them."""
    from numpy.linalg import _umath_linalg

    library = ctypes.CDLL(_umath_linalg.__file__)
    for get, put in _NAMES:
        if hasattr(library, get) and hasattr(library, put):
            return getattr(library, get), getattr(library, put)
    return None


def give_back() -> None:
    """Return freed memory to the system, where the C library (glibc) can be told to."""
    trim = _trimmer()
    if trim is not None:
        trim(0)


@cache
def _trimmer() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
