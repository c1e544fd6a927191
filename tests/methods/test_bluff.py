"""bluff: influence by hand, sums that must come out, groups, pathways, resets, and an attack that is really one."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.fit import fit
from cupel.core.scorecard import Readings
from cupel.core.steps import build
from cupel.core.types import Subject
from cupel.nets.resnet import ResNet
from cupel.ops import pathways as ways
from cupel.ops.channel_flow import flow_of, replay
from cupel.ops.feature_images import packed, patches_of
from cupel.probes.robust.bluff import Bluff
from cupel.report.paths import pathways as drawn
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)
PROBE = Bluff(eps=0.3, examples=16, steps=8, draws=2, gallery=20, original=8, target=1)


def everything(flow: ways.Flow) -> Tensor:
    return torch.ones(sum(layer.count for layer in flow.layers), dtype=torch.bool)


def table(edges: ways.Edges) -> dict[tuple[int, int], Tensor]:
    pairs = zip(edges.source.tolist(), edges.into.tolist(), strict=True)
    return {pair: edges.influence[:, k] for k, pair in enumerate(pairs)}


class Forked(nn.Module):
    """A stem, two convolutions (one grouped and strided) that are joined, a padded residual sum, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.left = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2)
        self.right = nn.Conv2d(4, 2, 1, stride=2)
        self.last = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.head = nn.Linear(6 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu_()
        joined = torch.cat([self.left(x), self.right(x)], 1).relu()
        y = self.last(joined)
        y += F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2))
        return self.head(y.relu().flatten(1))


def forked() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Forked().eval(), torch.rand(3, 1, 6, 6)


