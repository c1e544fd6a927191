"""Technique `mkor`: Kronecker-factored preconditioning with inverses kept up to date by rank-one steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.params import param
from cupel.core.protocols import Card, Update
from cupel.core.spread import World

CARD = Card(
    name="mkor",
    family="train",
    source="M. Mozaffari, S. Li, Z. Zhang, M. M. Dehnavi, MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer "
    "Using Rank-1 Updates, NeurIPS 2023, arXiv 2306.01685, algorithm 1",
    tags=("optimizer", "second order", "k-fac"),
    needs=("weights", "gradients"),
    tiny={"every": 2, "warmup": 2},
    neutral={"largest": 0},
)

Layer = nn.Linear | nn.Conv2d
_CLIP = 100.0  # largest entry of a statistic; keeps one wild batch from emptying a factor


def rank_one_inverse(inverse: Tensor, v: Tensor, gamma: float) -> Tensor:
    """(gamma M + (1 - gamma) v v^T)^-1 from M^-1, by Sherman and Morrison.

    The correction is subtracted. It is symmetric, and positive definite whenever M^-1 is, for any v.

    Shapes: inverse `[d, d]` symmetric, v `[d]` -> `[d, d]`.

    >>> rank_one_inverse(torch.eye(1), torch.tensor([3.0]), 0.5)
    tensor([[0.2000]])
    """
    u = inverse @ v
    return (inverse - torch.outer(u, u) * ((1 - gamma) / (gamma + (1 - gamma) * (v @ u)))) / gamma


def stabilised(inverse: Tensor, bound: float, keep: float) -> Tensor:
    """keep * M^-1 + (1 - keep) * I where the largest entry exceeds `bound`; else M^-1 itself. `[d, d]`."""
    if float(inverse.abs().max()) <= bound:
        return inverse
    return keep * inverse + (1 - keep) * torch.eye(len(inverse), device=inverse.device, dtype=inverse.dtype)


def mean_input(module: Layer, x: Tensor) -> Tensor:
    """Mean of a layer's inputs over batch and positions, with a 1 appended where there is a bias: `[d_in (+ 1)]`."""
    x = x.detach().to(module.weight.dtype)  # forwards in half precision leave halves
    if isinstance(module, nn.Conv2d):
        # Averaging over the batch first is the same and leaves one image to unfold.
        pads = module.padding
        assert not isinstance(pads, str)  # `layers_of` leaves those out
        patches = F.unfold(x.mean(0, keepdim=True), module.kernel_size, module.dilation, pads, module.stride)
        a = patches[0].mean(1)  # [C k k, L] -> [C k k]
    else:
        a = x.reshape(-1, x.shape[-1]).mean(0)
    if module.bias is not None:
        a = torch.cat([a, a.new_ones(1)])
    return a.clamp(-_CLIP, _CLIP)


def mean_gradient(grad: Tensor, channels_first: bool) -> Tensor:
    """Mean over the batch of n * dLoss/dOutput, that is its sum; over positions of maps, the mean: `[d_out]`."""
    grad = grad.detach()
    g = grad.sum(0).flatten(1).mean(1) if channels_first else grad.reshape(-1, grad.shape[-1]).sum(0)
    return g.clamp(-_CLIP, _CLIP)


def preconditioned(left: Tensor, grad: Tensor, right: Tensor) -> Tensor:
    """left @ grad @ right at the norm of `grad`. Shapes: `[o, o]`, `[o, i]`, `[i, i]` -> `[o, i]`."""
    made = left @ grad @ right
    return made * (grad.norm() / made.norm().clamp_min(1e-30))


def layers_of(model: nn.Module, largest: int) -> dict[str, Layer]:
    """Linear and ungrouped, zero-padded Conv2d layers whose two factors have at most `largest` rows, by name."""
    found: dict[str, Layer] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        else:
            plain = isinstance(module, nn.Linear)
        if plain and max(sides_of(module)) <= largest:
            found[name] = module
    return found


def sides_of(module: Layer) -> tuple[int, int]:
    """Rows of a layer's two factors: outputs, and inputs with the bias's 1."""
    o, i = module.weight.flatten(1).shape
    return o, i + (module.bias is not None)


