"""Groups of channels against torch-pruning's, and cut networks against masked ones, on a dozen architectures."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.nets.vit import ViT
from cupel.ops.channel_shapes import segments
from cupel.ops.channels import Structure, choose, structure_of, totals
from cupel.ops.cutting import NarrowLayerNorm, cut_groups, cut_or_refuse, kept_share, zero_groups, zeroed_groups

torch.set_num_threads(1)


def layer(fan_in: int, fan_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(fan_out), nn.ReLU())


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(layer(3, 8), nn.MaxPool2d(2), layer(8, 16), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(256, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = layer(3, 8), layer(8, 8)
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.down, self.short = layer(8, 16, stride=2), nn.Conv2d(8, 16, 1, 2)
        self.last = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.two(self.one(x)) + x)
        x = F.relu(self.last(self.down(x)) + self.short(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        widths = (8, 12, 16)
        self.steps = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, 4, 3, padding=1)) for w in widths
        )
        self.norm, self.head = nn.BatchNorm2d(20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for step in self.steps:
            x = torch.cat([x, step(x)], 1)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class ConvNext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.scale = nn.Parameter(torch.rand(8))
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        x = x + y.permute(0, 3, 1, 2)
        return self.head(self.last(x.mean([-2, -1])))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.up = layer(3, 8), layer(8, 16), nn.ConvTranspose2d(16, 8, 2, 2)
        self.join, self.out = layer(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.one(x)
        return self.out(self.join(torch.cat([self.up(self.two(F.max_pool2d(a, 2))), a], 1)))


class Squeezed(nn.Module):
    """Inverted residual with squeeze and excitation: products with what is not zero at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.depthwise = layer(3, 8), layer(8, 16, 1), layer(16, 16, groups=16)
        self.less, self.more = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project = nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(self.wide(x))
        y = y * torch.sigmoid(self.more(F.relu(self.less(F.adaptive_avg_pool2d(y, 1)))))
        return self.head((x + self.project(y)).mean((2, 3)))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.twice(F.relu(self.twice(x)))).mean((2, 3)))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = layer(3, 8), layer(8, 12, groups=4), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.stem(x)).mean((2, 3)))


class Fused(nn.Module):
    """Attention with one layer for queries, keys and values, on an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.num_heads = nn.Embedding(20, 16), nn.LayerNorm(16), 4
        self.qkv, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words((x.mean((1, 2)) * 10).long().abs() % 20)
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)
        return self.head((x + self.out(y)).mean(1))


class Encoder(nn.Module):
    """Torch's own encoder layer: its attention checks its sizes, its two-layer part can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)
        self.layer, self.head = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.up(x[:, 0])).mean(1))


