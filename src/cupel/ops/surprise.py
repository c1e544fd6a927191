"""Surprise adequacy: how far an input lies from what a network saw in training, measured before its last layer.

Scores are `[N]`, higher = more surprising, and differentiable in the features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def features_of(model: nn.Module, head: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the layer `head`, flat, and the logits: `[N, ...]` -> `[N, F]`, `[N, K]`."""
    seen: list[Tensor] = []
    hook = model.get_submodule(head).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        logits = model(x)
    finally:
        hook.remove()
    return seen[-1].flatten(1), logits


@dataclass(frozen=True)
class Gaussians:
    """One Gaussian a class over features: means `[K, F]`, inverse covariances `[K, F, F]`, log-determinants `[K]`."""

    means: Tensor
    precisions: Tensor


def gaussians(features: Tensor, classes: Tensor, count: int) -> Gaussians:
    """Mean and shrunk covariance of every class; one without two examples takes those of all.

    Shapes: features `[N, F]`, classes `[N]`. The covariances are those of Ledoit and Wolf 2004.
    """
    means, inverses = [], []
    for k in range(count):
        own = features[classes == k]
        own = own if len(own) > 1 else features
        means.append(own.mean(0))
        inverses.append(torch.linalg.inv(ledoit_wolf(own.double())).to(features))
    return Gaussians(torch.stack(means), torch.stack(inverses))


def ledoit_wolf(x: Tensor) -> Tensor:
    """(1 - s) S + s mean(diag S) I with the s that least squares asks for: `[N, F]` -> `[F, F]`.

    Source: Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004, lemma 3.3.
    """
    n, size = x.shape
    centred = x - x.mean(0)
    cov = centred.T @ centred / n
    mean = cov.diagonal().mean()
    flat = torch.eye(size).to(cov)
    far = (cov - mean * flat).square().sum() / size
    # (1/n^2) sum_i || x_i x_i' - S ||^2, without forming the n matrices
    noise = (centred.square().sum(1).square().sum() / n - cov.square().sum()) / (n * size)
    share = float(noise.clamp(min=0).minimum(far) / far.clamp_min(1e-30))
    # What has no spread at all still needs an inverse.
    return (1 - share) * cov + (share * mean + 1e-9 * mean + 1e-12) * flat


def mdsa(g: Gaussians, features: Tensor, predicted: Tensor) -> Tensor:
    """Mahalanobis distance to the predicted class: `[N, F]`, `[N]` -> `[N]`.

    Source: Kim, Ju, Feldt, Yoo, Reducing DNN Labelling Cost using Surprise Adequacy, ESEC/FSE 2020, arXiv 2006.00894.
    """
    away = features - g.means[predicted]
    return (torch.einsum("nf,nfg,ng->n", away, g.precisions[predicted], away)).clamp_min(0).sqrt()


def dsa(seen: Tensor, classes: Tensor, features: Tensor, predicted: Tensor) -> Tensor:
    """dist to the nearest example of the predicted class / dist of that one to the nearest of any other class.

    Shapes: what was seen in training `[M, F]` with the classes the network gives it `[M]`; features `[N, F]`,
    predicted `[N]` -> `[N]`. A class that was never predicted in training lends the distance to all.

    Source: Kim, Feldt, Yoo, Guiding Deep Learning System Testing using Surprise Adequacy, ICSE 2019, arXiv
    1808.08444, equations 3 to 5.
    """
    own = classes[None] == predicted[:, None]  # [N, M]
    own = own | ~own.any(1, keepdim=True)
    far = torch.cdist(features, seen, compute_mode="donot_use_mm_for_euclid_dist")
    near = far.masked_fill(~own, math.inf)
    first, at = near.min(1)
    apart = torch.cdist(seen[at], seen, compute_mode="donot_use_mm_for_euclid_dist")
    other = apart.masked_fill(classes[None] == classes[at][:, None], math.inf).amin(1)
    return first / other.clamp(1e-12, 1e12)


@dataclass(frozen=True)
class Densities:
    """A Gaussian kernel estimate a class over the features that vary most."""

    columns: Tensor  # [F'] which features
    points: tuple[Tensor, ...]  # of every class, whitened: [M_k, F']
    whiteners: tuple[Tensor, ...]  # [F', F']
    logs: tuple[float, ...]  # log of the normalising constant


def densities(features: Tensor, classes: Tensor, count: int, most: int = 16) -> Densities:
    """Kernel estimates with Scott's bandwidth, covariance times M^(-2 / (F' + 4)), as surprise adequacy takes them."""
    columns = features.var(0).topk(min(most, features.shape[1])).indices
    points, whiteners, logs = [], [], []
    for k in range(count):
        own = features[classes == k][:, columns].double()
        own = own if len(own) > 2 else features[:, columns].double()
        size = own.shape[1]
        cov = (own - own.mean(0)).T @ (own - own.mean(0)) / max(len(own) - 1, 1)
        cov = cov + (1e-6 * cov.diagonal().mean() + 1e-9) * torch.eye(size).to(cov)
        root = torch.linalg.cholesky(cov * len(own) ** (-2 / (size + 4)))
        white = torch.linalg.inv(root).T
        points.append(own @ white)
        whiteners.append(white)
        logs.append(math.log(len(own)) + size / 2 * math.log(2 * math.pi) + float(root.diagonal().log().sum()))
    return Densities(columns, tuple(points), tuple(whiteners), tuple(logs))


def lsa(d: Densities, features: Tensor, predicted: Tensor) -> Tensor:
    """-log of the density that the predicted class has at the features: `[N, F]`, `[N]` -> `[N]`.

    Source: Kim, Feldt, Yoo, ICSE 2019, arXiv 1808.08444, equations 1 and 2.
    """
    found = torch.zeros(len(features), dtype=torch.double, device=features.device)
    for k in predicted.unique().tolist():
        rows = (predicted == k).nonzero().flatten()
        white = features[rows][:, d.columns].double() @ d.whiteners[k]
        kernels = -0.5 * torch.cdist(white, d.points[k], compute_mode="donot_use_mm_for_euclid_dist").square()
        found = found.index_put((rows,), d.logs[k] - kernels.logsumexp(1))
    return found


def surprises(
    model: nn.Module, head: str, seen: Tensor, classes: int, width: int = 500
) -> dict[str, Callable[[Tensor], Tensor]]:
    """LSA, DSA and MDSA against what `model` makes of the training inputs `seen` `[M, ...]` before its layer `head`."""
    with torch.no_grad():
        parts = [features_of(model, head, x) for x in seen.split(width)]
    base, labels = torch.cat([f for f, _ in parts]), torch.cat([z.argmax(1) for _, z in parts])
    g, d = gaussians(base, labels, classes), densities(base, labels, classes)
    rules: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "lsa": lambda f, y: lsa(d, f, y),
        "dsa": lambda f, y: dsa(base, labels, f, y),
        "mdsa": lambda f, y: mdsa(g, f, y),
    }

    def scoring(rule: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def score(x: Tensor) -> Tensor:
            features, logits = features_of(model, head, x)
            return rule(features, logits.argmax(1))

        return score

    return {name: scoring(rule) for name, rule in rules.items()}