def slow_convolution(a: np.ndarray, kernel: np.ndarray, stride: int, pad: int) -> float:
    """max over positions of one channel with one kernel slice, in plain loops."""
    a = np.pad(a, pad)
    k = len(kernel)
    rows, columns = ((side - k) // stride + 1 for side in a.shape)
    return max(
        float((a[r * stride : r * stride + k, c * stride : c * stride + k] * kernel).sum())
        for r in range(rows)
        for c in range(columns)
    )


def test_influence_is_that_of_plain_loops() -> None:
    net, x = forked()
    flow = flow_of(net, x[:2])
    assert [layer.path for layer in flow.layers] == ["stem", "left", "right", "last", "head"]
    found = table(ways.influence_of(net, flow, x, everything(flow)))
    with torch.no_grad():
        stem = net.stem(x).relu()
        joined = torch.cat([net.left(stem), net.right(stem)], 1).relu()
        beside = F.pad(stem[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2))
        top = (net.last(joined) + beside).relu()
    wanted = {}
    for n in range(3):
        for j in range(4):  # the grouped layer: output j reads inputs 2 (j // 2) and the next
            for i in range(2):
                source, kernel = 2 * (j // 2) + i, net.left.weight[j, i].detach().numpy()
                wanted[source, 4 + j, n] = slow_convolution(stem[n, source].numpy(), kernel, 2, 1)
        for j in range(2):
            for i in range(4):
                wanted[i, 8 + j, n] = float((stem[n, i, ::2, ::2] * net.right.weight.detach()[j, i, 0, 0]).max())
        for j in range(6):
            for i in range(6):
                wanted[4 + i, 10 + j, n] = slow_convolution(
                    joined[n, i].numpy(), net.last.weight[j, i].detach().numpy(), 1, 1
                )
        for c in range(4):  # the sum, an identity kernel; the padded channels have no source
            wanted[c, 10 + c, n] = float(beside[n, c].max())
        for j in range(3):
            for i in range(6):
                wanted[10 + i, 16 + j, n] = float(
                    (net.head.weight[j, 9 * i : 9 * i + 9].detach() * top[n, i].flatten()).sum()
                )
    for (source, into, n), value in wanted.items():
        assert float(found[source, into][n]) == pytest.approx(value, abs=1e-5), (source, into)
    silent = [pair for pair in found if (*pair, 0) not in wanted]
    assert all(pair[0] < 4 <= pair[1] < 8 and not found[pair].any() for pair in silent)  # other groups drive nothing


def test_what_drives_a_logit_adds_up_to_it() -> None:
    torch.manual_seed(1)
    for net, x in ((ResNet(3, 5, 4, 1).eval(), torch.rand(4, 3, 16, 16)), forked()):
        flow = flow_of(net, x[:2])
        found = table(ways.influence_of(net, flow, x, everything(flow)))
        first = flow.layers[-1].first
        with torch.no_grad():
            logits = net(x)
        for j in range(logits.shape[1]):
            parts = sum(v for (_, into), v in found.items() if into == first + j)
            assert torch.allclose(parts + net.head.bias[j], logits[:, j], atol=1e-4)


def test_a_sum_takes_the_later_layer_and_scores_are_maxima_after_it() -> None:
    torch.manual_seed(2)
    net, x = ResNet(3, 5, 4, 1).eval(), torch.rand(3, 3, 16, 16)
    flow = flow_of(net, x[:2])
    assert len(flow.skips) == 3 and flow.layers[2].path == "stage1.0.conv2"
    seen: dict[str, Tensor] = {}
    handles = [
        m.register_forward_hook(lambda _, a, out, name=name: seen.__setitem__(name, out))
        for name, m in net.named_modules()
    ]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    scores = ways.scores_of(net, flow, x, batch=2)
    for at, name in ((0, "relu"), (2, "stage1"), (4, "stage2"), (6, "stage3")):
        assert torch.allclose(scores[at], seen[name].flatten(2).amax(2)), name
    assert torch.allclose(scores[-1], seen["head"], atol=1e-6)
    with pytest.raises(ValueError, match="same operations"):
        replay(nn.Sequential(net, nn.ReLU()), x, flow, {})


def test_groups_shifts_overlap_and_pathway() -> None:
    assert [ways.group_of(o, t) for o, t in ((True, False), (False, True), (True, True), (False, False))] == list(
        ways.GROUPS
    )
    a, b = torch.tensor([True, True, False, False]), torch.tensor([False, True, True, False])
    assert ways.overlap(a, b) == pytest.approx(1 / 3) and ways.overlap(a, a) == 1 and ways.overlap(a & ~a, b & ~b) == 1
    assert ways.shifted(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0]), 2).tolist() == [0, 0, 0]
    assert ways.shifted(torch.tensor([5.0, 1.0, 2.0]), torch.tensor([1.0, 3.0, 2.0]), 2).tolist() == [1, -1, 0]
    assert ways.strongest(torch.tensor([1.0, 1.0, 1.0]), 2).tolist() == [True, True, False]
    source, into = torch.tensor([0, 1, 0, 1, 2, 3, 0]), torch.tensor([2, 2, 3, 3, 4, 4, 5])
    edges = ways.Edges(source, into, torch.zeros(1, 7))
    weight = torch.tensor([1.0, 2.0, 4.0, 3.0, 5.0, 1.0, 9.0])
    assert ways.pathway(edges, weight, 4, 1).tolist() == [False, True, False, False, True, False, False]
    assert ways.pathway(edges, weight, 4, 2).tolist() == [True, True, True, True, True, True, False]
    assert ways.pathway(edges, -weight, 4, 2).sum() == 0


