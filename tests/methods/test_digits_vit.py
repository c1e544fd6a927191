"""`digits-vit`: the network against torch's own attention and encoder layer, and its anatomy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import ParamError
from cupel.nets.vit import Attention, Block, ViT
from cupel.workloads.vision.digits_vit import DigitsVit

torch.set_num_threads(1)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def same_attention(ours: Attention, width: int, heads: int) -> nn.MultiheadAttention:
    """Torch's multi-head attention with our weights."""
    theirs = nn.MultiheadAttention(width, heads, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    return theirs


@torch.no_grad()
def test_attention_and_its_map_equal_torchs() -> None:
    ours, x = Attention(12, 3), draw(4, 5, 12)
    maps: list[Tensor] = []
    ours.normalise.register_forward_hook(lambda m, args, out: maps.append(out))
    expected, weights = same_attention(ours, 12, 3)(x, x, x, average_attn_weights=False)
    assert torch.allclose(ours(x), expected, atol=1e-6)
    assert torch.allclose(maps[0], weights, atol=1e-6) and maps[0].shape == (4, 3, 5, 5)
    assert torch.allclose(maps[0].sum(-1), torch.ones(4, 3, 5))


@torch.no_grad()
def test_block_equals_torchs_encoder_layer() -> None:
    ours, x = Block(12, 3), draw(4, 5, 12)
    theirs = nn.TransformerEncoderLayer(12, 3, 24, 0.0, "gelu", batch_first=True, norm_first=True)
    theirs.self_attn = same_attention(ours.attention, 12, 3)
    theirs.norm1, theirs.norm2, theirs.linear1, theirs.linear2 = ours.norm1, ours.norm2, ours.mlp[0], ours.mlp[2]
    assert torch.allclose(ours(x), theirs.train()(x), atol=1e-5)


@torch.no_grad()
def test_only_positions_tell_patches_apart() -> None:
    net, x = ViT(1, 8, 10, 4, 16, 2, 2), draw(3, 1, 8, 8)
    turned = torch.cat([x[..., 4:], x[..., :4]], dim=-1)  # left and right patches swapped
    assert not torch.allclose(net(x), net(turned), atol=1e-4)
    net.place.zero_()
    assert torch.allclose(net(x), net(turned), atol=1e-5)


def test_anatomy_names_modules_in_forward_order() -> None:
    subject = DigitsVit(depth=2, width=8, heads=2, patch=1, examples=20).build(Context())
    ran: list[str] = []
    for name in (*subject.anatomy.blocks, *subject.anatomy.attention, subject.anatomy.head):
        subject.model.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: ran.append(name))
    out = subject.model(subject.data.train.inputs)
    assert ran == ["blocks.0.attention", "blocks.0", "blocks.1.attention", "blocks.1", "head"]
    assert out.shape == (20, 10) and subject.model.place.shape == (1, 65, 8)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ParamError, match="heads"):
        DigitsVit(width=10, heads=4).build(Context())
    with pytest.raises(ParamError, match="patch"):
        DigitsVit(patch=3).build(Context())
