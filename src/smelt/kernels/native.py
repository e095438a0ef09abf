"""From generated source to machine code, kept on disk as object code.

Numba compiles a kernel once per machine. What is kept is the object file, not Numba's own cache: the next
process hands it to LLVM's linker and never imports Numba, which spares 0.3 s of every start. A kernel's file
is named by a hash of everything that decides its code: the generated text (with the formula and all it
calls), the scalar building blocks, the processor and the versions. Its content carries a SHA-256 of itself.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .. import storage
from ..errors import OperationFailed, show
from .generate import Generated

_SCALARS = {
    "int64": ctypes.c_int64, "uint64": ctypes.c_uint64, "uint32": ctypes.c_uint32,
    "float32": ctypes.c_float, "float64": ctypes.c_double,
}  # fmt: skip

#: How compiled code takes a one-dimensional array: two unused owners, size, item size, data, shape, stride.
_ARRAY = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64,
          ctypes.c_int64]  # fmt: skip


class Kernel:
    """A compiled function. Call it with its parameters in order; it returns its two int64 results."""

    def __init__(self, address: int, generated: Generated) -> None:
        self._kinds = [kind for _, kind in generated.parameters]
        self._scratch = generated.scratch
        self._lent = threading.local()
        kinds = [ctype for kind in self._kinds for ctype in _ctypes_of(kind)]
        kinds += _ARRAY * (len(self._scratch) + 1)
        # Compiled functions take a place for the return value and one for an exception first; neither is used.
        self._function = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *kinds)(address)

    def __call__(self, *values: Any) -> tuple[int, int]:
        lent, unused, result = self._own()
        flat: list[Any] = []
        for kind, value in zip(self._kinds, values, strict=True):
            if kind[0] == "[":
                flat += _flattened(value)
            elif kind[-1] == "]":
                flat += value
            else:
                flat.append(value)
        if self._function(unused, unused, *flat, *lent):
            raise OperationFailed("a compiled kernel reported an error")
        return int(result[0]), int(result[1])

    def _own(self) -> Any:
        """This thread's scratch arrays, flattened, a place for what is not used, and the result array."""
        if not hasattr(self._lent, "own"):
            arrays = [np.zeros(length, dtype) for _, dtype, length in self._scratch]
            result = np.zeros(2, np.int64)
            unused = ctypes.create_string_buffer(16)
            flat = [item for array in (*arrays, result) for item in _flattened(array)]
            self._lent.own = (flat, ctypes.addressof(unused), result)
            self._lent.keep = (arrays, unused)
        return self._lent.own


def _flattened(array: Any) -> tuple[Any, ...]:
    size, width = array.size, array.itemsize
    return (None, None, size, width, array.__array_interface__["data"][0], size, width)


def _ctypes_of(kind: str) -> list[Any]:
    if kind[0] == "[":
        return _ARRAY
    name, _, length = kind.removesuffix("]").partition("[")
    return [_SCALARS[name]] * int(length or 1)


# --- loading --------------------------------------------------------------------------------------------


_LOADING = threading.Lock()
_ENGINES: list[Any] = []  # LLVM frees the code with its engine


def load(generated: Generated) -> Kernel:
    """The kernel's machine code: from the cache folder, else compiled now and put there."""
    with _LOADING:
        path = _cache_folder() / f"{_name_of(generated)}.kernel"
        if not storage.exists(path):
            storage.write_atomically(path, _packed(*_compile(generated)))
        symbol, code = _unpacked(storage.read_small(path, 1 << 26), path)
        return Kernel(_link(symbol, code), generated)


def _link(symbol: str, code: bytes) -> int:
    """Load object code into this process; returns the address of ``symbol``."""
    import llvmlite.binding as llvm

    machine = _target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _ENGINES.append(engine)
    return int(engine.get_function_address(symbol))


def _target_machine() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(cpu=llvm.get_host_cpu_name(), jit=True)


def _compile(generated: Generated) -> tuple[str, bytes]:
    """Symbol and object code of ``run``."""
    from numba import types

    namespace: dict[str, Any] = {"__name__": "smelt_kernel"}
    exec(compile(generated.text, "<smelt kernel>", "exec"), namespace)
    signature = tuple(_numba_type(kind, types) for _, kind in generated.parameters)
    signature += tuple(_numba_type(f"[{dtype}]", types) for _, dtype, _ in generated.scratch)
    signature += (_numba_type("[int64]", types),)
    function = namespace["run"]
    function.compile(types.void(*signature))
    compiled = function.overloads[signature]
    return compiled.fndesc.llvm_func_name, compiled.library._get_compiled_object()


def _numba_type(kind: str, types: Any) -> Any:
    if kind[0] == "[":
        return types.Array(getattr(types, kind[1:-1]), 1, "C")
    name, _, length = kind.removesuffix("]").partition("[")
    scalar = getattr(types, name)
    return types.UniTuple(scalar, int(length)) if length else scalar


# --- the cache ------------------------------------------------------------------------------------------


def _packed(symbol: str, code: bytes) -> bytes:
    head = {"symbol": symbol, "sha256": hashlib.sha256(code).hexdigest()}
    return json.dumps(head).encode() + b"\n" + code


def _unpacked(data: bytes, path: Path) -> tuple[str, bytes]:
    """Symbol and code. OperationFailed when the file is not what was written."""
    head, _, code = data.partition(b"\n")
    try:
        facts = json.loads(head)
        whole = facts["sha256"] == hashlib.sha256(code).hexdigest()
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise OperationFailed(f"{show(path)} is damaged: remove it, it will be made again")
    return facts["symbol"], code


def _name_of(generated: Generated) -> str:
    facts = repr((generated.text, generated.parameters, generated.scratch, _environment()))
    return hashlib.sha256(facts.encode()).hexdigest()[:40]


@cache
def _environment() -> str:
    """What else decides the machine code: the building blocks, the processor, the compiler's versions."""
    from importlib.metadata import version

    import llvmlite.binding as llvm

    here = Path(__file__).parent
    texts = b"".join(storage.read_small(here / name, 1 << 20) for name in ("scalars.py", "sums.py", "native.py"))
    features = llvm.get_host_cpu_features().flatten()
    return f"{hashlib.sha256(texts).hexdigest()} {llvm.get_host_cpu_name()} {features} {version('numba')}"


@cache
def _cache_folder() -> Path:
    """Where compiled kernels are kept; a private temporary folder when the cache cannot be written."""
    return storage.cache_folder("kernels") or Path(tempfile.mkdtemp(prefix="smelt-kernels-"))
