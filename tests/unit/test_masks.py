"""N:M masks on both axes against a slow loop."""

from __future__ import annotations

import pytest
import torch

from cupel.ops.masks import in_groups, keep_n_of_m, out_of_groups

torch.set_num_threads(1)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(8, 4), (8, 4, 3, 3)])
def test_n_of_m_against_a_loop(shape, dim):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask = keep_n_of_m(weight, 1, 4, dim)
    moved, kept = weight.movedim(dim, -1).abs(), mask.movedim(dim, -1)
    for where in torch.cartesian_prod(*[torch.arange(s) for s in moved.shape[:-1]]).reshape(-1, moved.ndim - 1):
        row, ones = moved[tuple(where)], kept[tuple(where)]
        for start in range(0, len(row), 4):
            wanted = [float(i == row[start : start + 4].argmax()) for i in range(4)]
            assert ones[start : start + 4].tolist() == wanted


def test_groups_come_back():
    weight = torch.randn(8, 4, 3)
    for dim in (0, 1):
        assert torch.equal(out_of_groups(in_groups(weight, 4, dim), weight, dim), weight)


def test_an_axis_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match="axis 1 must be a multiple of 4 entries; it has 6"):
        keep_n_of_m(torch.randn(8, 6), 2, 4)