@dataclass(frozen=True)
class MKOR:
    r"""Precondition each layer's gradient by inverse Kronecker factors that rank-one steps keep fresh.

    For every layer L^-1 and R^-1 start at the identity. Every `every` steps the mean output gradient g and the mean
    input a (with a 1 for the bias) of the batch give

        M^-1 <- (M^-1 - (1-gamma) M^-1 v v^T M^-1 / (gamma + (1-gamma) v^T M^-1 v)) / gamma,   v = g or a,

    which costs d^2 and would send only d numbers over a network. A factor whose largest entry passes `bound` is mixed
    with the identity. The gradient becomes L^-1 [dW | db] R^-1 at its old norm, so the inner rule keeps its lr.

    Use: where second-order steps pay, on networks with wide layers and few epochs; tune the learning rate anew.

    Costs: two small matrix products a layer and step, and as much memory as two factors of every layer's sides.

    Shapes: Linear weights `[o, i]`, Conv2d weights `[o, c, k, k]`; all other parameters keep their gradients.

    Raises:
        ParamError: a value outside its range.

    Source: Mozaffari, Li, Zhang, Dehnavi, NeurIPS 2023, arXiv 2306.01685, algorithm 1.

    Departs: the printed algorithm adds the rank-one term; that is not an inverse and diverges, so it is subtracted.
    MKOR-H (`hybrid` > 0) judges the loss decrease by its first order, lr <gradient, last move>, because an update rule
    sees no loss; it switches off for good once the running mean falls below `hybrid` times its earlier peak. Statistics
    come from the training-mode forwards of a step; several calls of one layer are averaged. Factors are float32. Where
    processes share a batch, the entries of a mean are cut off at 100 before it is taken over the processes.

    Example:
        >>> MKOR(every=1).gamma
        0.95
    """

    every: int = param(10, "steps between two refreshes of the factors", ge=1)
    warmup: int = param(10, "first steps, in which every step refreshes", ge=0)
    gamma: float = param(0.95, "how much of a factor one refresh keeps", gt=0, lt=1)
    bound: float = param(2.0, "largest entry of an inverse factor before it is mixed with the identity", gt=0)
    keep: float = param(0.9, "share of the factor that stays in such a mix", ge=0, le=1)
    largest: int = param(2048, "most rows of a factor; larger layers keep their plain gradient", ge=0)
    hybrid: float = param(0.0, "MKOR-H: share of the best loss decrease below which it stops; 0: never", ge=0, lt=1)

    def update(self, inner: Update, model: nn.Module, ctx: Context) -> Update:
        return _Preconditioned(self, inner, model, ctx.world)


@dataclass
class _Factors:
    """Inverse factors of one layer, and the statistics of the present step."""

    left: Tensor
    right: Tensor
    inputs: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)


class _Preconditioned:
    def __init__(self, p: MKOR, inner: Update, model: nn.Module, world: World) -> None:
        self.p, self.inner, self.world = p, inner, world
        self.layers = layers_of(model, p.largest)
        self.factors: dict[str, _Factors] = {}
        for name, module in self.layers.items():
            left, right = (torch.eye(d, device=module.weight.device) for d in sides_of(module))
            self.factors[name] = _Factors(left, right)
        self.steps, self.active = 0, True
        self.decrease, self.peak = 0.0, 0.0  # running mean of the loss decrease, and its highest so far

    @contextmanager
    def ahead(self) -> Iterator[None]:
        due = self.active and (self.steps < self.p.warmup or self.steps % self.p.every == 0)
        with self.inner.ahead():
            for held in self.factors.values():
                held.inputs, held.grads = [], []
            handles = [m.register_forward_hook(self._watch(name)) for name, m in self.layers.items()] if due else []
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _watch(self, name: str) -> Callable[[Layer, tuple[Tensor, ...], Tensor], None]:
        held = self.factors[name]

        def seen(module: Layer, args: tuple[Tensor, ...], out: Tensor) -> None:
            # Forwards in evaluation mode belong to hooks (attacks); tensors inside torch.func cannot be kept.
            inside = torch._C._functorch.is_functorch_wrapped_tensor(out)
            if not module.training or not out.requires_grad or inside:
                return
            a = mean_input(module, args[0])

            def arrived(grad: Tensor) -> None:
                held.inputs.append(self.world.weigh(a))
                held.grads.append(mean_gradient(grad.to(a.dtype), isinstance(module, nn.Conv2d)))

            out.register_hook(arrived)

        return seen

    def step(self, grads: Mapping[str, Tensor], lr: float) -> None:
        for held in self.factors.values():
            self._refresh(held)
        if self.active and self.p.hybrid:
            self._judge(grads, lr)
        self.inner.step(self._preconditioned(grads) if self.active else grads, lr)
        self.steps += 1

    def _refresh(self, held: _Factors) -> None:
        if held.inputs:
            sides = self.world.sum((torch.stack(held.grads).mean(0), torch.stack(held.inputs).mean(0)))
            made = [rank_one_inverse(m, v, self.p.gamma) for m, v in zip((held.left, held.right), sides, strict=True)]
            held.left, held.right = (stabilised(m, self.p.bound, self.p.keep) for m in made)
            held.inputs, held.grads = [], []

    def _preconditioned(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = dict(grads)
        for name, module in self.layers.items():
            weight, bias = f"{name}.weight".lstrip("."), f"{name}.bias".lstrip(".")
            if weight not in grads or (module.bias is not None and bias not in grads):
                continue
            parts = [grads[weight].flatten(1)] + ([grads[bias][:, None]] if module.bias is not None else [])
            held = self.factors[name]
            made = preconditioned(held.left, torch.cat(parts, dim=1), held.right)
            width = parts[0].shape[1]
            out[weight] = made[:, :width].reshape(grads[weight].shape)
            if module.bias is not None:
                out[bias] = made[:, width].contiguous()
        return out

    def _judge(self, grads: Mapping[str, Tensor], lr: float) -> None:
        moves = self.inner.direction()
        gain = lr * sum(float((grads[n] * d).sum()) for n, d in moves.items() if n in grads)
        self.decrease = 0.9 * self.decrease + 0.1 * gain
        self.peak = max(self.peak, self.decrease)
        if self.steps >= 5 * self.p.every and self.decrease < self.p.hybrid * self.peak:
            self.active = False

    def direction(self) -> dict[str, Tensor]:
        return self.inner.direction()
