"""Technique `kd-gqa`: attention with fewer heads of keys and values, shared by query heads as the keys' norms say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import ParamError, PlanError
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.slots import phase
from cupel.nets.grouped import GroupedAttention
from cupel.nets.vit import Attention
from cupel.ops.grouped import allotted, at_extremes, first_heads, key_norms, pooled_heads, stretched

CARD = Card(
    name="kd-gqa",
    family="compress",
    source="Z. Khan, M. Khaquan, O. Tafveez, B. Samiwala, A. A. Raza, Beyond Uniform Query Distribution: Key-Driven "
    "Grouped Query Attention, 2024, arXiv 2408.08454, sections 3.1 to 3.4; J. Ainslie et al., GQA, EMNLP 2023, "
    "arXiv 2305.13245 (conversion)",
    tags=("attention", "grouped-query", "kv cache", "transformer"),
    needs=("weights", "blocks", "attention"),
    tiny={"groups": 1, "rule": "keys"},
    neutral={"groups": 0},
    alone="measures the norms of keys over the whole batch",
)


def grouped_modules(model: nn.Module) -> dict[str, GroupedAttention]:
    """Attention modules with shared keys and values, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, GroupedAttention)}


def shared_layer(layer: nn.Module, name: str, heads: int, groups: int, merge: str) -> nn.Linear:
    """A layer of keys or values `[heads * d, in]` with its heads merged to `[groups * d, in]`."""
    if type(layer) is not nn.Linear:
        raise PlanError(
            f"keys and values for kd-gqa must come from plain linear layers; {name} is a {type(layer).__name__}. "
            "Put kd-gqa before the technique that replaced it."
        )
    weight, reduce = layer.weight, pooled_heads if merge == "mean" else first_heads
    made: nn.Linear = nn.utils.skip_init(
        nn.Linear, weight.shape[1], weight.shape[0] // heads * groups, layer.bias is not None,
        device=weight.device, dtype=weight.dtype,
    )  # fmt: skip
    with torch.no_grad():
        made.weight.copy_(reduce(weight, heads, groups))
        if layer.bias is not None:
            made.bias.copy_(reduce(layer.bias, heads, groups))
    made.requires_grad_(weight.requires_grad)
    return made


def tracked(rule: str, norms: Tensor, kept: Tensor) -> Tensor:
    """What query heads are shared out by: |c - n| (difference) or 0.9 n + 0.1 c (average), `[G]` each."""
    return (kept - norms).abs() if rule == "difference" else 0.9 * norms + 0.1 * kept


