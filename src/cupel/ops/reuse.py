"""How often values are used once they are read: weighted arithmetic intensity, and the weight fitted to a machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from cupel.ops.ledger import Op, ledger_of
from cupel.ops.products import Product

Array = np.ndarray[Any, np.dtype[np.float64]]
GRID = tuple(round(0.05 * k, 2) for k in range(21))  # candidates for the share of the weights


@dataclass(frozen=True)
class Traffic:
    """Work and data of one layer, or of a whole network.

    Args:
        macs: multiply-adds.
        weights: learned values read, each once.
        activations: values read and written, each once.
        kind: standard, grouped, depthwise, pointwise, linear, attention or recurrent; empty for a sum.
        module: path of the module.
    """

    macs: int
    weights: int
    activations: int
    kind: str = ""
    module: str = ""

    def on(self, batch: int) -> Traffic:
        """The same for `batch` inputs: the weights are read once for all of them."""
        return replace(self, macs=batch * self.macs, activations=batch * self.activations)

    def intensity(self, alpha: float = 0.5) -> float:
        """macs / (alpha * weights + (1 - alpha) * activations): twice the plain arithmetic intensity at 0.5.

        >>> Traffic(60, 10, 20).intensity(0.5), Traffic(60, 10, 20).intensity(1.0)
        (4.0, 6.0)
        """
        moved = alpha * self.weights + (1 - alpha) * self.activations
        return self.macs / moved if moved else float("inf")


def total(layers: Sequence[Traffic]) -> Traffic:
    """All layers together."""
    return Traffic(sum(t.macs for t in layers), sum(t.weights for t in layers), sum(t.activations for t in layers))


def layerwise(layers: Sequence[Traffic], alpha: float = 0.5) -> float:
    """The mean intensity of the layers, whatever their size."""
    return sum(t.intensity(alpha) for t in layers) / len(layers)


def traffic_of(model: nn.Module, inputs: Any) -> tuple[list[Traffic], int]:
    """One row for every matrix product of a forward of `model`, and the multiply-adds that are no such product.

    A weight that one module uses several times counts once; the steps of a recurrence are one row.
    """
    rows: list[Traffic] = []
    left: dict[str, int] = {}  # values of a module's weights that no product has counted yet
    missing = 0
    for op in ledger_of(model, inputs).ops:
        p = op.product
        if p is None:
            missing += op.macs
            continue
        module = model.get_submodule(op.module)
        held = [t.numel() for t in (*module.parameters(), *module.buffers()) if t.ndim > 1]
        fresh = min(p.weights, left.get(op.module, sum(held) or p.weights))
        left[op.module] = left.get(op.module, sum(held) or p.weights) - fresh
        row = Traffic(p.macs, fresh, p.inputs + p.outputs, kind_of(op, p, module), op.module)
        if row.kind == "recurrent" and rows and rows[-1].module == op.module:
            row = replace(total([rows.pop(), row]), kind=row.kind, module=row.module)
        rows.append(row)
    return rows, missing


def kind_of(op: Op, product: Product, module: nn.Module) -> str:
    """How a product reuses its data."""
    if "conv" in op.name:
        if product.groups > 1:
            return "depthwise" if product.depthwise else "grouped"
        return "pointwise" if product.kernel == 1 else "standard"
    if "rnn" in op.name or isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent"
    return "linear" if product.weights else "attention"


def pearson(a: Array, b: Array) -> float:
    """Linear correlation; zero where one side does not vary."""
    x, y = a - a.mean(), b - b.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else 0.0


def spearman(a: Array, b: Array) -> float:
    """Correlation of ranks, ties at their mean rank."""
    return pearson(_ranks(a), _ranks(b))


def _ranks(values: Array) -> Array:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    mean: Array = (np.cumsum(count) - (count - 1) / 2)[place]
    return mean


Correlation = Callable[[Array, Array], float]


def intensities(nets: Sequence[Traffic], alpha: float) -> Array:
    """The weighted intensity of every network."""
    return np.array([net.intensity(alpha) for net in nets])


def fitted_alpha(nets: Sequence[Traffic], measured: Array, by: Correlation = pearson) -> float:
    """The share in `GRID` whose intensities correlate best with what was measured on a machine.

    Args:
        nets: at least three, for two points correlate perfectly.
        measured: efficiency of each, multiply-adds a joule or a second.
        by: the correlation that is made largest.
    """
    return max(GRID, key=lambda alpha: by(intensities(nets, alpha), measured))


def cross_validated(
    nets: Sequence[Traffic], measured: Array, folds: Sequence[Sequence[int]], by: Correlation = pearson
) -> tuple[Array, list[float]]:
    """Intensity of every network with the share fitted on the other folds, and the share of each fold.

    Shares differ between folds, and so do the intensities' scales: each is told in standard deviations from the mean
    of the networks it was fitted on.
    """
    scores, shares = np.empty(len(nets)), []
    for fold in folds:
        rest = _others(len(nets), fold)
        shares.append(fitted_alpha([nets[k] for k in rest], measured[rest], by))
        scores[list(fold)] = standardised(intensities(nets, shares[-1]), [fold])[list(fold)]
    return scores, shares


def standardised(values: Array, folds: Sequence[Sequence[int]]) -> Array:
    """Every value in standard deviations from the mean of the values outside its fold: the same form for a rival."""
    found = np.empty(len(values))
    for fold in folds:
        seen = values[_others(len(values), fold)]
        found[list(fold)] = (values[list(fold)] - seen.mean()) / seen.std()
    return found


def _others(count: int, fold: Sequence[int]) -> list[int]:
    return [k for k in range(count) if k not in set(fold)]


def bootstrap(
    statistic: Callable[[Any], float], count: int, draw: np.random.Generator, repeats: int = 1000
) -> tuple[float, float]:
    """95% percentile interval of `statistic(rows)` over resampled row numbers of `count` networks."""
    values = [statistic(draw.integers(0, count, count)) for _ in range(repeats)]
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
