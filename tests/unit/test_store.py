"""The store: exact round trips, the smallest form, and files that are not whole."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import CupelError
from cupel.core.steps import build
from cupel.nets.convnet import ConvNet
from cupel.ops.quantize import pack_codes, unpack_codes
from cupel.storage.state import load_into, load_state, save_model, size_of
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def net(seed: int = 0) -> ConvNet:
    torch.manual_seed(seed)
    return ConvNet(1, 10, 8)


@torch.no_grad()
def pruned(share: float) -> ConvNet:
    model = net()
    for p in model.parameters():
        if p.ndim > 1:
            p.masked_fill_(torch.rand_like(p) < share, 0.0)
    return model


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_round_trip_is_exact(tmp_path: Path, share: float) -> None:
    model = pruned(share)
    written = save_model(model, tmp_path / "m.safetensors")
    assert written == (tmp_path / "m.safetensors").stat().st_size == size_of(model)
    state = load_state(tmp_path / "m.safetensors")
    assert sorted(state) == sorted(model.state_dict())
    assert all(same_bits(value, state[name]) for name, value in model.state_dict().items())
    fresh = load_into(net(1), tmp_path / "m.safetensors").eval()
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(fresh(x), model.eval()(x))


def test_odd_values_and_types_survive(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sparse = torch.zeros(200, 7)
            sparse[3] = torch.tensor([-0.0, float("nan"), float("inf"), -float("inf"), 1e-45, 0.0, 3.0])
            self.register_buffer("sparse", sparse)
            self.register_buffer("flags", torch.arange(5000) % 900 == 0)
            self.register_buffer("half_", sparse.half())
            self.register_buffer("brain", sparse.bfloat16())
            self.register_buffer("long", (torch.arange(4000) == 7).long().view(40, 100).t())
            self.register_buffer("wave", torch.complex(sparse, sparse))
            self.register_buffer("point", torch.tensor(2.5))
            self.register_buffer("empty", torch.zeros(0, 3))

    model = Odd()
    save_model(model, tmp_path / "m")
    state = load_state(tmp_path / "m")
    for name, value in model.state_dict().items():
        assert same_bits(value, state[name]), name
    assert size_of(model) < 0.25 * sum(b.numel() * b.element_size() for b in model.buffers())


def test_zeros_shrink_the_file_as_counted() -> None:
    weights = sum(p.numel() for p in net().parameters() if p.ndim > 1)
    dense, sparse = size_of(pruned(0.0)), size_of(pruned(0.9))
    kept = sum(int((p != 0).sum()) for p in pruned(0.9).parameters() if p.ndim > 1)
    expected = dense - 4 * weights + 4 * kept + weights / 8
    assert abs(sparse - expected) < 4 * 300  # four tensors' lines in the header
    assert size_of(pruned(0.01)) <= dense + 8  # a few zeros: dense stays the smaller form


def test_minus_zeros_cost_one_bit_and_survive(tmp_path: Path) -> None:
    with torch.no_grad():
        model = nn.Linear(64, 64, bias=False)
        model.weight.mul_(torch.rand(64, 64) < 0.1)  # half of the zeros are minus zeros
    kept = int((model.weight != 0).sum())
    assert int(torch.signbit(model.weight).sum()) > 1000
    assert size_of(model) <= 4 * kept + 4096 / 8 + (4096 - kept) / 8 + 500
    save_model(model, tmp_path / "m")
    assert same_bits(load_state(tmp_path / "m")["weight"], model.weight.detach())


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    apart = size_of(model)
    model[1].weight = model[0].weight
    assert size_of(model) < apart - 4 * 40 * 40 + 100
    save_model(model, tmp_path / "m")
    assert same_bits(load_state(tmp_path / "m")["1.weight"], model[0].weight.detach())


class Ternary(nn.Module):
    """Weights in {-1, 0, 1}, two bits each on disk."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(torch.randint(-1, 2, (30, 31)).float())
        self.head = nn.Linear(30, 2)

    def packed_state(self) -> dict[str, Tensor]:
        return {"codes": pack_codes(self.weight.detach() + 1, 2)}

    @torch.no_grad()
    def load_packed_state(self, state: dict[str, Tensor]) -> None:
        self.weight.copy_(unpack_codes(state["codes"], 2, 930).view(30, 31).float() - 1)


