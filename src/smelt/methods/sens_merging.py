"""Sens-Merging: task vectors weighted per layer by how sensitive each model's own task is to that layer.

Liu, Wu, He, Han, Yuan, Song, "Sens-Merging: sensitivity-guided parameter balancing for merging large language
models", Findings of ACL 2025, https://arxiv.org/abs/2502.12420. No code was published; what follows is read from
the paper. S_il is the sum over the tensors of layer l of mean |theta dL/dtheta| (``statistics``: one number per
tensor and model), K the number of models:

    alpha_il = S_il / ||S_i||_2 over the layers,   sigma_il = softmax_i(alpha_il t_i / temperature)
    theta = theta_0 + lambda K sum_i sigma_il (theta_i - theta_0)

so that equal sigmas give task arithmetic with weight lambda. t_i says how well model i transfers: in proportion
to 1 / ``distance`` (``transfer: inverse``; the sum of the distances of its logits to those of the others) or to
the distance itself, summing to 1. A layer is a numbered block; what lies outside counts module by module.
"""

from __future__ import annotations

from collections import defaultdict
from math import exp, fsum, sqrt

from ..architecture.names import first_index
from ..kernels.broadcast import vector
from ..kernels.program import Call, call
from .registry import EXCLUDE, Citation, Method, Parameter, Statistic, Steps
from .task_arithmetic import add_task_vectors
from .tensors import Model, Tensor

#: Group of tensors -> the share of each model's sensitivity.
Shares = dict[str, tuple[float, ...]]


def layer_of(name: str) -> str:
    """The numbered block that a tensor belongs to, else its module."""
    cut = first_index(name)
    return f"{cut.container}.{cut.number}" if cut is not None else name.rpartition(".")[0] or name


def survey(model: Model) -> Steps:
    """The sensitivities' shares by layer and by tensor."""
    yield ()
    found = {
        tensor.name: [float(vector(each).reshape(-1)[0]) for each in tensor.statistics["grad_abs_theta"]]
        for tensor in model.tensors
    }
    layers: dict[str, list[list[float]]] = defaultdict(list)
    for name, values in found.items():
        layers[layer_of(name)].append(values)
    by_layer = {layer: [fsum(column) for column in zip(*rows, strict=True)] for layer, rows in layers.items()}
    return {"layer": shares(by_layer), "tensor": shares(found)}


def shares(found: dict[str, list[float]]) -> Shares:
    """Each model's values divided by their L2 norm; all alike where that is 0."""
    columns = [list(column) for column in zip(*found.values(), strict=True)]
    norms = [sqrt(fsum(value * value for value in column)) for column in columns]
    alike = 1 / sqrt(len(found))
    return {
        group: tuple(value / norm if norm > 0 else alike for value, norm in zip(values, norms, strict=True))
        for group, values in found.items()
    }


def merge(tensor: Tensor) -> Call:
    weights: tuple[float, ...] = (1.0,) * len(tensor.models)
    if tensor.survey is not None:
        group = layer_of(tensor.name) if tensor["granularity"] == "layer" else tensor.name
        alphas = tensor.survey[tensor["granularity"]][group]
        transfers = transfer_shares(tensor.each["distance"], tensor["transfer"])
        weights = balanced(alphas, transfers, tensor["temperature"])
    return call(add_task_vectors, base=tensor.base, models=tensor.models, weights=weights, scale=tensor["lambda"])


def transfer_shares(distances: tuple[float, ...], rule: str) -> tuple[float, ...]:
    values = [1 / distance for distance in distances] if rule == "inverse" else list(distances)
    return tuple(value / fsum(values) for value in values)


def balanced(alphas: tuple[float, ...], transfers: tuple[float, ...], temperature: float) -> tuple[float, ...]:
    """K sigma_i: they sum up to the number of models."""
    scores = [alpha * transfer / temperature for alpha, transfer in zip(alphas, transfers, strict=True)]
    powers = [exp(score - max(scores)) for score in scores]
    return tuple(len(powers) * power / fsum(powers) for power in powers)


METHODS = (
    Method(
        name="sens_merging",
        title="Sens-Merging",
        summary="task vectors weighted per layer by the sensitivity of each task",
        advice="As task_arithmetic, where sensitivities were measured; its weights differ little at temperature 1.",
        citation=Citation(
            "Sens-Merging: sensitivity-guided parameter balancing for merging large language models", "Liu et al.",
            "Findings of ACL 2025", "https://arxiv.org/abs/2502.12420",
        ),
        merge=merge,
        survey=survey,
        parameters=(
            Parameter("lambda", "float", 0.4, "factor of each task vector at equal sensitivities", mergekit=False),
            Parameter("temperature", "float", 1.0, "of the softmax over models: high values level it", low=0,
                      open_low=True, mergekit=False),
            Parameter("distance", "float", 1.0, "of a model's logits to those of the others, summed", per_model=True,
                      low=0, open_low=True, mergekit=False),
            Parameter("transfer", "str", "inverse", "models count the more the smaller, or the larger, the distance",
                      choices=("inverse", "distance"), mergekit=False),
            Parameter("granularity", "str", "layer", "what has one weight per model", choices=("layer", "tensor"),
                      mergekit=False),
            EXCLUDE,
        ),
        statistics=(Statistic("grad_abs_theta", "number"),),
    ),
)  # fmt: skip
