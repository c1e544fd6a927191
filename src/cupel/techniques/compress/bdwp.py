"""Technique `bdwp`: train with N:M weights in the forward and in the backward product, under a mask for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from cupel.core.context import Context
from cupel.core.errors import ParamError, PlanError
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.shelf import MASKS
from cupel.core.slots import phase
from cupel.ops.masks import keep_n_of_m, zero_where
from cupel.ops.two_way import run_two_way

CARD = Card(
    name="bdwp",
    family="compress",
    source="C. Fang, W. Sun, A. Zhou, Z. Wang, Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and "
    "Dataflow Co-Design, IEEE TCAD 2023, arXiv 2309.13015; A. Zhou et al., Learning N:M Fine-grained Structured "
    "Sparse Neural Networks From Scratch, ICLR 2021, arXiv 2102.04010 (SR-STE)",
    tags=("pruning", "sparsity", "n:m", "training cost"),
    needs=("weights", "gradients"),
    writes=("masks",),
    tiny={"n": 1, "m": 2},
    neutral={"n": 8, "m": 8},
)


def both_masks(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """The forward mask, `n` of `m` along the inputs, and the backward mask, `n` of `m` along the outputs."""
    return keep_n_of_m(weight, n, m, 1).bool(), keep_n_of_m(weight, n, m, 0).bool()


def sparse_layers(model: nn.Module, m: int) -> dict[str, nn.Module]:
    """Layers that can run on N:M weights both ways, by name.

    They are the linear and convolution layers but the first, whose inputs and outputs, within a group, are multiples
    of `m` and whose weight is trained and is used by them alone.
    """
    users: dict[int, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        users[id(p)] = users.get(id(p), 0) + 1
    plain = tuple(kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    held = {n: module for n, module in model.named_modules() if type(module).forward in plain}
    found = {}
    for name, layer in list(held.items())[1:]:
        w = layer._parameters.get("weight")
        # Attention reads the weight of its last layer without calling the layer.
        if w is None or not w.requires_grad or users[id(w)] > 1 or isinstance(layer, NonDynamicallyQuantizableLinear):
            continue
        if w.shape[1] % m == 0 and len(w) // getattr(layer, "groups", 1) % m == 0:
            found[name] = layer
    return found


@dataclass(frozen=True)
class BDWP:
    r"""Train with weights of which n in every m stay, in the forward and in the backward product alike.

    From one dense master W two masks are made after every update: ff keeps the n largest of every m neighbours along
    the inputs, bp the n largest of every m along the outputs, so that each product sums over groups of m with n
    values. y = x (W o ff)^T; dx = dy (W o bp); dW = dy^T x is dense and goes to W as it is, plus
    `decay` * (1 - ff) o W once an update (SR-STE). The trained network holds W o ff, with its mask on the shelf.
    `backward="exact"` sends gradients through W o ff as well, which is SR-STE: its backward product is dense work.

    Use: to train on hardware with N:M units, where (2n/m + 1)/3 of the multiply-adds are left; for a sparse network
    alone, SR-STE or `pdp` with form nm are as good. Not for layers narrower than m.

    Costs: here every product is computed dense, so training is slower by two masks an update and two masked copies
    of each weight; the trained network is stored in n/m of its values and one bit a weight. `ops.sat` counts what
    N:M units would save.

    Shapes: weights `[out, in, ...]` of linear and convolution layers, channels grouped at each kernel position.

    Raises:
        ParamError: `n` above `m`.
        PlanError: the network has no weight that can be N:M both ways.

    Source: Fang, Sun, Zhou, Wang 2023, arXiv 2309.13015, the bidirectional weight pruning; decay: Zhou et al. 2021,
    arXiv 2102.04010, equation 6.

    Departs: written from the abstract and the description of SR-STE, without the authors' code. The gradient of an
    input, which adversarial training follows, goes through W o bp in every layer too, because the hardware holds
    nothing else: such an attack is weaker than one on the trained network, which is plain and has exact gradients.
    The decay is added to the mean gradient of the update, after clipping of single examples. Masks rank the
    master; a quantizer in the same fit changes what is masked, not the masks. The first layer in the order of the
    modules, the inner projections of torch's attention and weights that layers share stay dense.

    Example:
        >>> BDWP(n=1, m=8).backward
        'sparse'
    """

    n: int = param(2, "weights kept in every group of m", ge=1)
    m: int = param(8, "neighbouring weights in a group", ge=2)
    decay: float = param(2e-4, "pull of the weights masked in the forward towards zero, per unit of lr", ge=0)
    backward: str = param(
        "sparse", "gradients pass through a mask of their own, or the forward's (SR-STE)", choices=("sparse", "exact")
    )

    def hook(self, ctx: Context) -> Hook:
        if self.n > self.m:
            raise ParamError(f"n of bdwp must be at most m, {self.m}; got {self.n}. Keep fewer weights in a group.")
        return _Bidirectional(self, ctx)


class _Bidirectional(Hook):
    def __init__(self, p: BDWP, ctx: Context) -> None:
        self.p, self.ctx = p, ctx
        self.layers: dict[str, nn.Module] = {}
        self.masters: dict[str, nn.Parameter] = {}  # what other techniques swap in is not what is ranked
        self.made: dict[str, tuple[object, Tensor, Tensor]] = {}  # layer -> made for, ff, bp
        self.ran: set[str] = set()

    def start(self, at: Moment) -> None:
        if self.p.n == self.p.m:
            return
        self.layers = sparse_layers(at.model, self.p.m)
        self.masters = {name: layer._parameters["weight"] for name, layer in self.layers.items()}  # type: ignore[misc]
        if not self.layers:
            raise PlanError(
                f"a network for bdwp must have a layer behind its first with a multiple of {self.p.m} inputs and "
                "outputs; it has none. Lower m, or leave bdwp out."
            )

    @phase("mask")
    @contextmanager
    def around_forward(self, at: Moment) -> Iterator[None]:
        fast = torch.backends.mha.get_fastpath_enabled()
        before = {name: layer.__dict__.get("forward") for name, layer in self.layers.items()}
        try:
            # Torch's one call for a whole transformer layer would read the weights past the layers.
            torch.backends.mha.set_fastpath_enabled(fast and not self.layers)
            for name, layer in self.layers.items():
                layer.__dict__["forward"] = self._forward(name, layer, *self.masks(name, at))
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for name, layer in self.layers.items():
                layer.__dict__.pop("forward", None)
                if before[name] is not None:
                    layer.__dict__["forward"] = before[name]

    def _forward(self, name: str, layer: nn.Module, ff: Tensor, bp: Tensor) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            self.ran.add(name)
            return run_two_way(layer, input, ff, bp)

        return forward

    @torch.no_grad()
    def masks(self, name: str, at: Moment) -> tuple[Tensor, Tensor]:
        """Both masks of a layer's master, made once after every update."""
        w = self.masters[name]
        state = (w._version, at.step)
        if name not in self.made or self.made[name][0] != state:
            ff, bp = both_masks(w, self.p.n, self.p.m)
            self.made[name] = (state, ff, bp if self.p.backward == "sparse" else ff)
        return self.made[name][1:]

    @phase("mask")
    def grads(self, grads: dict[str, Tensor], at: Moment) -> dict[str, Tensor]:
        for name in self.ran if self.p.decay else ():
            key, w = f"{name}.weight", self.masters[name].detach()
            if key in grads:
                grads = grads | {key: grads[key] + self.p.decay * w * ~self.masks(name, at)[0]}
        return grads

    @phase("mask")
    def stepped(self, at: Moment) -> None:
        if at.step >= at.steps:
            self._cut(at)

    @torch.no_grad()
    def end(self, at: Moment) -> None:
        self.ctx.shelf.put(MASKS, self._cut(at))

    def _cut(self, at: Moment) -> dict[str, Tensor]:
        """Zero what the forward does not use; a layer whose weight is read past it was never N:M, and stays."""
        kept = {}
        for name in sorted(self.ran):
            w, ff = self.masters[name], self.masks(name, at)[0]
            zero_where(w, ff)
            kept[f"{name}.weight"] = ff.to(w.dtype)
        return kept
