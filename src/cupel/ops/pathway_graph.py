"""The graph of kept channels and connections as plain lists and numbers, for a page to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.ops import pathways as ways
from cupel.ops.channel_flow import Flow
from cupel.ops.feature_images import packed, patches_of

MOST = 20  # strongest channels of a layer, however wide


@dataclass(frozen=True)
class Kept:
    """What counts, for conditions `original`, `target` and then one for each strength.

    Args:
        scores: median score of every channel, by condition and layer, `[C]` each.
        top: the strongest of them, `[C]` bool each.
        edges: connections between channels that are strongest under any condition, `[E]`.
        weight: median influence by condition, `[conditions, E]`.
        paths: which connections lie on the condition's pathway, `[conditions, E]` bool.
    """

    scores: list[list[Tensor]]
    top: list[list[Tensor]]
    edges: ways.Edges
    weight: Tensor
    paths: Tensor

    @property
    def labels(self) -> Tensor:
        """Labels of all kept channels, in order."""
        return torch.cat([torch.stack(by).any(0) for by in zip(*self.top, strict=True)]).nonzero().flatten()


def kept_of(
    net: nn.Module, flow: Flow, inputs: Sequence[Tensor], pair: tuple[int, int], share: float, width: int = 3
) -> Kept:
    """Median scores, strongest channels, connections and pathways of every condition.

    Args:
        inputs: images of every condition, `[N, C, H, W]` each.
        pair: original and target class: the channels of the last layer that are kept.
        share: of a layer's channels that count as strongest, `MOST` at most.
        width: connections that are followed back from every channel, and most that are kept for a condition.
    """
    scores = [[s.median(0).values.cpu() for s in ways.scores_of(net, flow, x)] for x in inputs]
    ends = torch.zeros(flow.layers[-1].count, dtype=torch.bool)
    ends[list(pair)] = True
    top = []
    for c, by in enumerate(scores):
        chosen = [ways.strongest(s, min(MOST, math.ceil(share * len(s)))) for s in by[:-1]]
        own = torch.zeros_like(ends)
        own[pair[0] if c == 0 else pair[1]] = True
        top.append([*chosen, own])
    kept = torch.cat([torch.stack(by).any(0) for by in zip(*top, strict=True)])
    every = [ways.influence_of(net, flow, x, kept) for x in inputs]
    weight = torch.stack([e.influence.median(0).values for e in every])
    edges, first = every[0], flow.layers[-1].first
    starts = [first + pair[0]] + [first + pair[1]] * (len(inputs) - 1)
    paths = torch.stack([ways.pathway(edges, w, start, width) for w, start in zip(weight, starts, strict=True)])
    near = torch.stack([ways.strongest_into(edges, w, width) for w in weight]).any(0) | paths.any(0)
    thin = ways.Edges(edges.source[near], edges.into[near], edges.influence[:, near])
    return Kept(scores, top, thin, weight[:, near], paths[:, near])


def graph_of(net: nn.Module, flow: Flow, kept: Kept, pool: Tensor, bounds: tuple[float, float]) -> dict[str, object]:
    """Layers, channels with groups, scores and feature images, and connections, as JSON.

    Args:
        pool: images that the feature images are taken from, `[N, C, H, W]`.
        bounds: the range of a pixel.
    """
    maps = [m.cpu() for m in ways.maps_of(net, flow, pool)]
    columns: dict[str, list[object]] = {
        k: [] for k in ("layer", "channel", "group", "score", "top", "shift", "patches")
    }
    shifts = [[_shift(by[i], kept.scores[0][i]) for by in kept.scores[2:]] for i in range(len(flow.layers))]
    for label in kept.labels.tolist():
        i = flow.layer_of(label)
        layer = flow.layers[i]
        c = label - layer.first
        top = [int(by[i][c]) for by in kept.top]
        values = (
            i, c, ways.group_of(bool(top[0]), bool(top[1])), [_short(float(by[i][c])) for by in kept.scores], top,
            [int(s[c]) for s in shifts[i]], patches_of(layer, maps[i], c, pool.shape[2:], 3),
        )  # fmt: skip
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    used = sorted({patch[0] for patches in columns["patches"] for patch in patches})  # type: ignore[attr-defined]
    place = {row: k for k, row in enumerate(used)}
    columns["patches"] = [[[place[p[0]], *p[1:]] for p in patches] for patches in columns["patches"]]  # type: ignore[attr-defined]
    number = {label: k for k, label in enumerate(kept.labels.tolist())}
    return {
        "layers": [[layer.path, layer.count] for layer in flow.layers],
        "neurons": columns,
        "edges": {
            "source": [number[s] for s in kept.edges.source.tolist()],
            "into": [number[s] for s in kept.edges.into.tolist()],
            "influence": [[_short(v) for v in row] for row in kept.weight.T.tolist()],
            "path": kept.paths.T.long().tolist(),
        },
        "images": packed(pool.cpu()[used], *bounds),
    }


def _shift(attacked: Tensor, benign: Tensor) -> Tensor:
    return ways.shifted(attacked, benign, min(MOST, math.ceil(0.25 * len(benign))))


def _short(value: float) -> float:
    return float(f"{value:.4g}")
