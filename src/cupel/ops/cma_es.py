"""CMA-ES: search with a normal distribution that learns its mean, covariance and step; many problems at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Rates:
    """The constants of the method for D numbers and a population: Hansen 2016, Table 1, without negative weights."""

    weights: Tensor  # [mu], falling, sum 1
    mass: float  # variance-effective number of the selected
    c_sigma: float
    d_sigma: float
    c_path: float
    c_one: float
    c_mu: float
    length: float  # expected length of a standard normal vector

    @classmethod
    def of(cls, size: int, population: int) -> _Rates:
        raw = math.log((population + 1) / 2) - torch.arange(1, population // 2 + 1, dtype=torch.float64).log()
        weights = raw / raw.sum()
        mass = float(1 / weights.square().sum())
        c_sigma = (mass + 2) / (size + mass + 5)
        c_one = 2 / ((size + 1.3) ** 2 + mass)
        return cls(
            weights, mass, c_sigma, 1 + 2 * max(0.0, math.sqrt((mass - 1) / (size + 1)) - 1) + c_sigma,
            (4 + mass / size) / (size + 4 + 2 * mass / size), c_one,
            min(1 - c_one, 2 * (mass - 2 + 1 / mass) / ((size + 2) ** 2 + mass)),
            math.sqrt(size) * (1 - 1 / (4 * size) + 1 / (21 * size**2)),
        )  # fmt: skip


class CmaEs:
    """One distribution for each of R problems in D numbers; `ask` for a generation, then `tell` its losses.

    m <- sum w_i x_i over the better half; p_sigma and p_c are fading sums of the mean's moves; C learns from p_c
    (rank one) and from the better half (rank mu); the step sigma grows while p_sigma is longer than by chance.

    Args:
        start: first means, `[R, D]`.
        sigma: first step.
        population: points a generation.

    Source: N. Hansen, The CMA Evolution Strategy: A Tutorial, 2016, arXiv 1604.00772, Figure 6 and Table 1.
    """

    def __init__(self, start: Tensor, sigma: float, population: int) -> None:
        rows, size = start.shape
        self.mean, self.population = start.double().clone(), population
        self.rates = _Rates.of(size, population)
        self.sigma = torch.full((rows,), sigma, dtype=torch.float64)
        self.cov = torch.eye(size, dtype=torch.float64).repeat(rows, 1, 1)
        self.path_sigma, self.path = torch.zeros(2, rows, size, dtype=torch.float64)
        self.generation = torch.zeros(rows, dtype=torch.long)

    def ask(self, rows: Tensor, draw: torch.Generator) -> Tensor:
        """A generation of problems `rows` `[r]`: points `[r, population, D]`."""
        noise = torch.randn(len(rows), self.population, self.mean.shape[1], generator=draw, dtype=torch.float64)
        lengths, axes = self._axes(rows)
        steps = torch.einsum("rij,rpj->rpi", axes * lengths[:, None], noise)
        return self.mean[rows, None] + self.sigma[rows, None, None] * steps

    def tell(self, rows: Tensor, points: Tensor, losses: Tensor) -> None:
        """Learn from the losses `[r, population]` of what was asked."""
        k, size = self.rates, self.mean.shape[1]
        best = losses.argsort(dim=1, stable=True)[:, : len(k.weights)]
        chosen = points.double().gather(1, best[:, :, None].expand(-1, -1, size))
        y = (chosen - self.mean[rows, None]) / self.sigma[rows, None, None]  # [r, mu, D]
        move = torch.einsum("m,rmi->ri", k.weights, y)
        lengths, axes = self._axes(rows)
        white = torch.einsum("rij,rj->ri", axes, torch.einsum("rij,ri->rj", axes, move) / lengths)
        self.mean[rows] += self.sigma[rows, None] * move
        p_sigma = (1 - k.c_sigma) * self.path_sigma[rows] + math.sqrt(k.c_sigma * (2 - k.c_sigma) * k.mass) * white
        self.generation[rows] += 1
        fade = (1 - (1 - k.c_sigma) ** (2.0 * self.generation[rows].double())).sqrt()
        # While the step is growing fast, the path must not stretch the covariance as well.
        calm = (p_sigma.norm(dim=1) / fade < (1.4 + 2 / (size + 1)) * k.length).double()
        pull = math.sqrt(k.c_path * (2 - k.c_path) * k.mass)
        path = (1 - k.c_path) * self.path[rows] + calm[:, None] * pull * move
        missed = k.c_one * (1 - calm) * k.c_path * (2 - k.c_path)  # what the held path would have added
        keep = (1 - k.c_one - k.c_mu + missed)[:, None, None]
        spread = torch.einsum("m,rmi,rmj->rij", k.weights, y, y)
        self.cov[rows] = keep * self.cov[rows] + k.c_one * path[:, :, None] * path[:, None] + k.c_mu * spread
        self.sigma[rows] *= (k.c_sigma / k.d_sigma * (p_sigma.norm(dim=1) / k.length - 1)).exp()
        self.path_sigma[rows], self.path[rows] = p_sigma, path

    def _axes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Standard deviations `[r, D]` and axes `[r, D, D]` (columns) of the covariance."""
        values, vectors = torch.linalg.eigh(self.cov[rows])
        return values.clamp_min(1e-20).sqrt(), vectors
