"""Networks made of modules that a generator turns on for a task and a budget, and cuts out of them.

Source: W. Xu et al., Generative Model for Models, 2023, arXiv 2308.15003.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cupel.ops.channels import Structure, axes_of, spread_over
from cupel.ops.cutting import cut_groups
from cupel.ops.ledger import ledger_of
from cupel.ops.swap import swapped


@dataclass(frozen=True)
class Parts:
    """Modules of a network: runs of channel groups that compete in the same block.

    Args:
        module: of every channel group, `[count]`.
        block: of every module, `[G]`.
    """

    module: Tensor
    block: Tensor


def parts_of(structure: Structure, parts: int) -> Parts:
    """Split the channels of every block into `parts` modules of nearly one size, or as many as it has channels."""
    block: list[int] = []
    module = torch.zeros(structure.count, dtype=torch.long)
    for number, members in enumerate(axes_of(structure)):
        for piece in members.tensor_split(min(parts, len(members))):
            module[piece] = len(block)
            block.append(number)
    return Parts(module, torch.tensor(block))


def top_modules(scores: Tensor, block: Tensor, count: int) -> Tensor:
    """The `count` modules of largest score, the best of every block among them in any case: `[G]` -> bool `[G]`."""
    on = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    for b in block.unique().tolist():
        on[torch.where(block == b, scores, -torch.inf).argmax()] = True
    rest = torch.where(on, -torch.inf, scores).topk(max(0, min(count, len(scores)) - int(on.sum()))).indices
    return on.index_fill(0, rest, True)


def straight_through(scores: Tensor, on: Tensor) -> Tensor:
    """Gates of 0 and 1 whose gradient is that of the sigmoid of their scores. `[G]`."""
    soft = torch.sigmoid(scores)
    return on.to(scores) + soft - soft.detach()


def is_held_out(classes: Sequence[int], share: float) -> bool:
    """Whether this set of classes belongs to the `share` of all sets that no training step sees."""
    text = ",".join(map(str, sorted(classes))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "little") < share * 2**48


@dataclass(frozen=True)
class LinearCost:
    """Cost of a set of modules: a constant, and so much for each active module of each block.

    Args:
        weights: of the blocks, `[blocks]`.
        r2: share of the variance among the measured sets that it explains.
    """

    constant: float
    weights: tuple[float, ...]
    r2: float

    def of(self, on: Tensor, block: Tensor) -> float:
        """`[G]` bool, `[G]` -> the cost expected."""
        counts = torch.zeros(len(self.weights)).index_add_(0, block.cpu(), on.float().cpu())
        return self.constant + float(counts @ torch.tensor(self.weights))


def fitted_cost(sets: Sequence[Tensor], costs: Sequence[float], block: Tensor) -> LinearCost:
    """Least squares over measured sets of modules, bool `[G]` each."""
    blocks = int(block.max()) + 1
    x = torch.stack([torch.zeros(blocks).index_add_(0, block.cpu(), s.float().cpu()) for s in sets]).double()
    x, y = torch.cat([torch.ones(len(sets), 1).double(), x], 1), torch.tensor(costs).double()
    w = torch.linalg.lstsq(x, y[:, None], driver="gelsd").solution[:, 0]
    spread = float((y - y.mean()).square().sum())
    r2 = 1 - float((y - x @ w).square().sum()) / spread if spread > 0 else 1.0
    return LinearCost(float(w[0]), tuple(w[1:].tolist()), r2)


class Assembler(nn.Module):
    """Which modules suit a task and a share: `[C]`, share -> scores `[G]`."""

    def __init__(self, classes: int, modules: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(classes + 1, hidden), nn.ReLU(), nn.Linear(hidden, modules))

    def forward(self, task: Tensor, share: float) -> Tensor:
        scores: Tensor = self.net(torch.cat([task, task.new_tensor([share])]))
        return scores - scores.mean()  # only their order counts, and sigmoids far from zero would not learn


class ModularNet(nn.Module):
    """A network of modules with its assembler. Called like any network, it runs whole and knows all classes.

    Args:
        backbone: the whole network.
        structure: its channel groups.
        parts: their modules.
        head: name of its last linear layer, cut to a task's classes; empty if it has none.
        sample: inputs that costs are counted on, `[1, ...]`.

    Shapes: as of the backbone, logits `[B, C]`.
    """

    sample: Tensor

    def __init__(
        self, backbone: nn.Module, assembler: Assembler, structure: Structure, parts: Parts, head: str, sample: Tensor
    ) -> None:
        super().__init__()
        self.backbone, self.assembler = backbone, assembler
        self.structure, self.parts, self.head = structure, parts, head
        self.at_readers = False
        self.macs = LinearCost(0.0, (0.0,) * (int(parts.block.max()) + 1), 0.0)
        self.register_buffer("sample", sample)

    def forward(self, x: Any) -> Tensor:
        out: Tensor = self.backbone(x)
        return out

    def task(self, classes: Sequence[int]) -> Tensor:
        """Ones at the classes, `[C]`."""
        first = self.assembler.net[0]
        assert isinstance(first, nn.Linear)
        return first.weight.new_zeros(first.in_features - 1).index_fill(
            0, torch.tensor(sorted(classes)).to(first.weight.device), 1.0
        )

    def chosen(self, scores: Tensor, share: float) -> Tensor:
        """Modules on at a share of all: `[G]` -> bool `[G]`."""
        return top_modules(scores, self.parts.block, int(share * len(scores) + 1e-6))

    def gated(self, gates: Tensor) -> AbstractContextManager[None]:
        """Inside, the backbone's channels are multiplied by the gates of their modules, `[G]`.

        Where they are read, if `at_readers`: a module that is off then still learns what it would have been good for
        (multiplied where they are made, it lies at the kink of a ReLU). Else where they are made.
        """
        by_group = gates[self.parts.module.to(gates.device)]
        names = dict(self.backbone.named_parameters())
        changes: dict[str, Callable[[Tensor], Tensor]] = {}
        for side in self.structure.sides:
            reads = not side.makes and side.name in names and names[side.name].ndim > 1
            if side.name in names and (reads if self.at_readers else side.makes):
                laid = spread_over(self.structure, by_group, side, names[side.name])
                changes[side.name] = _times(laid, changes.get(side.name))
        return swapped(self.backbone, changes)

    @torch.no_grad()
    def settle(self, x: Any) -> None:
        """Choose where gates act: at the readers, if that computes what cutting does on `x`, for the odd modules."""
        on = top_modules(torch.arange(len(self.parts.block)) % 2 - 0.5, self.parts.block, len(self.parts.block) // 2)
        wanted, self.at_readers = self.sliced(on)(x), True
        with self.gated(on.to(wanted)):
            self.at_readers = torch.allclose(self.backbone(x), wanted, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def sliced(self, on: Tensor, classes: Sequence[int] = ()) -> nn.Module:
        """The backbone with only the modules `on` (bool `[G]`), and only these classes' logits, ascending, if any."""
        net = copy.deepcopy(self.backbone)
        cut_groups(net, self.structure, ~on.cpu()[self.parts.module])
        layer = net.get_submodule(self.head) if self.head and classes else None
        if isinstance(layer, nn.Linear):
            rows = torch.tensor(sorted(classes), device=layer.weight.device)
            layer.weight = nn.Parameter(layer.weight.detach()[rows])
            layer.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach()[rows])
            layer.out_features = len(rows)
        return net.eval()

    def macs_of(self, net: nn.Module) -> int:
        """Multiply-adds of one input, counted while `net` runs."""
        return sum(op.macs for op in ledger_of(net, self.sample).ops)

    def random_sets(self, count: int, draw: torch.Generator) -> list[Tensor]:
        """Sets of modules of many sizes, bool `[G]` each."""
        block = self.parts.block
        shares = torch.rand(count, generator=draw).tolist()
        return [top_modules(torch.rand(len(block), generator=draw), block, round(s * len(block))) for s in shares]

    def fit_cost(self, measure: Callable[[nn.Module], float], count: int, draw: torch.Generator) -> LinearCost:
        """A predictor of what `measure` says of sliced networks (seconds on a device, bytes), from `count` of them."""
        sets = self.random_sets(count, draw)
        return fitted_cost(sets, [measure(self.sliced(s)) for s in sets], self.parts.block)

    @torch.no_grad()
    def query(
        self,
        classes: Sequence[int],
        budget: float,
        score: Callable[[nn.Module], float],
        *,
        cost: LinearCost | None = None,
        measure: Callable[[nn.Module], float] | None = None,
        samples: int = 16,
        finalists: int = 6,
    ) -> tuple[nn.Module, Tensor]:
        """A network for these classes within `budget`, and its modules, bool `[G]`. Nothing is trained.

        Args:
            budget: what `measure` may say of it at most; multiply-adds by default.
            score: of a network for the task on validation data, higher is better.
            cost: predictor of `measure`.
            samples: sets of modules drawn at each of sixteen shares.
            finalists: of those predicted to fit, how many of the largest are scored.

        Raises:
            ValueError: none within the budget was found.
        """
        cost, measure = cost or self.macs, measure or self.macs_of
        task, draw = self.task(classes), torch.Generator().manual_seed(0)
        found: dict[tuple[bool, ...], float] = {}
        for step in range(1, 17):
            scores = self.assembler(task, step / 16)
            for number in range(samples):
                noise = torch.rand(len(scores), generator=draw).clamp(1e-6, 1 - 1e-6).logit().to(scores) * (number > 0)
                on = self.chosen(scores + noise / 2, step / 16)
                found[tuple(on.tolist())] = cost.of(on, self.parts.block)
        ranked = sorted((c, key) for key, c in found.items())
        fits = [key for c, key in ranked if c <= budget][::-1] or [ranked[0][1]]
        best: tuple[float, nn.Module, Tensor] | None = None
        tried = 0
        for key in fits:
            on = torch.tensor(key)
            net = self.sliced(on, classes)
            if measure(net) > budget:  # the prediction was too low
                continue
            value = score(net)
            tried += 1
            if best is None or value > best[0]:
                best = (value, net, on)
            if tried >= finalists:
                break
        if best is None:
            raise ValueError(
                f"budget must be at least what the smallest network takes, about {ranked[0][0]:.4g}; got {budget:.4g}. "
                "Raise it, or take a smaller backbone."
            )
        return best[1], best[2]


def _times(laid: Tensor, before: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    return lambda w: (before(w) if before else w) * laid