class Halves(nn.Module):
    """One layer whose outputs are parted in two, each read by a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.left, self.right = nn.Conv2d(3, 12, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.relu(self.both(x)).chunk(2, 1)
        return (self.left(a) + self.right(b)).mean((2, 3))


def vit() -> ViT:
    return ViT(3, 16, 5, 4, 16, 2, 4)


KINDS = {
    k.__name__: k
    for k in (VGG, Residual, Dense, ConvNext, UNet, Squeezed, Shared, Grouped, Fused, Encoder, Halves, vit)
}  # fmt: skip
PEERS = ("VGG", "Residual", "Dense", "ConvNext", "UNet", "Squeezed", "Shared", "Encoder")


def made(name: str) -> nn.Module:
    """A network whose norms are not at their start, so that no channel is zero by chance."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = KINDS[name]().eval()
        for m in net.modules():
            if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm)):
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
    return net


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("name", KINDS)
def test_a_cut_network_computes_what_the_masked_one_does(name: str, share: float) -> None:
    net, x = made(name), images()
    structure = structure_of(net, x[:2])
    draw = torch.rand(structure.count, generator=torch.Generator().manual_seed(1))
    gone = choose(structure, draw, round(share * structure.count))
    assert int(gone.sum()) >= 1
    masked, cut = copy.deepcopy(net), copy.deepcopy(net)
    zero_groups(masked, structure, gone)
    assert torch.equal(zeroed_groups(masked, structure), gone)
    cut_groups(cut, structure, gone)
    with torch.no_grad():
        torch.testing.assert_close(cut(x), masked(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(masked(x), net(x), atol=1e-3)
    left = sum(p.numel() for p in cut.parameters()) / sum(p.numel() for p in net.parameters())
    assert left == pytest.approx(kept_share(structure, gone, {n: p.shape for n, p in net.named_parameters()}))
    assert left < 1 - share / 3
    # What was cut can be traced and cut again, norms of a narrower axis included.
    again = structure_of(cut, x[:2])
    assert again.count > structure.count - int(gone.sum()) - 6  # a last channel of an axis is no group
    cut_or_refuse(cut, x, again, choose(again, torch.arange(again.count).float(), again.count // 2), tolerance=1e-5)


def entries(structure: Structure) -> list[set[tuple[str, str, int]]]:
    found: list[set[tuple[str, str, int]]] = [set() for _ in range(structure.count)]
    for side in structure.sides:
        path, _, leaf = side.name.rpartition(".")
        for i, g in enumerate(side.groups.tolist()):
            if g >= 0 and leaf == "weight":
                found[g].add((path, "made" if side.makes else "read", i))
    return found


@pytest.mark.parametrize("name", PEERS)
def test_groups_are_those_of_torch_pruning(name: str) -> None:
    tp = pytest.importorskip("torch_pruning")
    net = made(name)
    ours = entries(structure_of(net, images(2)))
    peer = tp.DependencyGraph().build_dependency(net, images(2), verbose=False)
    names = {module: path for path, module in net.named_modules()}

    def plain(found: set[tuple[str, str, int]]) -> set[tuple[str, str, int]]:
        """Layers with one axis of channels make and read it at once."""
        kinds = (nn.BatchNorm2d, nn.LayerNorm)
        one = {p for p, m in net.named_modules() if isinstance(m, kinds) or getattr(m, "groups", 1) > 1}
        return {(p, "both" if p in one else role, i) for p, role, i in found if p}

    compared = 0
    for path, module in net.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)) or getattr(module, "groups", 1) > 1:
            continue
        prune = tp.prune_conv_out_channels if isinstance(module, nn.Conv2d) else tp.prune_linear_out_channels
        for channel in range(len(module.weight)):
            mine = [g for g in ours if (path, "made", channel) in g]
            if not mine:
                continue
            theirs = {
                (names[dep.target.module], "made" if peer.is_out_channel_pruning_fn(dep.handler) else "read", int(i))
                for dep, indices in peer.get_pruning_group(module, prune, idxs=[channel])
                for i in indices
                if dep.target.module in names
            }
            assert plain(mine[0]) == plain(theirs), (path, channel)
            compared += 1
    assert compared >= 16


def test_a_whole_head_is_one_group() -> None:
    net = made("Fused")
    heads = [g for g in entries(structure_of(net, images(2))) if ("qkv", "made", 0) in g]
    rows = {16 * part + i for part in range(3) for i in range(4)}
    wanted = {("qkv", "made", i) for i in rows} | {("out", "read", i) for i in range(4)}
    assert heads == [wanted]


def test_what_cannot_go_stays() -> None:
    sides = {(s.name, s.dim) for s in structure_of(made("Encoder"), images(2)).sides}
    assert sides == {
        ("layer.linear1.weight", 0), ("layer.linear1.bias", 0), ("layer.linear2.weight", 1)
    }  # fmt: skip
    vgg = {(s.name, s.dim) for s in structure_of(made("VGG"), images(2)).sides}
    assert ("features.0.0.weight", 1) not in vgg and ("head.4.weight", 0) not in vgg  # inputs and outputs


def test_channels_that_are_not_zero_at_zero_stay() -> None:
    """A sigmoid makes one half of a zero channel; a layer reads it, so it may not be cut."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    names = {s.name for s in structure_of(net, images(2)).sides}
    assert names == {"2.weight", "2.bias", "4.weight"}


@pytest.mark.parametrize("places", [False, True])
def test_a_pool_that_also_says_where_keeps_its_channels(places: bool) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y, at = nn.functional.adaptive_max_pool2d(self.a(x).relu(), 1, return_indices=True)
            return self.b(y.flatten(1) + at.flatten(1) if places else y.flatten(1))

    assert structure_of(Pooled().eval(), images(2)).count == 0


def test_an_unknown_operation_keeps_its_channels() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cumsum(self.a(x), -1))

    assert structure_of(Odd(), torch.randn(2, 4)).count == 0


def test_a_plain_number_in_the_forward_is_refused() -> None:
    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 256, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)).reshape(-1, 1024))

    net = Numbered().eval()
    structure = structure_of(net, images(2))
    before = {n: p.clone() for n, p in net.named_parameters()}
    with pytest.raises(ValueError, match="must run after channels are cut"):
        cut_or_refuse(net, images(2), structure, torch.tensor([True, False, False, False]))
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_a_forward_that_depends_on_the_number_of_channels_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            return self.b(x / x.shape[1])

    net, x = Scaled().eval(), torch.randn(2, 4)
    structure = structure_of(net, x)
    gone = torch.arange(structure.count) < 3
    with pytest.raises(ValueError, match="must compute the same after zero channels are cut; this one differs by"):
        cut_or_refuse(net, x, structure, gone)
    assert net.a.out_features == 6


def test_a_narrow_norm_divides_by_the_whole_width() -> None:
    norm, x = nn.LayerNorm(6), torch.randn(5, 6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x[:, 4:] = 0
    narrow = NarrowLayerNorm(nn.Parameter(norm.weight[:4]), nn.Parameter(norm.bias[:4]), norm.eps, 6)
    torch.testing.assert_close(narrow(x[:, :4]), norm(x)[:, :4])


def test_every_axis_keeps_an_entry_and_sums_are_by_group() -> None:
    net = made("VGG")
    structure = structure_of(net, images(2))
    gone = choose(structure, torch.arange(structure.count).float(), structure.count)
    cut_groups(net, structure, gone)
    assert net.features[0][0].weight.shape[0] == net.features[2][0].weight.shape[0] == 1
    with torch.no_grad():
        assert net(images()).shape == (4, 5)
    net = made("VGG")
    ones = totals(structure, {n: torch.ones_like(p) for n, p in net.named_parameters()})
    assert ones[:8].tolist() == [3 * 9 + 2] * 8  # a kernel of the first layer, its norm's scale and shift


def test_segments_of_shapes() -> None:
    assert segments((4, 16, 4, 4), (4, 256)) == [([0], [0]), ([1, 2, 3], [1])]
    assert segments((3, 2, 16), (3, 8, 4)) == [([0], [0]), ([1, 2], [1, 2])]
