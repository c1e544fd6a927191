"""Technique `dqa`: few-bit activations with extra bits for important channels, kept as a Huffman-coded rest."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.shelf import BITS
from cupel.core.slots import phase
from cupel.core.types import Batch, Task, still
from cupel.ops import huffman
from cupel.ops.quantize import affine, affine_codes, affine_values, pack_codes, unpack_codes, value_range
from cupel.ops.watch import entering

CARD = Card(
    name="dqa",
    family="compress",
    source="W. Hu, P. Henderson, J. Cano, DQA: An Efficient Method for Deep Quantization of Deep Neural Network "
    "Activations, NeurIPS 2024 workshop MLNCP, arXiv 2412.09687",
    tags=("quantization", "activations", "huffman"),
    needs=("weights",),
    writes=("bits",),
    tiny={"bits": 4, "examples": 16, "ranking": "random"},
)


class Grid(nn.Module):
    """Quantises what enters one layer: values in [low, high], `channels` of them along `axis` from the end."""

    one_kernel = True  # what it holds in between is workspace, not an activation (see ops.ledger)
    low: Tensor
    high: Tensor
    important: Tensor  # [C] bool
    lengths: Tensor  # [2^extra] uint8, Huffman code lengths of the rests

    def __init__(self, low: Tensor, high: Tensor, channels: int, bits: int, extra: int, axis: int) -> None:
        super().__init__()
        self.bits, self.extra, self.axis = bits, extra, axis
        self.register_buffer("low", low.clone())
        self.register_buffer("high", high.clone())
        self.register_buffer("important", torch.zeros(channels, dtype=torch.bool, device=low.device))
        self.register_buffer("lengths", torch.full((2**extra,), extra, dtype=torch.uint8, device=low.device))

    def where(self) -> Tensor:
        """`important`, broadcastable against the values."""
        return self.important.view(-1, *[1] * (-self.axis - 1))

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.low.to(x.dtype), self.high.to(x.dtype)
        coarse, fine = (affine(x, low, high, bits) for bits in (self.bits, self.bits + self.extra))
        return torch.where(self.where(), fine, coarse)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of `bits` bits, of `x`'s shape, and the rests of the important channels, `[R]`; int64."""
        coarse, fine = (affine_codes(x, self.low, self.high, b).long() for b in (self.bits, self.bits + self.extra))
        where = self.where().expand_as(x)
        return torch.where(where, fine >> self.extra, coarse), fine[where] & (2**self.extra - 1)

    def join(self, codes: Tensor, rests: Tensor) -> Tensor:
        """The values that codes and rests stand for: only shifts, sums and one product."""
        where = self.where().expand_as(codes)
        fine = codes << self.extra
        fine[where] += rests
        dtype, bits = self.low.dtype, self.bits + self.extra
        plain = affine_values(codes.to(dtype), self.low, self.high, self.bits)
        return torch.where(where, affine_values(fine.to(dtype), self.low, self.high, bits), plain)


def encode(layer: nn.Module, x: Tensor) -> bytes:
    """The bit stream of what enters `layer`: its shape, the codes, the Huffman-coded rests."""
    grid: Grid = layer.grid  # type: ignore[assignment]
    codes, rests = grid.split(x.detach())
    head = struct.pack(f"<B{x.ndim}I", x.ndim, *x.shape)
    return head + pack_codes(codes, grid.bits).numpy().tobytes() + huffman.encode(rests, grid.lengths)


