"""bivit: its map and layers by NumPy, gradients by hand, what each stage makes binary, the loss, bits in the file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.errors import MissingArtefact, PlanError
from cupel.core.fit import fit
from cupel.core.protocols import Hook
from cupel.core.shelf import TEACHER
from cupel.core.slots import phase
from cupel.core.steps import apply, build
from cupel.core.types import Batch, Budget, Subject
from cupel.nets.vit import Attention
from cupel.probes.cost.cost import Cost
from cupel.storage.state import load_into, load_state, save_model
from cupel.techniques.compress.bivit import (
    BinaryAttention,
    BiViT,
    SignLinear,
    binarise,
    centred,
    kept,
    mlp_layers,
    operations,
    row_scale,
    softmax_aware,
)
from cupel.workloads.vision.digits_cnn import DigitsCnn
from cupel.workloads.vision.digits_vit import DigitsVit

torch.set_num_threads(1)
TINY = DigitsVit(width=8, depth=2, heads=2, examples=96)


def scores(*shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def slow_map(x: np.ndarray, threshold: float, scaled: bool) -> np.ndarray:
    made = np.zeros_like(x)
    for i, row in enumerate(x):
        a = np.exp(row) / np.exp(row).sum()
        chosen = [j for j in range(len(a)) if a[j] >= threshold * max(a)]
        made[i, chosen] = sum(a[j] for j in chosen) / len(chosen) if scaled else 1.0
    return made


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("threshold", [0.1, 0.25, 1.0])
def test_map_by_numpy_and_gradient_of_softmax(threshold: float, scaled: bool) -> None:
    x, toward = scores(2, 3, 7, 7), torch.randn(2, 3, 7, 7, dtype=torch.float64)
    leaf, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = softmax_aware(leaf, threshold, scaled)
    wanted = slow_map(x.reshape(-1, 7).numpy(), threshold, scaled)
    assert np.allclose(found.detach().reshape(-1, 7).numpy(), wanted, atol=1e-12)
    short = softmax_aware(x.float().requires_grad_(), threshold, scaled).detach().view(-1, 7)
    assert all(len(row.unique()) <= 2 for row in short)  # exactly two values a row, whatever the gradient asks for
    (found * toward).sum().backward()
    (plain.softmax(-1) * toward).sum().backward()
    assert torch.allclose(leaf.grad, plain.grad, atol=1e-12)  # type: ignore[arg-type]


def test_row_scale_has_the_least_error() -> None:
    soft = scores(50, 9).softmax(-1)
    keep = kept(soft, 0.25)
    assert bool((keep.sum(-1) >= 1).all()) and set(keep.unique().tolist()) == {0.0, 1.0}
    for a, b, alpha in zip(soft, keep, row_scale(soft, keep), strict=True):
        best = np.linalg.lstsq(b.numpy()[:, None], a.numpy(), rcond=None)[0]
        assert float(alpha) == pytest.approx(float(best[0]))


def sign_layer(fan_in: int = 6, out: int = 4, sign_in: bool = True, sign_out: bool = False) -> SignLinear:
    torch.manual_seed(3)
    layer = nn.Linear(fan_in, out).double()
    binarise(layer, sign_in, sign_out)
    assert isinstance(layer, SignLinear)
    return layer


def test_layer_by_numpy() -> None:
    torch.manual_seed(3)
    plain = nn.Linear(6, 4).double()
    w, b, x = plain.weight.detach().numpy(), plain.bias.detach().numpy(), scores(5, 6)
    layer = sign_layer()
    assert np.allclose(layer.scale.detach().numpy(), np.abs(w).mean(1))
    made = np.zeros((5, 4))
    for n in range(5):
        for o in range(4):
            signs = [1.0 if w[o, i] - w[o].mean() >= 0 else -1.0 for i in range(6)]
            inputs = [1.0 if float(x[n, i]) >= 0 else -1.0 for i in range(6)]
            made[n, o] = np.abs(w[o]).mean() * sum(s * v for s, v in zip(signs, inputs, strict=True)) + b[o]
    assert np.allclose(layer(x).detach().numpy(), made)
    layer.sign_out = True
    assert np.array_equal(layer(x).detach().numpy(), np.where(made >= 0, 1.0, -1.0))
    layer.sign_in = layer.sign_out = False
    real = x.numpy() @ layer.binary().detach().numpy().T + b
    assert np.allclose(layer(x).detach().numpy(), real)


def test_gradients_by_hand() -> None:
    layer = sign_layer(sign_in=True)
    with torch.no_grad():
        layer.weight[0, 0] = 2.5  # beyond one: the sign holds its gradient back
        layer.weight[1] *= 0.1
    x = scores(5, 6).requires_grad_()
    toward = scores(5, 4)
    (layer(x) * toward).sum().backward()
    signs_in, c = torch.where(x >= 0, 1.0, -1.0).detach().double(), centred(layer.weight).detach()
    signs = torch.where(c >= 0, 1.0, -1.0).double()
    to_binary = toward.T @ signs_in  # [out, in]
    assert torch.allclose(layer.scale.grad, (to_binary * signs).sum(1))  # type: ignore[arg-type]
    to_c = to_binary * layer.scale.detach()[:, None] * (c.abs() <= 1)
    assert torch.allclose(layer.weight.grad, to_c - to_c.mean(1, keepdim=True))  # type: ignore[arg-type]
    assert float(c.abs().max()) > 1
    back = (toward @ layer.binary().detach()) * (x.detach().abs() <= 1)
    assert torch.allclose(x.grad, back) and bool((x.detach().abs() > 1).any())  # type: ignore[arg-type]


def test_attention_by_hand() -> None:
    torch.manual_seed(0)
    plain = Attention(8, 2).double()
    model = nn.ModuleDict({"block": nn.ModuleDict({"attention": plain})})
    made = BiViT(stage="attention", start="own").model(model, Context()).block.attention  # type: ignore[union-attr]
    x = scores(3, 5, 8)
    one = torch.where(x >= 0, 1.0, -1.0).double()

    def signs(part: str) -> Tensor:
        layer = getattr(made, part)
        y = one @ layer.binary().T + layer.bias
        return torch.where(y >= 0, 1.0, -1.0).double()

    wanted = torch.zeros_like(x)
    for b in range(3):
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            q, k, v = (signs(part)[b][:, h] for part in "qkv")
            a = torch.from_numpy(slow_map((q @ k.T / 2).detach().numpy(), 0.25, True))
            heads.append(a @ v)
        mixed = torch.cat(heads, 1)
        wanted[b] = torch.where(mixed >= 0, 1.0, -1.0).double() @ made.out.binary().T + made.out.bias
    assert torch.allclose(made(x), wanted, atol=1e-9)
    learned = BinaryAttention(0.25, "learned", x, 2)
    with torch.no_grad():
        learned.gain[1] = 3.0  # type: ignore[index]
    s = scores(3, 2, 5, 5)
    both, closed = learned(s), softmax_aware(s, 0.25)
    assert torch.equal(both[:, 0], closed[:, 0]) and torch.allclose(both[:, 1], 3 * closed[:, 1])
    both.sum().backward()
    assert torch.allclose(learned.gain.grad.flatten(), closed.sum((0, 2, 3)))  # type: ignore[union-attr]


# ---- in a fit


@dataclass(frozen=True)
class Spy:
    """Keeps what `look(at, out, batch, loss so far)` returns beside every loss."""

    look: Callable[[Any, Tensor, Batch, Tensor], object]
    seen: list[Any] = field(default_factory=list)

    def hook(self, ctx: Context) -> Hook:
        return _Spying(self)


class _Spying(Hook):
    def __init__(self, spy: Spy) -> None:
        self.spy = spy

    @phase("weight")
    def loss(self, loss: Tensor, out: Tensor, batch: Batch, at: Any) -> Tensor:
        self.spy.seen.append(self.spy.look(at, out, batch, loss))
        return loss


def on_bench(seed: int = 0) -> Subject:
    """A fresh network, and on its shelf another one, as if that were trained."""
    subject = build(TINY, Context(seed=seed))
    assert subject.shelf is not None
    subject.shelf.put(TEACHER, build(TINY, Context(seed=100)).model)
    return subject


def trained(subject: Subject, *techniques: Any, epochs: int = 1, lr: float = 1e-3) -> Subject:
    budget = Budget(epochs=epochs, batch_size=32, lr=lr)
    fitted = fit(
        subject.model, subject.data, subject.task, techniques=techniques, budget=budget, shelf=subject.shelf, seed=0
    )
    return subject.with_model(fitted)


def binary_parts(model: nn.Module) -> dict[str, tuple[bool, bool]]:
    return {n: (m.sign_in, m.sign_out) for n, m in model.named_modules() if isinstance(m, SignLinear)}


def test_what_each_stage_makes_binary() -> None:
    part = {"q": (True, True), "k": (True, True), "v": (True, True), "out": (True, False)}
    attention = {f"blocks.{i}.attention.{n}": s for i in range(2) for n, s in part.items()}
    mlp = {f"blocks.{i}.mlp.{n}": (False, False) for i in range(2) for n in (0, 2)}
    assert len(list(mlp_layers(on_bench().model))) == len(mlp)
    first = trained(on_bench(), BiViT(stage="attention"))
    assert binary_parts(first.model) == attention
    maps = [m for m in first.model.modules() if isinstance(m, BinaryAttention)]
    assert len(maps) == 2 and not any(isinstance(m, nn.Softmax) for m in first.model.modules())
    latent = {n: p.detach().clone() for n, p in first.model.named_parameters()}
    second = trained(first, BiViT(stage="mlp"), lr=1e-12)
    assert binary_parts(second.model) == attention | mlp
    now = dict(second.model.named_parameters())
    assert all(torch.allclose(now[n], p, atol=1e-9) for n, p in latent.items())  # goes on where it stood
    whole = trained(on_bench(), BiViT(stage="all", mlp="full"))
    assert binary_parts(whole.model) == attention | dict.fromkeys(mlp, (True, False))


def test_starts_from_the_teacher_or_from_itself() -> None:
    for start, wanted in (("teacher", on_bench().shelf.get(TEACHER)), ("own", on_bench().model)):  # type: ignore[union-attr]
        done = trained(on_bench(), BiViT(start=start, stage="attention"), lr=1e-12)
        own = dict(done.model.named_parameters())
        assert all(torch.allclose(own[n], p, atol=1e-9) for n, p in wanted.named_parameters())
        assert all(torch.equal(own[n], b) for n, b in wanted.named_buffers())


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_loss_by_hand(weight: float) -> None:
    subject = on_bench()
    assert subject.shelf is not None
    teacher = subject.shelf.get(TEACHER)
    before = copy.deepcopy(teacher.state_dict())

    def look(at: Any, out: Tensor, batch: Batch, loss: Tensor) -> tuple[float, float]:
        with torch.no_grad():
            p, q = (teacher(batch.inputs) / 2).softmax(-1), (out / 2).softmax(-1)
        divergence = (p * (p / q).log()).sum(-1).mean()
        wanted = (1 - weight) * F.cross_entropy(out, batch.targets) + weight * 4 * divergence
        return float(loss.detach()), float(wanted.detach())

    spy = Spy(look)
    trained(subject, BiViT(weight=weight, temperature=2.0, start="own"), spy)
    assert len(spy.seen) == 3 and all(a == pytest.approx(b, abs=1e-5) for a, b in spy.seen)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.requires_grad for p in teacher.parameters())


def test_training_moves_scales_and_signs() -> None:
    done = trained(on_bench(), BiViT(), lr=1e-2, epochs=2)
    start = BiViT().model(on_bench().model, Context(shelf=on_bench().shelf))  # type: ignore[arg-type]
    for name in binary_parts(done.model):
        new, old = done.model.get_submodule(name), start.get_submodule(name)
        assert float((new.scale - old.scale).detach().abs().max()) > 1e-3  # type: ignore[operator]
        assert bool((centred(new.weight).sign() != centred(old.weight).sign()).any())  # type: ignore[arg-type]


# ---- what is shipped


def test_file_holds_one_bit_a_weight_and_is_the_network(tmp_path: Path) -> None:
    done = trained(on_bench(), BiViT(), lr=1e-2)
    written = save_model(done.model, tmp_path / "m")
    state = load_state(tmp_path / "m")
    for name in binary_parts(done.model):
        layer = done.model.get_submodule(name)
        size = layer.weight.numel()  # type: ignore[operator]
        packed = state[f"{name}.signs"]
        assert packed.dtype == torch.uint8 and packed.numel() == size // 8 and f"{name}.weight" not in state
        bits = np.unpackbits(packed.numpy(), bitorder="little").astype(np.float32).reshape(layer.weight.shape)  # type: ignore
        assert np.array_equal((2 * bits - 1) * state[f"{name}.scale"].numpy()[:, None], layer.binary().detach().numpy())  # type: ignore
    other = trained(on_bench(1), BiViT(start="own"))
    assert torch.equal(other.with_model(load_into(other.model, tmp_path / "m")).outputs(), done.outputs())
    assert Cost().measure(done, Context())["size_bytes"].value == written


def test_odd_rows_come_back_from_the_file(tmp_path: Path) -> None:
    layer = sign_layer(6, 5)
    with torch.no_grad():
        layer.weight[0], layer.weight[1] = -0.3, 0.1  # equal entries
        layer.scale[2], layer.scale[3] = 0.0, -0.7
        layer.scale[0] = 0.0
    save_model(layer, tmp_path / "m")
    back: Any = load_into(sign_layer(6, 5), tmp_path / "m")
    assert torch.equal(back.binary(), layer.binary())
    with torch.no_grad():
        layer.scale.fill_(1.0), back.scale.fill_(1.0)
    assert torch.equal(back.binary(), layer.binary())  # signs too, behind a scale of zero
    assert layer.binary()[0].eq(-1).all() and layer.binary()[1].eq(1).all()


def test_operations_by_hand() -> None:
    subject = on_bench()
    tokens, width, x = 17, 8, subject.data.test.inputs[:1]
    blocks = 2 * (4 * tokens * width * width + 2 * tokens * tokens * width)
    mlp = 2 * 2 * tokens * width * 2 * width
    rest = 16 * width * 4 + width * 10
    assert operations(subject.model, x) == (blocks + mlp + rest,) * 2
    method = BiViT(start="own", weight=0.0)
    done = method.model(subject.model, Context())
    assert operations(done, x) == (blocks + mlp + rest, pytest.approx(blocks / 64 + mlp + rest))
    full = BiViT(start="own", mlp="full").model(on_bench().model, Context())
    assert operations(full, x)[1] == pytest.approx((blocks + mlp) / 64 + rest)


def test_refusals() -> None:
    with pytest.raises(PlanError, match="must come after stage attention"):
        trained(on_bench(), BiViT(stage="mlp"))
    subject = build(DigitsCnn(width=4, examples=96), Context())
    with pytest.raises(PlanError, match="must have attention"):
        apply(BiViT(), subject)
    with pytest.raises(MissingArtefact):
        trained(build(TINY, Context()), BiViT())
    wide = build(DigitsVit(width=12, depth=2, heads=2, examples=96), Context())
    with pytest.raises(PlanError, match="the same network at full precision"):
        _with_teacher(wide)
    assert binary_parts(trained(build(TINY, Context()), BiViT(weight=0.0, start="own")).model)


def _with_teacher(subject: Subject) -> None:
    assert subject.shelf is not None
    subject.shelf.put(TEACHER, on_bench().model)
    apply(BiViT(), subject)
