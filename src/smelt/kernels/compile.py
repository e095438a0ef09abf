"""The compiled kernel of a call: generated, compiled or loaded, and remembered."""

from __future__ import annotations

from functools import cache

from .generate import Kinds, generate, kinds_of, precision_of
from .native import Kernel, load
from .program import Call
from .source import Formula


def kernel_for(template: str, call: Call, out: str = "") -> Kernel:
    """The compiled kernel for ``call``; ``template`` is a key of TEMPLATES, ``out`` the stored dtype or a width."""
    kernel = call.kernels.get((template, out))
    if kernel is None:
        kernel = _kernel(template, call.formula, kinds_of(call), precision_of(call), out)
        call.kernels[template, out] = kernel
    return kernel


@cache
def _kernel(template: str, formula: Formula, kinds: Kinds, precision: str, out: str) -> Kernel:
    return load(generate(template, formula, kinds, precision, out))