def decode(layer: nn.Module, data: bytes) -> Tensor:
    """The values that `layer` computes with, from the stream of `encode`: equal bit for bit."""
    grid: Grid = layer.grid  # type: ignore[assignment]
    shape = struct.unpack_from(f"<{data[0]}I", data, 1)
    start = 1 + 4 * data[0]
    count = torch.Size(shape).numel()
    middle = start + -(-count * grid.bits // 8)
    packed = torch.frombuffer(bytearray(data[start:middle]), dtype=torch.uint8)
    codes = unpack_codes(packed, grid.bits, count).long().view(shape).to(grid.low.device)
    many = int(grid.where().expand(shape).sum())
    return grid.join(codes, huffman.decode(data[middle:], grid.lengths, many).to(grid.low.device))


class Gridded(nn.Module):
    """A layer whose input passes its grid first; stands before the plain kind among the bases."""

    grid: Grid

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(self.grid(x))
        return out


class GridLinear(Gridded, nn.Linear): ...


class GridConv1d(Gridded, nn.Conv1d): ...


class GridConv2d(Gridded, nn.Conv2d): ...


class GridConv3d(Gridded, nn.Conv3d): ...


# Plain kind -> the same layer with a grid at its entrance, and the axis of the channels there.
KINDS: dict[type[nn.Module], tuple[type[nn.Module], int]] = {
    nn.Linear: (GridLinear, -1),
    nn.Conv1d: (GridConv1d, -2),
    nn.Conv2d: (GridConv2d, -3),
    nn.Conv3d: (GridConv3d, -4),
}


@dataclass(frozen=True)
class DQA:
    r"""Store activations in few bits, with extra bits for the channels that matter most.

    A value x in a layer's range [lo, hi] becomes q = clip(round((x - lo) / s_n), 0, 2^n - 1), s_n = (hi -
    lo) / (2^n - 1). In an important channel it becomes c, the same with n + m bits, stored as h = c >> m in n bits and
    the rest e = c - (h << m), which a Huffman table of the layer codes. The layer computes with q s_n + lo, or with ((h
    << m) + e) s_(n+m) + lo. The effective bits a value, on the shelf for every layer, are n + (share of important
    channels) * (mean code length of e).

    The network computes with these values in float, with straight-through gradients; `encode` and `decode` make the
    real stream. Weights stay as they are.

    Use: for activations of 3 to 5 bits where traffic costs most; a direct quantiser at the same bits is often as good.
    Costs: no training; a ranking pass for each input channel of a layer, minutes for 20,000; decoding at inference.

    Shapes: inputs of linear layers `[..., C]`, of convolutions `[B, C, ...]`.

    Raises:
        PlanError: no layer to quantise, one of a kind unknown here, or no calibration data.

    Source: Hu, Henderson, Cano, 2024, arXiv 2412.09687, section 3 (no code is public: details are reconstructed).

    Departs: channels are ranked with all other layers in float, by the squared error of the outputs unless `ranking`
    says otherwise. Layers not called as modules (inside torch's attention) stay as they are and are not listed.

    Example:
        >>> DQA(bits=3).extra
        3
    """

    bits: int = param(4, "bits of every stored value", ge=1, le=8)
    extra: int = param(3, "further bits of important channels, before coding", ge=1, le=8)
    important: float = param(0.25, "share of a layer's channels that get the extra bits", ge=0, le=1)
    ranking: str = param("output", "what ranks the channels", choices=("output", "loss", "random"))
    examples: int = param(128, "training examples for calibration", ge=1)

    @phase("convert")
    def seal(self, model: nn.Module, ctx: Context) -> nn.Module:
        if ctx.train is None or ctx.task is None:
            raise PlanError("dqa must have data to calibrate on; it has none. Run it in a recipe or with `apply`.")
        batch = next(iter(ctx.train.train.batches(self.examples, ctx.rng("calibration")))).to(ctx.device)
        draw = ctx.rng("channels")
        with still(model), torch.no_grad():
            grids = self._grids(model, batch)
            score = self._score(model, batch, ctx.task)
            for name, grid in grids.items():
                size = len(grid.important)
                many = int(self.important * size + 0.5)
                order = torch.randperm(size, generator=draw)
                if 0 < many < size and self.ranking != "random":
                    order = rank(model.get_submodule(name), grid, score)
                grid.important[order[:many]] = True
            for name, grid in grids.items():
                layer = model.get_submodule(name)
                layer.__class__ = KINDS[type(layer)][0]
                layer.grid = grid
            ctx.shelf.put(BITS, tables(model, grids, batch))
        return model

    def _grids(self, model: nn.Module, batch: Batch) -> dict[str, Grid]:
        """A grid for every layer the model calls, in the order of the first call, with its range."""
        layers: dict[str, nn.Module] = {}
        for kind in KINDS:
            layers |= {name: m for name, m in model.named_modules() if isinstance(m, kind)}
        grids: dict[str, Grid] = {}

        def seen(name: str, x: Tensor) -> None:
            kind = type(layers[name])
            if kind not in KINDS:
                raise PlanError(
                    f"layers for dqa must be plain {', '.join(k.__name__ for k in KINDS)}; {name} is a "
                    f"{kind.__name__}. Apply dqa before the technique that changed it, or leave it out."
                )
            low, high = value_range(x)
            if name in grids:  # a layer called again: one range for both calls
                low, high = torch.minimum(low, grids[name].low), torch.maximum(high, grids[name].high)
            axis = KINDS[kind][1]
            grids[name] = Grid(low, high, x.shape[axis], self.bits, self.extra, axis).eval()

        with entering(layers, seen):
            model(batch.inputs)
        if not grids:
            raise PlanError("a network for dqa must call a linear or convolution layer; it calls none. Leave dqa out.")
        return grids

    def _score(self, model: nn.Module, batch: Batch, task: Task) -> Callable[[], float]:
        """How far the network is from what it should be, lower is better."""
        if self.ranking == "loss":
            return lambda: float(task.loss(model(batch.inputs), batch))
        wanted = model(batch.inputs)
        return lambda: float((model(batch.inputs) - wanted).square().mean())


def rank(layer: nn.Module, grid: Grid, score: Callable[[], float]) -> Tensor:
    """Channels in order of the score when each alone has the extra bits, best first; `[C]` int64."""
    values = []
    with entering({"": layer}, lambda _, x: grid(x)):
        for channel in range(len(grid.important)):
            grid.important.fill_(False)
            grid.important[channel] = True
            values.append(score())
    grid.important.fill_(False)
    return torch.tensor(values).argsort(stable=True)


def tables(model: nn.Module, grids: dict[str, Grid], batch: Batch) -> dict[str, float]:
    """Huffman tables from what the quantised network makes of the calibration data; effective bits by layer."""
    counts = {name: torch.zeros(2**grid.extra, dtype=torch.int64) for name, grid in grids.items()}

    def seen(name: str, x: Tensor) -> None:
        counts[name] += torch.bincount(grids[name].split(x)[1].cpu(), minlength=len(counts[name]))

    with entering(grids, seen):
        model(batch.inputs)
    found = {}
    for name, grid in grids.items():
        # One more of each, so that a rest which calibration never met has a code too.
        grid.lengths.copy_(huffman.code_lengths(counts[name] + 1))
        length = huffman.mean_length(grid.lengths.cpu(), counts[name])
        found[name] = grid.bits + float(grid.important.double().mean()) * length
    return found