@dataclass(frozen=True)
class KDGQA:
    r"""Turn multi-head attention into G shared heads of keys and values; norms of keys may say who shares which.

    Conversion: keys and values of each run of H / G heads become their mean; queries and outputs stay. Query heads are
    split in order into groups of sizes a_1 .. a_G that add up to H; group g attends with (k_g, v_g). The rule:

    - even: a_g = H / G (GQA);
    - keys: in every forward of training, n_g = ||k_g||_F scaled to [0, 1] and a = round(H n / sum n), the largest group
      giving and the smallest taking until they add up (KDGQA);
    - difference, average: every `window` updates a = round(H w / sum w) with w = |c - n|, or w = 0.9 n + 0.1 c, where c
      are the norms found last time; groups drawn at random give and take (DGQA);
    - even with `noise` above 0: in training, each head's output loses `noise` times a Gaussian with its own mean and
      standard deviation (PGQA).

    Use: a trained transformer whose cache of keys and values is too large, followed by a few epochs of up-training: put
    it under that `fit`, or `apply` it and then fit. Begin with `even`. The other rules are for large pre-trained
    networks; small ones lose accuracy to them. At inference sizes never change.

    Costs: keys and values take G / H of their bytes in the cache, and their layers of their parameters and operations;
    the products of attention stay as many. Uneven groups run one after the other. Accuracy falls with the conversion.

    Shapes: attention `[B, T, width]`; k and v weights `[width, width]` -> `[G * d, width]`.

    Raises:
        ParamError: G does not divide the heads.
        PlanError: no multi-head attention of cupel.nets.vit in the network, or keys from something else than linear
            layers; `noise` with an uneven rule.

    Source: Khan et al. 2024, arXiv 2408.08454; conversion: Ainslie et al., EMNLP 2023, arXiv 2305.13245.

    Departs: at inference the sizes of the last update in training hold, where the released code finds new ones from
    each test batch; noise acts in training only, and by `noise`, not whole; norms are averaged over a batch, not
    summed, so that a smaller last batch does not look like a change; c is the norms themselves, as the paper says (the
    released code adds them up and divides by the window); norms that do not differ give equal groups.

    Example:
        >>> KDGQA(groups=2, rule="average").window
        300
    """

    groups: int = param(2, "heads of keys and values that stay; must divide the heads; 0: no change", ge=0)
    rule: str = param(
        "even", "how query heads are shared out during a fit", choices=("even", "keys", "difference", "average")
    )
    window: int = param(300, "updates between two allotments (difference, average)", ge=1)
    noise: float = param(0.0, "share of a Gaussian like the output that is taken from each head in training", ge=0)
    merge: str = param("mean", "what becomes of the heads of a group: mean, or first", choices=("mean", "first"))

    def model(self, model: nn.Module, ctx: Context) -> nn.Module:
        if not self.groups:
            return model
        if self.noise and self.rule != "even":
            raise PlanError(f"rule of kd-gqa must be even with noise; got {self.rule}. Drop one of the two.")
        found = {name: m for name, m in model.named_modules() if type(m) is Attention}
        done = grouped_modules(model)
        if not found and not done:
            raise PlanError(
                "a network for kd-gqa must have multi-head attention (cupel.nets.vit); it has none. Use a workload "
                "such as digits-vit, or leave kd-gqa out."
            )
        for name, other in done.items():
            if other.groups != self.groups:
                raise PlanError(
                    f"groups of kd-gqa must be {other.groups} for a network that was converted before; got "
                    f"{self.groups} for {name}. Give the same groups, or convert the multi-head network."
                )
        fresh: dict[int, nn.Module] = {id(m): self._grouped(name, m) for name, m in found.items()}
        # The network handed in stays as it was: the copy takes grouped attention wherever it would copy the whole one.
        return deepcopy(model, fresh) if fresh else model

    def _grouped(self, name: str, whole: Attention) -> GroupedAttention:
        if whole.heads % self.groups:
            raise ParamError(
                f"groups of kd-gqa must divide the {whole.heads} heads of {name}; got {self.groups}. Give a divisor."
            )
        k, v = (
            shared_layer(getattr(whole, part), f"{name}.{part}", whole.heads, self.groups, self.merge) for part in "kv"
        )
        return GroupedAttention(whole, k, v, self.groups)

    def hook(self, ctx: Context) -> Hook:
        return _Steer(self, ctx)

    @phase("bake")
    def seal(self, model: nn.Module, ctx: Context) -> nn.Module:
        found = grouped_modules(model)
        if self.groups and found:
            sizes = "; ".join(f"{name} {', '.join(map(str, m.sizes))}" for name, m in found.items())
            before, after = cache_bytes(model)
            ctx.log(
                kind="note",
                text=f"keys and values take {after} bytes a token, {before} with multi-head attention; query heads a "
                f"group: {sizes}",
            )
        return model


def cache_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of keys and values a token, over all layers: with a head of them for each query head, and as they are."""
    before = after = 0
    for m in grouped_modules(model).values():
        size = m.q.weight.element_size() * 2 * (m.q.weight.shape[0] // m.heads)
        before, after = before + size * m.heads, after + size * m.groups
    return before, after


class _Steer(Hook):
    def __init__(self, p: KDGQA, ctx: Context) -> None:
        self.p, self.draw = p, ctx.rng("settle")
        self.caches: dict[str, Tensor] = {}  # layer -> norms found last time
        self.done: dict[str, int] = {}  # layer -> update of its last allotment

    @phase("observe")
    def around_forward(self, at: Moment) -> AbstractContextManager[None]:
        return self._steering(at)

    @contextmanager
    def _steering(self, at: Moment) -> Iterator[None]:
        found = grouped_modules(at.model) if self.p.groups else {}
        for name, m in found.items():
            m.steer = self._rule(name, m, at)
            m.noise = self.p.noise
        try:
            yield
        finally:
            for m in found.values():
                m.steer, m.noise = None, 0.0

    def _rule(self, name: str, m: GroupedAttention, at: Moment) -> Callable[[Tensor], tuple[int, ...]] | None:
        if self.p.rule == "even":
            return None
        if self.p.rule == "keys":
            return lambda k: allotted(stretched(key_norms(k)), m.heads, at_extremes)
        # Once an update: other forwards of the same update must see the same groups.
        due = at.step % self.p.window == 0 and self.done.get(name) != at.step
        return partial(self._tracked, name, m, at.step) if due else None

    def _tracked(self, name: str, m: GroupedAttention, step: int, k: Tensor) -> tuple[int, ...]:
        """Sizes from the norms now and those kept last time; a layer seen for the first time has kept none."""
        norms = key_norms(k)
        kept = self.caches.get(name, torch.zeros_like(norms))
        self.caches[name], self.done[name] = norms, step
        return allotted(tracked(self.p.rule, norms, kept), m.heads, self._at_random)

    def _at_random(self, sizes: list[int], over: bool) -> int:
        open_ = [g for g, n in enumerate(sizes) if n or not over]
        return open_[int(torch.randint(len(open_), (), generator=self.draw))]
