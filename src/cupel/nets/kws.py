"""The seven kinds of network of "Hello Edge" for spotting words in an image of cepstral coefficients."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cupel.nets.ds_cnn import DsCnn
from cupel.nets.mlp import Mlp

# Kind -> size -> the numbers of the paper's networks, in the order in which its authors train them. The first one of
# each is the width, in proportion to which the others follow when another width is asked for.
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "dnn": {"S": (144,), "M": (256,), "L": (436,)},  # units of each of three layers
    "cnn": {"S": (28, 30, 16, 128), "M": (64, 48, 16, 128), "L": (60, 76, 58, 128)},  # filters, filters, units, units
    "basic-lstm": {"S": (118,), "M": (214,), "L": (344,)},  # cells
    "lstm": {"S": (144, 98), "M": (280, 130), "L": (500, 188)},  # cells, projected outputs
    "gru": {"S": (154,), "M": (250,), "L": (400,)},  # cells
    "crnn": {"S": (48, 60, 84), "M": (128, 76, 164), "L": (100, 136, 188)},  # filters, cells of two layers, units
    "ds-cnn": {"S": (64,), "M": (172,), "L": (276,)},  # channels
}
CRNN_STRIDE = {"S": (2, 2), "M": (2, 2), "L": (2, 1)}  # time, coefficients
WIDE_STRIDE = frozenset({("dnn", "S"), ("dnn", "M"), ("dnn", "L"), ("lstm", "S"), ("gru", "S")})  # windows 40 ms apart


class Cell(nn.Module):
    """A recurrent layer whose products are plain linear layers, found by whatever looks for them.

    Shapes: `[B, T, F]` -> `[B, T, outputs]`.
    """

    one_kernel = True  # what it holds in between is workspace, not an activation (see ops.ledger)

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def first(self, x: Tensor) -> tuple[Tensor, ...]:
        """The state before the first frame."""
        raise NotImplementedError

    def step(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """The next state, its first part what the layer puts out."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        state, outs = self.first(x), []
        for t in range(x.shape[1]):
            state = self.step(x[:, t], *state)
            outs.append(state[0])
        return torch.stack(outs, 1)


