"""Technique `deep-compression`: prune, let the weights left share few values, and store both as Huffman codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.slots import phase
from cupel.ops import sparse_code
from cupel.ops.kmeans import assigned, cluster_line
from cupel.ops.masks import even_shares, global_shares, keep_largest, layer_ceilings, zero_where

CARD = Card(
    name="deep-compression",
    family="compress",
    source="S. Han, H. Mao, W. J. Dally, Deep Compression: Compressing Deep Neural Networks with Pruning, Trained "
    "Quantization and Huffman Coding, ICLR 2016, arXiv 1510.00149, sections 2 to 4",
    post_training=True,
    tags=("pruning", "quantization", "weight sharing", "huffman", "k-means", "storage"),
    needs=("weights",),
    tiny={"sparsity": 0.5, "bits": 3},
)
MEMBERS = 4  # weights there must be for one shared value: below that the values cost more bytes than they save


class Shared(nn.Module):
    """A layer stored as codes where its weight has few values; stands before the plain kind among the bases."""

    weight: Tensor

    def packed_state(self) -> dict[str, Tensor]:
        held = {k: v.detach() for k, v in {**self._parameters, **self._buffers}.items() if v is not None}
        # What another technique, or further training, has changed since may have any values: stored as it is.
        if sparse_code.codable(held["weight"]):
            data = sparse_code.encode(held["weight"])
            if len(data) < held["weight"].numel() * held["weight"].element_size():
                del held["weight"]
                held["coded"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return held

    @torch.no_grad()
    def load_packed_state(self, state: Mapping[str, Tensor]) -> None:
        left = dict(state)
        if "coded" in left:
            try:
                left["weight"] = sparse_code.decode(left.pop("coded").cpu().numpy().tobytes(), self.weight.shape)
            except ValueError as error:
                raise RuntimeError(str(error)) from None  # which `storage.state` tells with the file's name
        for name, value in left.items():
            getattr(self, name).copy_(value)


class SharedLinear(Shared, nn.Linear): ...


class SharedConv1d(Shared, nn.Conv1d): ...


class SharedConv2d(Shared, nn.Conv2d): ...


class SharedConv3d(Shared, nn.Conv3d): ...


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: SharedLinear,
    nn.Conv1d: SharedConv1d,
    nn.Conv2d: SharedConv2d,
    nn.Conv3d: SharedConv3d,
}


def coded_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear and convolution layers whose weight is a parameter of their own, by name."""
    users: dict[int, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        users[id(p)] = users.get(id(p), 0) + 1
    kinds = (*KINDS, *KINDS.values())
    found = {n: m for n, m in model.named_modules() if type(m) in kinds and isinstance(m.weight, nn.Parameter)}
    return {n: m for n, m in found.items() if users[id(m.weight)] == 1 and m.weight.numel()}


def values_for(weight: Tensor, bits: int) -> int:
    """How many shared values the non-zero entries of `weight` get: 2^bits, or fewer in a layer of few weights."""
    left = int((weight != 0).sum())
    return max(2, min(1 << bits, left // MEMBERS))


def distinct(weight: Tensor) -> int:
    """How many values other than zero there are."""
    held: Tensor = weight.detach()[weight != 0].unique()
    return len(held)


def clusters(weight: Tensor, bits: int) -> Tensor:
    """The cluster of every entry, from 1 on by rising value, and 0 where the weight is zero: int64, of its shape."""
    left = weight.detach()[weight != 0]
    found = torch.zeros(weight.shape, dtype=torch.int64, device=weight.device)
    if len(left):
        found[weight != 0] = 1 + assigned(left, cluster_line(left, values_for(weight, bits)))
    return found


def means(weight: Tensor, which: Tensor) -> Tensor:
    """`weight` with every entry replaced by the mean of its cluster; cluster 0 stays at zero."""
    flat, place = weight.detach().flatten().double(), which.flatten()
    size = int(place.max()) + 1
    total = flat.new_zeros(size).index_add(0, place, flat)
    middle = (total / torch.bincount(place, minlength=size).clamp_min(1)).to(weight.dtype)
    middle[0] = 0.0
    return middle[place].view_as(weight) + 0.0  # a mean of minus zero becomes a plain one


@dataclass(frozen=True)
class DeepCompression:
    r"""Prune the smallest weights, let those left share 2^bits values a layer, and store values and places as codes.

    In a fit: the smallest `sparsity` of all weights become zero at its start and stay so while the others learn. After
    a share `sharing` of the fit the rest of each layer is clustered by k-means from evenly spaced centres, and from
    then on all weights of a cluster move together: after each update w_i <- mean of the w_j of its cluster. With
    `apply`, on a trained network: the same without learning. Stored are each layer's values, and for every weight left
    the Huffman code of its value and of the number of zeros before it; a gap over the table's last goes in steps.

    Use: to make a file small, once a network is final; on top of pruning done by another technique, zeros stay zeros.
    Not to compute faster: in memory the network is dense and of floats.

    Costs: the epochs of the fit, as dear as without it; nothing at inference; at 67% zeros and 6 bits about a tenth
    of the bytes, of which a layer of few weights saves less.

    Shapes: weights `[out, in, ...]` of linear and convolution layers; biases, norms, embeddings and weights that
    several layers share are stored as they are.

    Raises:
        PlanError: no layer to compress.

    Source: Han, Mao, Dally, ICLR 2016, arXiv 1510.00149; the 67% and 6 bits: Iandola et al. 2016, arXiv 1602.07360.

    Departs: one ranking of magnitudes over all layers, or one share for each, in place of thresholds set by hand;
    pruning once, then one fit for both retrainings; a cluster moves by the mean of its weights' updates, where the
    paper takes the sum of gradients, so that the learning rate keeps its meaning under every update rule. A layer has a
    value for at least four weights. A long gap needs no filler weight, and each layer's bits of a gap are those of the
    fewest bytes, where the paper has 8 in convolutions and 5 elsewhere.

    Example:
        >>> DeepCompression(bits=8).sparsity
        0.67
    """

    sparsity: float = param(0.67, "share of weights that become zero, over all layers", ge=0, lt=1)
    bits: int = param(6, "2 to the power of this many shared values in a layer", ge=1, le=8)
    sharing: float = param(0.5, "share of the fit after which values are shared", ge=0, le=1)
    scope: str = param("global", "one ranking over all layers, or one share for each", choices=("global", "layer"))
    head_keep: float = param(0.3, "least share of the last layer's weights that stays", ge=0, le=1)

    def hook(self, ctx: Context) -> Hook:
        return _Compress(self, ctx)

    @phase("bake")  # before what converts layers to kernels of another type
    @torch.no_grad()
    def seal(self, model: nn.Module, ctx: Context) -> nn.Module:
        layers = self.layers_of(model)
        weights: dict[str, Tensor] = {n: m.weight for n, m in layers.items()}  # type: ignore[misc]
        if any(distinct(w) > values_for(w, self.bits) for w in weights.values()):  # no fit has shared them, or not all
            for name, mask in self.masks(weights).items():
                w = weights[name]
                zero_where(w, mask)
                w.copy_(means(w, clusters(w, self.bits)))
        for layer in layers.values():
            layer.__class__ = KINDS.get(type(layer), type(layer))
        left = {n: float((w != 0).double().mean()) for n, w in weights.items()}
        ctx.log(kind="deep-compression", kept=left, values={n: distinct(w) for n, w in weights.items()})
        return model

    def layers_of(self, model: nn.Module) -> dict[str, nn.Module]:
        layers = coded_layers(model)
        if not layers:
            raise PlanError(
                "a network for deep-compression must have a linear or convolution layer of its own; it has none. "
                "Leave deep-compression out."
            )
        return layers

    def masks(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """0/1 masks that keep the largest magnitudes, by the names of the layers."""
        sizes = {name: w.numel() for name, w in weights.items()}
        ceiling = layer_ceilings(sizes, self.head_keep)
        if self.scope == "layer":
            shares = even_shares(sizes, self.sparsity, ceiling)
        else:
            shares = global_shares({n: w.detach().abs() for n, w in weights.items()}, self.sparsity, ceiling)
        return {name: keep_largest(w, 1 - shares[name]) for name, w in weights.items()}


class _Compress(Hook):
    def __init__(self, p: DeepCompression, ctx: Context) -> None:
        self.p, self.ctx = p, ctx
        self.weights: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        self.which: dict[str, Tensor] = {}  # clusters, once values are shared

    @torch.no_grad()
    def start(self, at: Moment) -> None:
        self.weights = {n: m.weight for n, m in self.p.layers_of(at.model).items()}  # type: ignore[misc]
        self.masks = self.p.masks(self.weights)
        self.keep_to_it(at.progress)

    @phase("mask")
    def stepped(self, at: Moment) -> None:
        self.keep_to_it(at.progress)

    @torch.no_grad()
    def end(self, at: Moment) -> None:
        self.keep_to_it(1.0)

    def keep_to_it(self, progress: float) -> None:
        """Zeros where weights are pruned, and one value for each cluster once they are shared."""
        for name, w in self.weights.items():
            zero_where(w, self.masks[name])
            if progress >= self.p.sharing:
                if name not in self.which:
                    self.which[name] = clusters(w, self.p.bits)
                w.copy_(means(w, self.which[name]))
