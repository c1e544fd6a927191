"""Every method where its network is: on a GPU if there is one, and on a stand-in for one everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cupel.core.catalogue import Entry
from cupel.core.errors import MissingData
from cupel.testing.device_checks import on_devices, works_on
from cupel.testing.elsewhere import DEVICE, away

ENTRIES = on_devices()


@pytest.mark.parametrize("device", [DEVICE.type, "cuda"])
@pytest.mark.parametrize("entry", ENTRIES, ids=[e.name for e in ENTRIES])
def test_method_works_where_its_network_is(entry: Entry, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{entry.name} was not tried on CUDA: torch finds none here")
    try:
        refusal = works_on(entry, device)
    except MissingData as error:
        pytest.skip(str(error))
    if refusal:
        pytest.xfail(refusal)


def test_the_stand_in_mixes_as_badly_as_a_gpu() -> None:
    draw = torch.Generator()
    with away() as device:
        x = torch.arange(6.0).view(2, 3).to(device)
        assert x.device == device and (x + 1).device == device and x.sum().item() == 15
        assert torch.zeros(2, device=device).device == torch.tensor([1.0], device=device).device == device
        assert torch.equal((x * torch.tensor(2.0)).cpu(), torch.arange(6.0).view(2, 3) * 2)  # 0-dim ones may mix
        assert torch.equal(x[torch.tensor([1])].cpu(), torch.tensor([[3.0, 4.0, 5.0]]))  # so may indices
        assert not torch.zeros(2).to(device).cpu().sum().is_nonzero() and torch.zeros(2).device.type == "cpu"
        for wrong in (
            lambda: x + torch.ones(3),
            lambda: torch.ones(2, 3)[x.long()[0, :2]],
            lambda: x.add_(torch.ones(3)),
            lambda: torch.where(x > 1, x, torch.zeros(2, 3)),
            lambda: torch.cat([x, torch.zeros(1, 3)]),
            lambda: torch.nn.functional.linear(x, torch.zeros(4, 3)),
            lambda: torch.rand(3, generator=draw, device=device),
            lambda: x.uniform_(generator=draw),
        ):
            with pytest.raises(RuntimeError, match=r"same device|generator"):
                wrong()
        for wrong in (lambda: x.numpy(), lambda: np.asarray(x)):
            with pytest.raises(TypeError, match="NumPy"):
                wrong()
        w = torch.ones(3, device=device, requires_grad=True)
        (x @ w).sum().backward()
        assert w.grad is not None and w.grad.device == device
        assert torch.equal(w.grad.cpu(), torch.tensor([3.0, 5.0, 7.0]))
        y = torch.zeros(3, device=device)
        y.copy_(torch.ones(3))
        y[:1].mul_(5)  # a view shares what it shows
        assert y.tolist() == [5.0, 1.0, 1.0]