def test_a_reset_puts_the_benign_means_and_nothing_else() -> None:
    net, x = forked()
    flow = flow_of(net, x[:2])
    moved = (x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    layer, nothing = flow.layers[3], torch.zeros(6, dtype=torch.bool)
    maps = ways.maps_of(net, flow, x)[3]
    with torch.no_grad():
        assert torch.equal(ways.with_reset(net, flow, moved, layer, nothing, maps), net(moved))
        # All channels of the last map: what follows sees the other input, and so answers as it does there.
        assert torch.allclose(ways.with_reset(net, flow, moved, layer, ~nothing, maps, batch=2), net(x), atol=1e-6)
        one = nothing.clone()
        one[2] = True
        change = ways.with_reset(net, flow, moved, layer, one, maps) - net(moved)
        gap = (maps - ways.maps_of(net, flow, moved)[3]).view(3, 6, 9)[:, 2]
        assert torch.allclose(change, gap @ net.head.weight[:, 18:27].T, atol=1e-5)


def test_means_leave_out_the_input_they_are_put_into() -> None:
    net, x = forked()
    flow = flow_of(net, x[:2])
    every = torch.ones(6, dtype=torch.bool)
    two = x[:2]
    with torch.no_grad():
        swapped = net(two.flip(0)).argmax(1)  # of two inputs, the mean of the others is the other one
    cause = ways.cause_of(net, flow, 3, two, two, int(swapped[0]), [every, ~every])
    assert cause.back.tolist() == (swapped == swapped[0]).tolist() == cause.held.tolist() and cause.channels == 6
    with torch.no_grad():
        assert cause.back_random[0].tolist() == (net(two).argmax(1) == swapped[0]).tolist()


def test_patches_hold_the_pixels_that_count() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).eval()
    nn.init.constant_(net[0].weight, 1.0)
    x = torch.zeros(4, 1, 8, 8)
    x[2, 0, 5, 2], x[1, 0, 0, 7] = 2.0, 1.0
    flow = flow_of(net, x[:2])
    maps = ways.maps_of(net, flow, x)[0]
    found = patches_of(flow.layers[0], maps, 0, (8, 8), 2)
    assert [row for row, *_ in found] == [2, 1] and all(side == 3 for *_, side in found)
    assert all(float(x[row, 0, top : top + 3, left : left + 3].max()) > 0 for row, top, left, _ in found)
    assert patches_of(flow.layers[1], ways.maps_of(net, flow, x)[1], 0, (8, 8), 1)[0][1:] == (0, 0, 8)
    assert packed(torch.tensor([[[[0.0, 1.0]]]]), 0.0, 1.0)["bytes"] == ["AP8="]


@lru_cache(maxsize=1)
def trained() -> tuple[Subject, Readings]:
    subject = build(DigitsCnn(width=8), Context())
    model = fit(subject.model, subject.data, subject.task, budget=replace(subject.budget, epochs=3))
    subject = subject.with_model(model)
    return subject, PROBE.measure(subject, Context())


def test_the_graph_on_digits_fits_together() -> None:
    _, found = trained()
    graph = found.figures["pathways"]
    neurons, edges = graph["neurons"], graph["edges"]
    assert graph["pair"] == (8, 1) and graph["strengths"] == [0.1, 0.2, 0.3]
    assert drawn({**graph, "pair": [8, 1]}, {})["kind"] == "pathways"
    for row, (top, group) in enumerate(zip(neurons["top"], neurons["group"], strict=True)):
        assert any(top), row
        assert group == ways.group_of(bool(top[0]), bool(top[1]))
    ends = [(neurons["layer"][a], neurons["layer"][b]) for a, b in zip(edges["source"], edges["into"], strict=True)]
    assert set(ends) == {(0, 1), (1, 2), (2, 3)}
    for c, goal in ((0, 8), (1, 1), (4, 1)):  # every pathway ends at its own logit
        last = {
            neurons["channel"][b]
            for b, p, (_, k) in zip(edges["into"], edges["path"], ends, strict=True)
            if p[c] and k == 3
        }
        assert last == {goal}
    assert found["exploited"].value == neurons["group"].count("attack only") and found["neurons"].value == len(
        neurons["layer"]
    )


def test_the_attack_reaches_its_target_and_its_channels_are_its_cause() -> None:
    subject, found = trained()
    assert found["attack_success"].value > 0.8
    success = found.figures["pathways"]["success"]
    assert success == sorted(success) and success[0] < success[-1]
    assert found["recovered"].value > found["recovered_random"].value and found["reset_loss"].value <= 0.1
    tiny = replace(PROBE, eps=1e-4, levels=1).measure(subject, Context())
    assert tiny["attack_success"].value == 0 and tiny["overlap_original"].value == 1 and tiny["exploited"].value == 0
    auto = replace(PROBE, original=-1, target=-1, levels=1, steps=2).measure(subject, Context())
    out = subject.task.scores(subject.outputs("test"))
    y = subject.data.test.targets
    means = torch.stack([out[y == c].mean(0) for c in range(10)]).fill_diagonal_(0)
    assert auto.figures["pathways"]["pair"] == divmod(int(means.argmax()), 10)


def test_refusals() -> None:
    subject, _ = trained()
    for wrong in ({"original": 1}, {"target": 12}):
        with pytest.raises(NotApplicable, match="two different classes"):
            replace(PROBE, **wrong).measure(subject, Context())
    with pytest.raises(NotApplicable, match="two layers"):
        flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        PROBE.measure(subject.with_model(flat), Context())
