"""Technique `bivit`: a vision transformer at one bit a weight, its attention binarised with the softmax in mind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.params import param
from cupel.core.protocols import Card, Hook, Moment
from cupel.core.shelf import TEACHER
from cupel.core.slots import phase
from cupel.core.types import Batch, still
from cupel.ops.divergences import soft_target_loss
from cupel.ops.ledger import ledger_of
from cupel.ops.quantize import pack_codes, sign_through, unpack_codes

CARD = Card(
    name="bivit",
    family="compress",
    source="Y. He, Z. Lou, L. Zhang, J. Liu, W. Wu, H. Zhou, B. Zhuang, BiViT: Extremely Compressed Binary Vision "
    "Transformers, ICCV 2023, arXiv 2211.07091",
    tags=("quantization", "binary", "1-bit", "transformer", "attention", "teacher"),
    needs=("weights", "gradients", "classes", "attention"),
    reads=("teacher",),
)
PROJECTIONS = ("q", "k", "v", "out")
XNOR_GAIN = 64  # multiply-adds of signs that one 64-bit word of XNOR and popcount does at once


def kept(attention: Tensor, threshold: float) -> Tensor:
    """1 where an entry is at least `threshold` of the greatest of its row, else 0: `[..., T]` -> `[..., T]`."""
    return (attention >= threshold * attention.amax(-1, keepdim=True)).to(attention.dtype)


def row_scale(attention: Tensor, keep: Tensor) -> Tensor:
    """Mean of the kept entries of a row, the factor of `keep` with least squared error: `[..., T]` -> `[..., 1]`."""
    return (attention * keep).sum(-1, keepdim=True) / keep.sum(-1, keepdim=True)


def softmax_aware(scores: Tensor, threshold: float, scaled: bool = True) -> Tensor:
    """Binary attention of the scores, with the gradient of softmax(scores), as if nothing had been rounded."""
    soft = scores.softmax(-1)
    keep = kept(soft, threshold).detach()
    held = keep * row_scale(soft, keep).detach() if scaled else keep
    return held + (soft - soft.detach())


def centred(weight: Tensor) -> Tensor:
    """W minus the mean of each row; a row of equal entries, which has no other sign than its own, stays."""
    level = weight.amax(1, keepdim=True) == weight.amin(1, keepdim=True)
    return weight - weight.mean(1, keepdim=True).masked_fill(level, 0.0)


class BinaryAttention(nn.Module):
    """Stands in for the softmax of an attention map: `[B, heads, T, T]` scores to binary rows with one scale each."""

    def __init__(self, threshold: float, scale: str, like: Tensor, heads: int) -> None:
        super().__init__()
        self.threshold, self.scaled = threshold, scale != "none"
        gain = nn.Parameter(like.new_ones(heads, 1, 1)) if scale == "learned" else None
        self.register_parameter("gain", gain)

    def forward(self, scores: Tensor) -> Tensor:
        found, gain = softmax_aware(scores, self.threshold, self.scaled), self._parameters["gain"]
        return found if gain is None else found * gain


class SignLinear(nn.Linear):
    """A linear layer of signs with a learned scale for each output, stored in one bit a weight."""

    scale: nn.Parameter  # [out]
    sign_in: bool  # computes with the signs of what enters it
    sign_out: bool  # hands on the signs of what it computes

    def binary(self) -> Tensor:
        """The weights it computes with, `[out, in]`."""
        return self.scale[:, None] * sign_through(centred(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(sign_through(x) if self.sign_in else x, self.binary(), self.bias)
        return sign_through(y) if self.sign_out else y

    def packed_state(self) -> dict[str, Tensor]:
        held = {k: v.detach() for k, v in {**self._parameters, **self._buffers}.items() if v is not None}
        return {"signs": pack_codes(centred(held.pop("weight")) >= 0, 1)} | held

    @torch.no_grad()
    def load_packed_state(self, state: Mapping[str, Tensor]) -> None:
        left = dict(state)
        up = unpack_codes(left.pop("signs"), 1, self.weight.numel()).view(self.weight.shape).to(self.weight.device)
        for name, value in left.items():
            getattr(self, name).copy_(value)
        # Any size has the same signs; this one leaves a later fit as far from flipping them as training began.
        size = torch.where(self.scale == 0, torch.ones_like(self.scale), self.scale.abs())
        self.weight.copy_(size[:, None] * (up.to(self.weight.dtype) * 2 - 1))


def attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with linear layers q, k, v and out, and a softmax that can be replaced (binary already or not)."""
    for name, module in model.named_modules():
        parts: dict[str, nn.Module | None] = module._modules
        linear = all(type(parts.get(p)) in (nn.Linear, SignLinear) for p in PROJECTIONS)
        if linear and isinstance(parts.get("normalise"), (nn.Softmax, BinaryAttention)):
            yield name, module


