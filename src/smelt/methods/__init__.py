"""Published ways to combine tensors, one file each, and the registry that lists them."""

from .registry import REQUIRED, Citation, Method, Parameter, Statistic, catalogue, get, names
from .tensors import Model, Tensor

__all__ = ["REQUIRED", "Citation", "Method", "Model", "Parameter", "Statistic", "Tensor", "catalogue", "get", "names"]