@pytest.mark.parametrize("inside", [False, True])
def test_packed_state_replaces_the_modules_own(tmp_path: Path, inside: bool) -> None:
    def make(seed: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 30), Ternary(seed)) if inside else Ternary(seed)

    model = make(0)
    save_model(model, tmp_path / "m")
    assert size_of(model) < 233 + 1500  # 930 codes of two bits, the small layers, the header
    fresh = load_into(make(1), tmp_path / "m")
    assert all(same_bits(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))
    assert "weight" not in load_state(tmp_path / "m")


def quantized(seed: int) -> nn.Module:
    from torch.ao.quantization import DeQuantStub, QuantStub, convert, get_default_qconfig, prepare

    torch.manual_seed(seed)
    model = nn.Sequential(QuantStub(), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5), DeQuantStub())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.qconfig = get_default_qconfig(torch.backends.quantized.engine)  # type: ignore[assignment]
        ready = prepare(model.eval())
        ready(torch.rand(4, 1, 8, 8))
        return convert(ready)


def test_torch_quantized_modules_store_their_integers(tmp_path: Path) -> None:
    model, other = quantized(0), quantized(1)
    x = torch.rand(3, 1, 8, 8)
    assert not torch.equal(model(x), other(x))
    written = save_model(model, tmp_path / "m")
    assert 8 * 9 + 288 * 5 < written < 8 * 9 + 288 * 5 + 3000
    assert torch.equal(load_into(copy.deepcopy(other), tmp_path / "m")(x), model(x))
    weight = load_state(tmp_path / "m")["1.weight"]
    assert torch.equal(weight.int_repr(), model[1].weight().int_repr())
    assert torch.equal(weight.q_per_channel_scales(), model[1].weight().q_per_channel_scales())
    with safe_open(tmp_path / "m", framework="pt") as file:  # no wider than their values need
        kinds = [file.get_tensor(f"1.weight::{part}").dtype for part in ("ints", "scales", "zeros")]
    assert kinds == [torch.int8, torch.float32, torch.int8]


def test_broken_files_are_told_clearly(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_model(net(), path)
    whole = path.read_bytes()
    for end in (0, 5, 200, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(CupelError, match=r"m\.safetensors must be a whole safetensors file; .* Write it again"):
            load_state(path)
    with pytest.raises(CupelError, match="must be a whole"):
        load_state(tmp_path / "absent")
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CupelError, match="must be a model file of cupel"):
        load_state(path)
    path.write_bytes(whole)
    with pytest.raises(CupelError, match="must hold the state of this network"):
        load_into(nn.Linear(2, 2), path)
    with pytest.raises(CupelError, match="must hold the state of this network"):
        load_into(ConvNet(1, 10, 4), path)


def test_what_cannot_be_stored_is_refused() -> None:
    class Extra(nn.Module):
        def get_extra_state(self) -> object:
            return {"a": object()}

    with pytest.raises(CupelError, match="must be tensors to be stored; _extra_state is a dict"):
        size_of(Extra())
    sparse = nn.Module()
    sparse.register_buffer("edges", torch.eye(3).to_sparse())
    with pytest.raises(CupelError, match="edges must be a dense tensor"):
        size_of(sparse)


def test_saving_leaves_the_model_alone() -> None:
    subject = build(DigitsCnn(width=4, examples=96), Context())
    before = {k: v.clone() for k, v in subject.model.state_dict().items()}
    modes = [m.training for m in subject.model.modules()]
    size_of(subject.model)
    assert all(same_bits(v, before[k]) for k, v in subject.model.state_dict().items())
    assert modes == [m.training for m in subject.model.modules()]