def mlp_layers(model: nn.Module) -> Iterator[nn.Linear]:
    """Linear layers of the blocks that hold an attention, those of the attention apart."""
    for name, attention in attentions(model):
        inside = {id(m) for m in attention.modules()}
        block = model.get_submodule(name.rpartition(".")[0])
        if block is not model:
            yield from (m for m in block.modules() if type(m) is nn.Linear and id(m) not in inside)


@torch.no_grad()
def binarise(layer: nn.Module, sign_in: bool, sign_out: bool) -> None:
    """Turn a linear layer into one of signs; its own weights go on as the real ones behind the signs."""
    if type(layer) is nn.Linear:
        layer.__class__ = SignLinear
        layer.scale = nn.Parameter(layer.weight.abs().mean(1), layer.weight.requires_grad)
        layer.sign_in, layer.sign_out = sign_in, sign_out  # type: ignore[assignment]


def operations(model: nn.Module, inputs: Any) -> tuple[float, float]:
    """Multiply-adds of one forward, and what they amount to where a product of signs takes a 64th of one."""
    macs = ledger_of(model, inputs).macs()
    binary = {n for n, m in model.named_modules() if isinstance(m, SignLinear) and m.sign_in}
    binary |= {n for n, m in attentions(model) if isinstance(m.normalise, BinaryAttention)}  # q k^T and B v
    return float(sum(macs.values())), sum(m / XNOR_GAIN if n in binary else m for n, m in macs.items())


