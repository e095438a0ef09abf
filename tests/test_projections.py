"""Laws of the methods that project: regmean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import smelt
from smelt.errors import InputRejected
from tests.small_models import Arrays
from tests.tensors import assert_close

merge_tensors = smelt.merge_tensors


def drawn(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- regmean ------------------------------------------------------------------------------------------------


def gram(inputs: Any) -> dict[str, Arrays]:
    return {"gram": {"w": (inputs.T @ inputs / len(inputs)).astype(np.float32)}}


def test_regmean_fits_all_outputs_best() -> None:
    models, inputs = [{"w": drawn(seed, 5, 4)} for seed in range(2)], [drawn(seed, 50, 4) for seed in (2, 3)]
    options = {"reduce_non_diagonal_ratio": 1.0}
    found = merge_tensors("regmean", models, statistics=[gram(x) for x in inputs], parameters=options)["w"]

    def error(w: Any) -> float:
        return float(sum(((x @ (w - m["w"]).T) ** 2).sum() for x, m in zip(inputs, models, strict=True)))

    assert all(error(found) < error(found + 0.01 * drawn(seed, 5, 4)) for seed in range(4, 24))


def test_regmean_of_equal_or_missing_grams_is_the_mean() -> None:
    models = [{"w": drawn(seed, 5, 4), "v": drawn(seed, 3)} for seed in range(2)]
    known = gram(drawn(2, 50, 4))
    mean = merge_tensors("linear", models)
    assert_close(merge_tensors("regmean", models, statistics=[known, known]), mean)
    some = [known, {"gram": {"u": known["gram"]["w"]}}]
    with pytest.raises(InputRejected, match="no gram of 1 tensor"):
        merge_tensors("regmean", models, statistics=some)


@pytest.mark.parametrize("ratio", [0.0, 0.9, 1.0])
def test_regmean_keeps_the_mean_of_features_never_seen(ratio: float) -> None:
    models, inputs = [{"w": drawn(seed, 5, 4)} for seed in range(2)], [drawn(seed, 2, 4) for seed in (2, 3)]
    for x in inputs:
        x[:, 1:] = 0
    options = {"reduce_non_diagonal_ratio": ratio}
    found = merge_tensors("regmean", models, statistics=[gram(x) for x in inputs], parameters=options)["w"]
    np.testing.assert_allclose(found[:, 1:], merge_tensors("linear", models)["w"][:, 1:], atol=1e-6)
    assert not np.allclose(found[:, 0], merge_tensors("linear", models)["w"][:, 0], atol=1e-3)
