"""The matrix products of a network against torch's own count of operations, and slow counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cupel.nets.vit import ViT
from cupel.ops.accelerator import Device, Estimate, device, total
from cupel.ops.ledger import ledger_of
from cupel.ops.products import Product

torch.set_num_threads(1)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.grouped = nn.Conv1d(16, 32, 3, groups=4, padding=1)
        self.up = nn.ConvTranspose1d(32, 8, 3, stride=2)
        self.depthwise = nn.Conv1d(8, 8, 5, groups=8)
        self.recurrent = nn.LSTM(8, 5, batch_first=True)

    def forward(self, x):
        x = self.attend(x, x, x)[0].transpose(1, 2)
        x = self.depthwise(self.up(self.grouped(x)))
        return self.recurrent(x.transpose(1, 2))[0]


@pytest.mark.parametrize(
    ("net", "x"),
    [(Mixed(), torch.randn(3, 7, 16)), (ViT(1, 8, 10, 2, 8, 1, 2), torch.randn(2, 1, 8, 8))],
)
def test_products_hold_all_multiply_adds(net, x):
    ledger = ledger_of(net.eval(), x)
    multiplying = [op for op in ledger.ops if op.macs]
    assert len(multiplying) >= 6
    assert [op.product.macs for op in multiplying] == [op.macs for op in multiplying]


def test_a_convolution_is_the_product_of_its_unfolded_input():
    conv = nn.Conv2d(6, 8, 3, stride=2, groups=2)
    x = torch.randn(2, 6, 9, 9)
    [(path, found)] = ledger_of(nn.Sequential(conv), x).products()
    unfolded = nn.functional.unfold(x, 3, stride=2)  # [B, in * 9, positions]
    assert path == "0"
    assert found == Product(4, unfolded.shape[1] // 2, 2 * unfolded.shape[2], 2, 9, x.numel(), 2 * 8 * 16, 8 * 3 * 9)
    assert not found.depthwise


def test_only_one_channel_in_is_depthwise():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4))
    [(_, found)] = ledger_of(net, torch.randn(1, 4, 5, 5)).products()
    assert found.depthwise and found.rows == 2 and found.weights == 72


def test_attention_has_no_weights_and_reads_both_factors():
    products = [p for _, p in ledger_of(ViT(1, 8, 10, 2, 8, 1, 2), torch.randn(1, 1, 8, 8)).products()]
    scores = [p for p in products if not p.weights]
    assert [(p.rows, p.depth, p.cols, p.groups) for p in scores] == [(17, 4, 17, 2), (17, 17, 4, 2)]
    assert scores[0].inputs == 2 * 2 * 17 * 4 and scores[0].outputs == 2 * 17 * 17


def test_products_of_a_network_add_up_and_memory_is_the_largest():
    slow = Device("paper", "none", 2.0, {"lanes": 4})
    spent = total(
        [Product(2, 3, 4), Product(1, 5, 2)], lambda p, d: Estimate(p.macs // int(d["lanes"]), 1.5, 7, p.depth), slow
    )
    assert spent == Estimate(6 + 2, 3.0, 14, 5)
    assert spent.seconds(slow) == 4.0


def test_an_unknown_device_is_named():
    with pytest.raises(ValueError, match="device must be one of"):
        device("../devices/sat")