@dataclass(frozen=True)
class BiViT:
    r"""Make the weights of a vision transformer signs, and its attention binary, in two stages under a teacher.

    A linear layer computes with s_o sign(W - mean_in W), s_o learned for each output. In attention what enters a layer
    and q, k, v are signs too, and the map A = softmax(q k^T / sqrt(d)) becomes alpha B with

        B_ij = 1 where A_ij >= threshold max_j A_ij, else 0;   alpha_i = mean of the kept A_ij.

    Gradients pass a sign where |x| <= 1, and B as if it were A. Stage `attention` does this and leaves the other layers
    of the blocks real; stage `mlp` goes on from there and makes their weights signs, their inputs not; stage `all` is
    both at once. Loss: (1 - weight) CE + weight T^2 KL to the real teacher, from whose weights the first stage starts.
    Patch embedding, head, norms and biases stay real. The real weights behind the signs stay in memory, for a later
    stage; a file holds one bit a weight and the scales, and says the same.

    Use: for a transformer that must fit into little memory, in two fits, `stage: attention` then `stage: mlp`. Not
    where accuracy is worth more than bytes: 1-bit attention costs several points here.

    Costs: in training the teacher's forward in every step; at inference a 64th of the attention's multiply-adds on
    hardware with XNOR and popcount, none less in torch; one bit a weight and a float an output.

    Shapes: any attention with linear layers q, k, v, out and a softmax `normalise` on `[B, heads, T, T]` scores.

    Raises:
        MissingArtefact: no teacher on the shelf, or one made for other data.
        PlanError: no such attention; stage mlp before stage attention; a teacher that is another network.

    Source: He, Lou, Zhang, Liu, Wu, Zhou, Zhuang, ICCV 2023, arXiv 2211.07091; threshold and layers as in the authors'
    published modules.

    Departs: the row scale is the closed form, which those modules leave out (`scale` none; learned adds a factor a
    head). It sets the error of the map, but where the output layer takes signs, as here, it drops out of the forward
    and acts through the gradient alone. A zero counts as +1. Loss weight and schedule are the user's.

    Example:
        >>> BiViT(stage="mlp").threshold
        0.25
    """

    stage: str = param("all", "what becomes binary in this fit", choices=("attention", "mlp", "all"))
    threshold: float = param(0.25, "least kept share of the greatest attention in a row", gt=0, le=1)
    scale: str = param("row", "factor of a binary row of attention", choices=("row", "learned", "none"))
    mlp: str = param("weights", "what becomes signs outside attention: full is inputs too", choices=("weights", "full"))
    start: str = param("teacher", "whose weights the first stage begins with", choices=("teacher", "own"))
    weight: float = param(0.5, "share of the loss that comes from the teacher, the rest from the labels", ge=0, le=1)
    temperature: float = param(1.0, "softens both predictions; 1 leaves them as they are", gt=0)

    def model(self, model: nn.Module, ctx: Context) -> nn.Module:
        found = dict(attentions(model))
        if not found:
            raise PlanError(
                "a network for bivit must have attention with linear layers q, k, v, out and a softmax `normalise`; it "
                "has none. Use digits-vit, or put bivit before techniques that change its attention."
            )
        fresh = not any(isinstance(m, SignLinear) for m in model.modules())
        if self.stage == "mlp" and fresh:
            raise PlanError(
                "stage mlp of bivit must come after stage attention; this network's attention is real. "
                "Put a fit with `bivit: {stage: attention}` before it, or write `stage: all`."
            )
        if fresh and self.start == "teacher":
            _copy(ctx.shelf.get(TEACHER), model)
        others = list(mlp_layers(model)) if self.stage != "attention" else []
        for attention in found.values() if self.stage != "mlp" else ():
            self._attention(attention)
        for layer in others:
            binarise(layer, self.mlp == "full", False)
        return model

    def _attention(self, attention: nn.Module) -> None:
        for part in PROJECTIONS:
            binarise(attention.get_submodule(part), True, part != "out")
        if not isinstance(attention.normalise, BinaryAttention):
            like: Tensor = attention.get_submodule("q").weight.detach()  # type: ignore[operator]
            attention.normalise = BinaryAttention(self.threshold, self.scale, like, int(attention.heads))  # type: ignore

    def hook(self, ctx: Context) -> Hook:
        return _Taught(self, ctx)


@torch.no_grad()
def _copy(teacher: nn.Module, student: nn.Module) -> None:
    """The weights of one network in another of the same architecture."""
    theirs, own = teacher.state_dict(), student.state_dict()
    if theirs.keys() != own.keys() or any(theirs[k].shape != own[k].shape for k in own):
        raise PlanError(
            "the teacher of bivit must be the same network at full precision; its weights have other names or shapes. "
            "Give the teacher this workload, or train the network itself first and write `start: own`."
        )
    for name, value in own.items():
        value.copy_(theirs[name])


class _Taught(Hook):
    def __init__(self, p: BiViT, ctx: Context) -> None:
        self.p = p
        self.teacher = ctx.shelf.get(TEACHER).to(ctx.device) if p.weight else nn.Identity()

    @phase("term")
    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Moment) -> Tensor:
        if self.p.weight == 0:
            return loss
        with still(self.teacher), torch.no_grad():
            target = self.teacher(batch.inputs)
        soft = soft_target_loss(target, out, self.p.temperature)
        # As a difference, so that terms that other techniques added before stay as they are.
        return loss + self.p.weight * (soft - at.task.loss(out, batch))
