"""Technique `ppt`: at a few blocks of a vision transformer every image drops or merges tokens, as it needs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import ParamError, PlanError
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.slots import phase
from cupel.core.types import Dataset, still
from cupel.nets.vit import Block
from cupel.ops.tokens import matched, merged, most_dropped, most_significant, picked, significance

CARD = Card(
    name="ppt",
    family="compress",
    source="X. Wu, F. Zeng, X. Wang, X. Chen, PPT: Token Pruning and Pooling for Efficient Vision Transformers, 2023, "
    "arXiv 2310.01812, equations 3 to 8; D. Bolya et al., Token Merging, ICLR 2023, arXiv 2210.09461 (matching)",
    tags=("token pruning", "token merging", "transformer", "dynamic"),
    needs=("weights", "blocks", "attention"),
    tiny={"drop": 4, "places": (0,), "examples": 32},
    neutral={"drop": 0},
)


class ReducedBlock(Block):
    """A transformer block that goes on with fewer tokens after its attention.

    From the first such block on, tokens carry their size (how many patches they stand for) as one more feature; the
    last block of the row takes it away again.

    Args:
        block: whose layers are copied.
        drop: tokens that leave here; 0: none, only the sizes are honoured.
        policy: `adaptive`, `prune` or `pool`.
        proportional: whether attention counts a token as often as its size says.

    Attributes:
        enters, leaves: whether tokens come with sizes, and whether they go with them.
        watched: collects var(S) of every image, while a calibration asks for it.

    Shapes: `[B, T, C or C + 1]` -> `[B, T - drop, C or C + 1]`.
    """

    tau: Tensor
    watched: list[Tensor] | None

    def __init__(self, block: Block, drop: int, policy: str, proportional: bool) -> None:
        nn.Module.__init__(self)
        for name, child in block.named_children():
            self.add_module(name, deepcopy(child))
        like = next(block.parameters())
        self.drop, self.policy, self.proportional = drop, policy, proportional
        self.enters, self.leaves, self.watched = True, True, None
        if drop and policy == "adaptive":
            self.register_buffer("tau", like.new_tensor(math.inf))
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.enters:
            x, sizes = x[..., :-1], x[..., -1:]  # [B, T, C], [B, T, 1]
        else:
            sizes = torch.ones_like(x[..., :1])
        bias = sizes.log()[:, None, None, :, 0] if self.enters and self.proportional else None
        seen: dict[str, Tensor] = {}
        x = x + self.attention(self.norm1(x), bias, seen)
        drop = min(self.drop, most_dropped(x.shape[1]))
        if drop:
            x, sizes = self.reduced(x, sizes, seen, drop)
        x = x + self.mlp(self.norm2(x))
        return torch.cat([x, sizes.to(x.dtype)], -1) if self.leaves else x

    def reduced(self, x: Tensor, sizes: Tensor, seen: dict[str, Tensor], drop: int) -> tuple[Tensor, Tensor]:
        """`[B, T - drop, C]` and the sizes: each image by its own policy, so that none depends on its neighbours."""
        with torch.no_grad():
            scores = None if self.policy == "pool" else significance(seen["map"], seen["values"])
            kept = None if scores is None else most_significant(scores, drop)
            match = None if self.policy == "prune" else matched(seen["keys"], drop)
        pruned = None if kept is None else (picked(x, kept), picked(sizes, kept))
        pooled = None if match is None else merged(x, sizes, match)
        if scores is None or pruned is None or pooled is None:
            return pruned or pooled or (x, sizes)
        spread = scores.var(1)  # [B]
        if self.watched is not None:
            self.watched.append(spread)
        sharp = (spread >= self.tau)[:, None, None]
        return torch.where(sharp, pruned[0], pooled[0]), torch.where(sharp, pruned[1], pooled[1])


def default_places(depth: int) -> tuple[int, ...]:
    """A quarter, a half and three quarters of the way, as in the paper (3, 6, 9 of 12); not the first or last block.

    >>> default_places(12), default_places(3), default_places(2)
    ((3, 6, 9), (1,), (0,))
    """
    return tuple(sorted({max(0, min(max(1, depth * k // 4), depth - 2)) for k in (1, 2, 3)}))


def block_row(model: nn.Module) -> list[Block]:
    """The one row of transformer blocks in `model`.

    Raises:
        PlanError: there is none, or several, or their attention does not tell its map.
    """
    rows = [m for m in model.modules() if isinstance(m, nn.Sequential) and len(m)]
    rows = [m for m in rows if all(isinstance(child, Block) for child in m)]
    if len(rows) != 1:
        raise PlanError(
            f"a network for ppt must have one row of vision transformer blocks (cupel.nets.vit); it has {len(rows)}. "
            "Use a workload such as digits-vit, or leave ppt out."
        )
    found = [child for child in rows[0] if isinstance(child, Block)]
    if any(isinstance(block, ReducedBlock) for block in found):
        raise PlanError("tokens must be reduced by one ppt only; this network has one already. Leave the second out.")
    for i, block in enumerate(found):
        if "seen" not in inspect.signature(type(block.attention).forward).parameters:
            raise PlanError(
                f"attention for ppt must tell its map, keys and values; {type(block.attention).__name__} in block {i} "
                "does not. Put ppt before what replaces the attention, or leave it out."
            )
    return found


@dataclass(frozen=True)
class PPT:
    r"""Let every image lose `drop` tokens at a few blocks: the least important ones, or the most alike.

    Between attention and the block's two-layer network, S_j = (sum_heads A[class, j]) ||v_j||, scaled to sum to one,
    tells how much token j matters. Where var(S) >= tau, attention is concentrated and the image keeps the T - drop
    tokens of largest S. Elsewhere even tokens are matched with odd ones by the cosine of their mean keys, and the
    `drop` most similar pairs become their mean, weighted by size; later attention adds log(size) to its scores. The
    class token always stays. Every image ends with as many tokens, so a batch stays one tensor; tokens are really
    gone, and so are their operations.

    Use: a trained vision transformer with tens of tokens or more, when it shall run faster at once (`apply`) or after a
    short fine-tuning (`fit`). With few tokens there is little to save; where every token is answered for
    (segmentation), it does not fit.

    Costs: nothing to learn; one buffer for tau a place, a pass over `examples` training images; at inference the
    matching of (T/2)^2 d operations a place, against a saving of drop / T of all that follows.

    Shapes: images `[B, ...]` and outputs as before; tokens `[B, T, C]` -> `[B, T - drop, C + 1]` between blocks, the
    last feature being the size.

    Raises:
        PlanError: no row of transformer blocks, or two; a ppt before this one; no training data to find tau on.
        ParamError: a place that is no block.

    Source: Wu, Zeng, Wang, Chen 2023, arXiv 2310.01812, equations 3 to 8; matching: Bolya et al., ICLR 2023.

    Departs: tau is the `quantile` of var(S) over training images and places while all images pool, for the paper's
    7e-5 belongs to 196 tokens and one network; both policies are computed and one is chosen by image, so that the
    network can be exported and an image's outcome never depends on its batch; kept tokens stay in their order. In a
    fit, tau is found before it and once more after it.

    Example:
        >>> PPT(drop=50, places=(3, 6, 9), tau=7e-5).policy
        'adaptive'
    """

    drop: int = param(4, "tokens that leave at each place; where that is over half of those there, half", ge=0)
    places: tuple[int, ...] = param((), "blocks, from 0, where tokens leave (none: at each quarter of the depth)")
    policy: str = param(
        "adaptive", "what happens to tokens: as var(S) says, or one for all", choices=("adaptive", "prune", "pool")
    )
    tau: float | None = param(None, "prune at var(S) >= tau, pool below (None: the quantile on training data)", ge=0)
    quantile: float = param(0.5, "share of decisions that pool, on training data", ge=0, le=1)
    proportional: bool = param(True, "attention counts merged tokens by their size")
    examples: int = param(256, "training examples that tau is found on", ge=1)

    def model(self, model: nn.Module, ctx: Context) -> nn.Module:
        if not self.drop:
            return model
        blocks = block_row(model)
        places = tuple(self.places) or default_places(len(blocks))
        if not set(places) <= set(range(len(blocks))):
            raise ParamError(f"places of ppt must be blocks from 0 to {len(blocks) - 1}; got {places}. Correct them.")
        fresh: dict[int, nn.Module] = {}
        first = min(places)
        for i, block in enumerate(blocks[first:], first):
            reduced = ReducedBlock(block, self.drop if i in places else 0, self.policy, self.proportional)
            reduced.enters, reduced.leaves = i > first, i < len(blocks) - 1
            fresh[id(block)] = reduced
        # The network handed in stays as it was: the copy takes a reduced block wherever it would copy a plain one.
        made = deepcopy(model, dict(fresh))
        self._calibrate(made, ctx)
        return made

    @phase("bake")
    def seal(self, model: nn.Module, ctx: Context) -> nn.Module:
        if self.drop:
            self._calibrate(model, ctx)
        return model

    def _calibrate(self, model: nn.Module, ctx: Context) -> None:
        """Set tau of every place."""
        places = [m for m in model.modules() if isinstance(m, ReducedBlock) and m.drop]
        if self.policy != "adaptive" or not places:
            return
        tau = self.tau
        if tau is None:
            if ctx.train is None:
                raise PlanError("ppt must see training data to find tau; this context has none. Give tau.")
            spread = self._spread(model, places, ctx.train.train, ctx)
            tau = float(torch.quantile(spread, self.quantile)) if self.quantile < 1 else math.inf
        for block in places:
            block.tau.fill_(tau)
        ctx.log(kind="ppt", tau=tau)

    @torch.no_grad()
    def _spread(self, model: nn.Module, places: Sequence[ReducedBlock], data: Dataset, ctx: Context) -> Tensor:
        """var(S) of every training image at every place, `[N]`, while all images pool."""
        found: list[Tensor] = []
        for block in places:
            block.watched = found
            block.tau.fill_(math.inf)
        try:
            with still(model):
                seen = 0
                for batch in data.batches(64, ctx.rng("calibrate")):
                    model(batch.to(ctx.device).inputs[: self.examples - seen])
                    seen += len(batch)
                    if seen >= self.examples:
                        break
        finally:
            for block in places:
                block.watched = None
        return torch.cat(found) if found else torch.zeros(1)  # too few tokens for any to leave