class Lstm(Cell):
    """Long short-term memory; with `projected` outputs it has peepholes from its cells to its gates, too.

    i, f, g, o = W [x, h] + b (forget gate: + 1); c' = sigmoid(f) c + sigmoid(i) tanh(g); h' = sigmoid(o) tanh(c').
    With peepholes i and f see w * c and o sees w * c'; the outputs are P h' (Sak et al. 2014).
    """

    def __init__(self, features: int, cells: int, projected: int = 0) -> None:
        super().__init__(projected or cells)
        self.cells = cells
        self.gates = nn.Linear(features + self.outputs, 4 * cells)
        self.project = nn.Linear(cells, projected, bias=False) if projected else nn.Identity()
        self.peep = nn.Parameter(torch.zeros(3, cells)) if projected else None

    def first(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.new_zeros(x.shape[0], self.outputs), x.new_zeros(x.shape[0], self.cells)

    def step(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        h, c = state
        i, f, g, o = self.gates(torch.cat((x, h), 1)).chunk(4, 1)
        if self.peep is not None:
            i, f = i + self.peep[0] * c, f + self.peep[1] * c
        c = torch.sigmoid(f + 1.0) * c + torch.sigmoid(i) * torch.tanh(g)
        if self.peep is not None:
            o = o + self.peep[2] * c
        return self.project(torch.sigmoid(o) * torch.tanh(c)), c


class Gru(Cell):
    """Gated recurrent units (Cho 2014): r, z = sigmoid(W [x, h] + b); h' = z h + (1 - z) tanh(V [x, r h] + d)."""

    def __init__(self, features: int, cells: int) -> None:
        super().__init__(cells)
        self.gates = nn.Linear(features + cells, 2 * cells)
        self.candidate = nn.Linear(features + cells, cells)
        nn.init.ones_(self.gates.bias)  # the gates start open: what came first is not forgotten at once

    def first(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x.new_zeros(x.shape[0], self.outputs),)

    def step(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        (h,) = state
        r, z = torch.sigmoid(self.gates(torch.cat((x, h), 1))).chunk(2, 1)
        return (z * h + (1.0 - z) * torch.tanh(self.candidate(torch.cat((x, r * h), 1))),)


class Recurrent(nn.Module):
    """Recurrent layers over the frames of an image; the last output goes to a linear head.

    Shapes: `[B, 1, T, F]` -> logits `[B, classes]`.
    """

    def __init__(self, layers: Sequence[Cell], classes: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(layers[-1].outputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(x[:, 0])[:, -1])
        return logits


class KwsCnn(nn.Module):
    """Two convolutions without padding, a linear layer of few units, a hidden layer, a head.

    Shapes: `[B, 1, T, F]` -> logits `[B, classes]`, T >= 20, F >= 7.
    """

    def __init__(self, numbers: Sequence[int], classes: int, frames: int, coefficients: int) -> None:
        super().__init__()
        first, second, few, hidden = numbers

        def block(fan_in: int, fan_out: int, stride: tuple[int, int]) -> nn.Sequential:
            return nn.Sequential(
                OrderedDict(
                    conv=nn.Conv2d(fan_in, fan_out, (10, 4), stride=stride, bias=False),
                    norm=nn.BatchNorm2d(fan_out),
                    relu=nn.ReLU(),
                )
            )

        self.block1 = block(1, first, (1, 1))
        self.block2 = block(first, second, (2, 1))
        self.flat = nn.Flatten()
        self.few = nn.Linear(second * ((frames - 19) // 2 + 1) * (coefficients - 6), few)
        self.hidden = nn.Sequential(
            OrderedDict(linear=nn.Linear(few, hidden, bias=False), norm=nn.BatchNorm1d(hidden), relu=nn.ReLU())
        )
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.few(self.flat(self.block2(self.block1(x))))
        logits: Tensor = self.head(self.hidden(x))
        return logits


class Crnn(nn.Module):
    """One convolution without padding, two layers of gated recurrent units over its frames, a hidden layer, a head.

    Shapes: `[B, 1, T, F]` -> logits `[B, classes]`, T >= 10, F >= 4.
    """

    def __init__(self, numbers: Sequence[int], classes: int, coefficients: int, stride: tuple[int, int]) -> None:
        super().__init__()
        filters, cells, hidden = numbers
        self.stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, filters, (10, 4), stride=stride), relu=nn.ReLU()))
        features = filters * ((coefficients - 4) // stride[1] + 1)
        self.blocks = nn.Sequential(Gru(features, cells), Gru(cells, cells))
        self.hidden = nn.Sequential(OrderedDict(linear=nn.Linear(cells, hidden), relu=nn.ReLU()))
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).transpose(1, 2).flatten(2)  # [B, T', filters * F']
        logits: Tensor = self.head(self.hidden(self.blocks(x)[:, -1]))
        return logits


def stride_ms(net: str, size: str) -> int:
    """Milliseconds between windows in the paper: 20, or 40 for its fully connected and smallest recurrent networks.

    >>> stride_ms("gru", "S"), stride_ms("gru", "M")
    (40, 20)
    """
    return 40 if (net, size) in WIDE_STRIDE else 20


def kws_net(net: str, size: str, classes: int, frames: int, coefficients: int, width: int = 0) -> nn.Module:
    """A network of `SIZES` for images `[B, 1, frames, coefficients]`; `width` replaces its first number, 0 keeps it.

    Raises:
        KeyError: no such kind or size.
    """
    own = SIZES[net][size]
    numbers = tuple(max(1, round(n * width / own[0])) for n in own) if width else own
    if net == "dnn":
        return Mlp(frames * coefficients, numbers * 3, classes)
    if net == "cnn":
        return KwsCnn(numbers, classes, frames, coefficients)
    if net == "crnn":
        return Crnn(numbers, classes, coefficients, CRNN_STRIDE[size])
    if net == "ds-cnn":
        return DsCnn(classes, size, numbers[0], frames, coefficients)
    kind = Gru if net == "gru" else Lstm
    return Recurrent([kind(coefficients, *numbers)], classes)


def block_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the successive representations of a network of `kws_net`, its head left out."""
    if isinstance(model, Mlp):
        return model.blocks
    names = [name for name, _ in model.named_children() if name not in ("head", "flat", "pool", "few", "blocks")]
    blocks = dict(model.named_children()).get("blocks", nn.Sequential())
    inner = [f"blocks.{name}" for name, _ in blocks.named_children()]
    return tuple(inner + names) if not names or names == ["hidden"] else (names[0], *inner, *names[1:])
