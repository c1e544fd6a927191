"""`forged-digits`: what its forgeries are made of, and that no split knows another's."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.steps import build
from cupel.data.digits import digits
from cupel.nets.spectral import SpectralMlp, cosines
from cupel.workloads.robust.forged_digits import ForgedDigits, forger, generated, upsampled

torch.set_num_threads(1)


def test_half_of_the_forgeries_are_pixels_of_their_own_split_repeated():
    subject = build(ForgedDigits(width=4, examples=40, epochs=1), Context())
    for part, first in (("train", 1797), ("valid", 1837), ("test", 1877)):
        data, real = getattr(subject.data, part), getattr(digits(0), part).inputs[:40]
        assert data.targets.bincount().tolist() == [40, 40]
        order = data.index.argsort()
        assert torch.equal(data.inputs[order][:40], real) and bool((data.targets[order][:40] == 0).all())
        assert data.index[order][40:].tolist() == list(range(first, first + 40))
        copied = data.inputs[order][60:]  # the second half of the forgeries
        blocks = copied.reshape(20, 4, 2, 4, 2)
        assert torch.equal(blocks, blocks[:, :, :1, :, :1].expand_as(blocks))
        means = real.reshape(40, 4, 2, 4, 2).mean((2, 4))
        near = (means[None] - blocks[:, None, :, 0, :, 0]).abs().amax((2, 3)).amin(1)
        assert float(near.max()) <= 1 / 32 + 1e-6  # rounding alone
        assert not torch.equal(copied, copied[:1].expand_as(copied))
        assert torch.equal((data.inputs * 16).round(), data.inputs * 16)  # no grey step betrays a forgery


def test_the_other_half_is_decoded_from_the_fitted_codes():
    net, means, roots = forger(0, 1)
    real = digits(0).train
    codes = net.encode(real.inputs.flatten(1)[:, None])[:, 0].detach()
    three = codes[real.targets == 3].numpy()
    assert np.allclose(means[3], three.mean(0), atol=1e-5)
    assert np.allclose(roots[3] @ roots[3].T, np.cov(three.T) + 1e-4 * np.eye(8), atol=1e-4)
    many = generated(net, means, 0 * roots, torch.full((3,), 3), torch.Generator())
    assert torch.allclose(many, net.decode(means[3].expand(3, 1, -1)).view(3, 1, 8, 8).detach())
    spread = [generated(net, means, roots, torch.full((50,), 3), torch.Generator().manual_seed(s)) for s in (0, 1)]
    assert not torch.equal(*spread)


def test_the_data_follow_the_data_seed_and_nothing_else():
    a, b = (build(ForgedDigits(width=4, examples=20, epochs=1), Context(seed=s)).data for s in (0, 1))
    other = build(ForgedDigits(width=4, examples=20, epochs=1, data_seed=1), Context()).data
    assert a.fingerprint == b.fingerprint != other.fingerprint


def test_upsampling_and_the_cosine_transform_by_hand():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert upsampled(x)[0, 0, :2, :2].tolist() == [[2.5, 2.5], [2.5, 2.5]]
    from scipy.fft import dctn

    table = cosines(8)
    assert np.allclose(table @ table.T, np.eye(8))
    image = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SpectralMlp((1, 8, 8), (5,), 2).eval()
    waves = torch.from_numpy(dctn(image.numpy(), axes=(2, 3), norm="ortho")).flatten(1)
    assert torch.allclose(net(image), net.body(net.norm(waves)), atol=1e-5)
    assert (
        isinstance(net.norm, nn.BatchNorm1d) and F.mse_loss(waves.square().sum(1), image.square().sum((1, 2, 3))) < 1e-8
    )
