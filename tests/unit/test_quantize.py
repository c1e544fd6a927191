"""Quantisation and packing against slow versions and torch's own fake quantisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cupel.ops.quantize import (
    affine,
    affine_codes,
    fixed_point,
    pack_codes,
    power_of_two_fraction,
    round_through,
    sign_through,
    symmetric,
    symmetric_codes,
    unpack_codes,
    value_range,
)

torch.set_num_threads(1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_affine_equals_torch_where_zero_is_a_level(bits: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1000) * 3
    top = 2**bits - 1
    scale, zero = 0.25, top // 2
    low, high = torch.tensor(-zero * scale), torch.tensor((top - zero) * scale)
    wanted = torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, top)
    assert torch.equal(affine(x, low, high, bits), wanted)
    wide = affine_codes(torch.linspace(-50, 50, 5000), low, high, bits)
    assert wide.unique().tolist() == list(range(top + 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_equals_torch(bits: int) -> None:
    torch.manual_seed(1)
    x, top = torch.randn(6, 50), 2 ** (bits - 1) - 1
    limit = x.abs().amax(1, keepdim=True) * 0.7
    wanted = torch.fake_quantize_per_channel_affine(x, (limit / top).flatten(), torch.zeros(6), 0, -top, top)
    assert torch.allclose(symmetric(x, limit, bits), wanted, atol=1e-6)
    assert symmetric(torch.zeros(3), torch.tensor(1.0), bits).eq(0).all()
    assert float(symmetric_codes(x, limit, bits).abs().max()) == top


def test_error_is_at_most_half_a_step_inside_the_range() -> None:
    x = torch.linspace(-1, 2, 5001)
    for bits in range(1, 9):
        step = 3 / (2**bits - 1)
        assert float((affine(x, x.min(), x.max(), bits) - x).abs().max()) <= step / 2 * 1.0001


def test_gradient_is_one_inside_and_zero_outside_also_under_vmap_and_jvp() -> None:
    x = torch.tensor([-0.5, 0.2, 0.7, 1.6], requires_grad=True)
    low, high = torch.tensor(0.0), torch.tensor(1.0)
    affine(x, low, high, 2).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, torch.tensor([0.0, 1.0, 1.0, 0.0]))
    y = torch.tensor([0.1, 0.6, 2.0], requires_grad=True)
    symmetric(y, torch.tensor(1.0), 3).sum().backward()
    assert y.grad is not None and torch.allclose(y.grad, torch.tensor([1.0, 1.0, 0.0]))
    slope = torch.func.grad(lambda r: (round_through(r) * r).sum())
    rows = torch.func.vmap(slope)(torch.tensor([[0.4, 1.6], [2.2, -1.0]]))
    assert torch.allclose(rows, torch.tensor([[0.4, 3.6], [4.2, -2.0]]))
    value, tangent = torch.func.jvp(round_through, (torch.tensor([0.6]),), (torch.tensor([3.0]),))
    assert (float(value), float(tangent)) == (1.0, 3.0)


def test_straight_through_value_is_the_integer_itself() -> None:
    x = torch.rand(10_000) * 1e4  # x + (round(x) - x) would miss it here and there
    assert torch.equal(round_through(x.requires_grad_(True)), x.detach().round())


def test_a_constant_range_gives_the_constant() -> None:
    x = torch.full((4,), 2.5)
    assert torch.equal(affine(x, x.min(), x.max(), 4), x)


def test_value_range_covers_the_middle() -> None:
    x = torch.cat([torch.arange(99.0), torch.tensor([1e9])])[torch.randperm(100)]
    assert [float(v) for v in value_range(x)] == [0.0, 1e9]
    low, high = value_range(x, 0.9)
    assert (float(low), float(high)) == (5.0, 94.0)


@pytest.mark.parametrize("bits", [*range(1, 10), 12, 15, 16, 17, 24, 25, 31, 32])
def test_packing_is_exact_and_as_small_as_can_be(bits: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    for count in (0, 1, 7, 8, 9, 1000):
        codes = torch.randint(0, 2**bits, (count,), generator=draw)
        packed = pack_codes(codes, bits)
        assert packed.dtype == torch.uint8 and len(packed) == -(-count * bits // 8)
        assert torch.equal(unpack_codes(packed, bits, count).long(), codes)
        text = "".join(np.binary_repr(int(c), bits)[::-1] for c in codes)  # lowest bit first
        slow = [int(text[i : i + 8].ljust(8, "0")[::-1], 2) for i in range(0, len(text), 8)]
        assert packed.tolist() == slow


def test_wrong_codes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"codes must be in \[0, 4\); got 0 to 4"):
        pack_codes(torch.tensor([0, 4]), 2)
    with pytest.raises(ValueError, match=r"codes must be in .* got -1"):
        pack_codes(torch.tensor([-1.0]), 2)
    with pytest.raises(ValueError, match="must have 4 bytes; got 3"):
        unpack_codes(pack_codes(torch.zeros(8, dtype=torch.long), 3), 4, 8)


def test_fixed_point_against_integers():
    x = torch.linspace(-9, 9, 401, dtype=torch.float64)
    expected = np.clip(np.round(x.numpy() * 8), -64, 63) / 8
    assert fixed_point(x, word=7, fraction=3).tolist() == expected.tolist()


def test_random_rounding_is_right_on_average_and_stays_on_the_grid():
    x = torch.full((200_000,), 0.3)
    drawn = fixed_point(x, 8, 2, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0.25, 0.5}
    assert float(drawn.mean()) == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("draw", [None, 0])
def test_gradients_of_fixed_point_pass_inside_the_range_only(draw):
    x = torch.tensor([-5.0, 0.3, 5.0], requires_grad=True)
    rng = None if draw is None else torch.Generator().manual_seed(draw)
    fixed_point(x, 4, 2, rng).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 0.0]


def test_signs_pass_gradients_inside_one_only():
    x = torch.tensor([-1.5, -1.0, -0.0, 0.0, 0.2, 1.5], requires_grad=True)
    y = sign_through(x)
    (y * torch.arange(6)).sum().backward()
    assert y.tolist() == [-1, -1, 1, 1, 1, 1]
    assert x.grad.tolist() == [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize(("limit", "bits"), [(0.9, 8), (1.5, 8), (100.0, 8), (0.01, 4), (3.0, 16)])
def test_the_fraction_of_a_power_of_two_range_is_the_largest_that_holds_the_limit(limit, bits):
    fraction = power_of_two_fraction(limit, bits)
    assert limit <= 2.0 ** (bits - 1 - fraction) < 2 * limit
