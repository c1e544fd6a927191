"""`cifar10-resnet20`: the paper's network counted, its shortcut in a limit case, the data's known statistics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.errors import MissingData
from cupel.data.cifar import cifar10
from cupel.nets.resnet import Residual, ResNet
from cupel.workloads.vision.cifar10_resnet20 import Cifar10Resnet20

torch.set_num_threads(1)


def test_twenty_layers_and_the_papers_size() -> None:
    net = ResNet(3, 10, 16, 3)
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in net.modules()) == 20
    # He et al. 2016, table 6: 0.27M. By hand: 9 c_in c_out a convolution, 2 c a norm, 650 for the head.
    convs = 9 * (3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64)
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    assert sum(p.numel() for p in net.parameters()) == convs + norms + 650 == 269722


@torch.no_grad()
def test_a_block_without_weights_is_its_shortcut() -> None:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain, grown = Residual(4, 4, 1).eval(), Residual(4, 6, 2).eval()
    for block in (plain, grown):
        block.conv2.weight.zero_()
    assert torch.equal(plain(x), x.relu())
    subsampled = F.avg_pool2d(x, 1, stride=2).relu()
    assert torch.equal(grown(x), torch.cat([subsampled, torch.zeros(2, 2, 4, 4)], 1))


@torch.no_grad()
def test_a_block_adds_two_normalised_convolutions() -> None:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    block = Residual(4, 4, 1).train()
    first = F.batch_norm(F.conv2d(x, block.conv1.weight, padding=1), None, None, training=True).relu()
    second = F.batch_norm(F.conv2d(first, block.conv2.weight, padding=1), None, None, training=True)
    assert torch.allclose(block(x), (x + second).relu(), atol=1e-6)


def test_stages_shrink_and_start_at_he_variance() -> None:
    torch.manual_seed(0)
    net, sizes = ResNet(3, 10, 16, 3), []
    for name in ("stage1", "stage2", "stage3"):
        net.get_submodule(name).register_forward_hook(lambda m, a, out: sizes.append(tuple(out.shape[1:])))
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert float(net.stage3[0].conv1.weight.detach().std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)


def test_absent_data_say_where_to_put_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUPEL_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MissingData, match="cifar10_train_1000pc"):
        Cifar10Resnet20().build(Context())


def test_the_real_subset() -> None:
    try:
        splits = cifar10(train=2000, valid=1000, data_seed=0)
    except MissingData as reason:
        pytest.skip(str(reason))
    for part, count in ((splits.train, 200), (splits.valid, 100), (splits.test, 200)):
        assert part.targets.bincount().tolist() == [count] * 10
        assert part.inputs.shape[1:] == (3, 32, 32) and 0 <= float(part.inputs.min()) < float(part.inputs.max()) <= 1
        # 0.4914, 0.4822, 0.4465: the training set's channel means in general use; a subset and JPEG move them little.
        assert torch.allclose(part.inputs.mean((0, 2, 3)), torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.02)
    index = torch.cat([p.index for p in (splits.train, splits.valid, splits.test)])
    assert len(index.unique()) == len(index) and int(splits.train.index.max()) < 50_000 <= int(splits.test.index.min())
    subject = Cifar10Resnet20(width=2, train_examples=100, examples=64).build(Context())
    ran: list[str] = []
    for name in subject.anatomy.blocks:
        subject.model.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: ran.append(name))
    assert subject.model(subject.data.train.inputs).shape == (64, 10) and tuple(ran) == subject.anatomy.blocks
