"""Programs of torch.export come back as networks of real layers: equal outputs, trainable, changeable, copyable."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.errors import CupelError
from cupel.core.fit import fit
from cupel.core.steps import apply, build
from cupel.core.types import Subject
from cupel.intake.models import Brought, read_model
from cupel.intake.networks.lifted import Batch, Lifted
from cupel.nets.resnet import ResNet
from cupel.nets.vit import ViT
from cupel.ops.ledger import ledger_of
from cupel.probes.robust.evasion import Evasion
from cupel.storage.blueprint import built, drawn
from cupel.techniques.compress.dqa import DQA, Gridded
from cupel.techniques.compress.greenformer import Greenformer, LowRank
from cupel.techniques.compress.int8_ptq import Int8Net, Int8PTQ
from cupel.techniques.compress.magnitude_prune import MagnitudePrune
from cupel.techniques.compress.pdp import PDP
from cupel.workloads.vision.digits_cnn import DigitsCnn

torch.set_num_threads(1)
IMAGES = (1, 8, 8)


class Cnn(nn.Module):
    """Shared ReLU, pooling as functions, dropout, a fixed view, an in-place ReLU, a layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding="same", groups=8)  # depthwise
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(0.1)
        self.layers = nn.Sequential(nn.Linear(32, 16), nn.ReLU(inplace=True), nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu(self.norm(self.conv1(x))), 2)
        x = F.avg_pool2d(self.relu(self.conv2(x)), 2)
        return self.layers(self.drop(x.view(x.shape[0], -1)))  # type: ignore[no-any-return]


class Functional(nn.Module):
    """No layer at all: parameters and functions."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.kernel = nn.Parameter(torch.randn(4, 1, 3, 3, generator=draw))
        self.first = nn.Parameter(torch.randn(144, 12, generator=draw) / 12)
        self.second = nn.Parameter(torch.randn(10, 12, generator=draw))
        self.shift = nn.Parameter(torch.randn(12, generator=draw))
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(F.conv2d(x, self.kernel)).reshape(x.shape[0], -1)
        x = torch.tanh(x @ self.first + self.shift)
        return F.linear(x, self.second * self.scale) + x.sum(1, keepdim=True)


class Tokens(nn.Module):
    """Embedding tied to the output layer, torch's own attention and encoder layer, a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.head(self.norm(self.encoder(x))[:, 0])  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, num_layers=2, batch_first=True, bidirectional=True, dropout=0.3)
        self.gru = nn.GRU(12, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(x)
        x, _ = self.gru(x)
        return self.head(x[:, -1])  # type: ignore[no-any-return]


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.SiLU(), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.GroupNorm(4, 16),
        nn.Hardswish(), nn.LeakyReLU(0.2), nn.Softplus(), nn.Linear(16, 10), nn.LogSoftmax(1),
    )  # fmt: skip


def decoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.ELU(), nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1),
        nn.InstanceNorm2d(2), nn.AdaptiveAvgPool2d(2), nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip


def images(rows: int) -> Tensor:
    return torch.rand(rows, *IMAGES, generator=torch.Generator().manual_seed(rows))


def words(rows: int) -> Tensor:
    return torch.randint(0, 11, (rows, 5), generator=torch.Generator().manual_seed(rows))


def series(rows: int) -> Tensor:
    return torch.rand(rows, 5, 4, generator=torch.Generator().manual_seed(rows))


Inputs = Callable[[int], Tensor]
NETS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "cnn": (Cnn, images),
    "resnet": (lambda: ResNet(1, 10, 4, 1), images),
    "vit": (lambda: ViT(1, 8, 10, 2, 8, 1, 2), images),
    "tokens": (Tokens, words),
    "mlp": (mlp, images),
    "recurrent": (Recurrent, series),
    "functional": (Functional, images),
    "decoder": (decoder, images),
}


@dataclass(frozen=True)
class Case:
    """A network, its exported program, and what cupel made of the file."""

    net: nn.Module
    program: torch.export.ExportedProgram
    brought: Brought
    inputs: Inputs


def original(name: str) -> nn.Module:
    torch.manual_seed(1)
    net = NETS[name][0]()
    with torch.no_grad():
        for module in net.modules():  # statistics as after training
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return net.eval()


def through_file(program: torch.export.ExportedProgram) -> Brought:
    with TemporaryDirectory() as folder:
        torch.export.save(program, f"{folder}/m.pt2")
        return read_model(f"{folder}/m.pt2")


@cache
def case(name: str, rows: int = 4, training: bool = False, free: bool = False) -> Case:
    net, inputs = original(name).train(training), NETS[name][1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim.DYNAMIC},) if free else None
        program = torch.export.export(net, (inputs(rows),), dynamic_shapes=shapes)
        return Case(net.eval(), program, through_file(program), inputs)


@pytest.mark.parametrize("name", NETS)
def test_outputs_are_the_programs_own_and_batches_are_free(name: str) -> None:
    c = case(name)
    x = c.inputs(4)
    assert torch.equal(c.brought.model(x), c.program.module()(x))  # bit for bit at the exported batch
    with torch.no_grad():
        for rows in (1, 3, 13):
            x = c.inputs(rows)
            torch.testing.assert_close(c.brought.model(x), c.net(x), rtol=1e-5, atol=1e-5)
    assert c.brought.kind == "program"
    assert c.brought.input_shape == (None, *c.inputs(1).shape[1:])
    assert any("fixed at 4" in n for n in c.brought.notes)
    assert c.brought.gives >= {"weights", "gradients"}
    assert ("batchnorm" in c.brought.gives) == (name in ("cnn", "resnet", "mlp"))


def kinds(model: nn.Module) -> dict[str, str]:
    return {path: type(m).__name__ for path, m in model.named_modules() if type(m) is not nn.Module and path}


def test_layers_stand_under_their_own_names() -> None:
    made = kinds(case("cnn").brought.model)
    wanted = kinds(original("cnn"))
    assert {k: v for k, v in wanted.items() if v != "Sequential"}.items() <= made.items()
    assert set(made.values()) - set(wanted.values()) == {"MaxPool2d", "AvgPool2d"}
    assert list(made.values()).count("ReLU") == 2  # `relu` ran twice and is one module
    tensors = {n: (t.shape, t.dtype) for n, t in original("cnn").state_dict().items()}
    assert tensors == {n: (t.shape, t.dtype) for n, t in case("cnn").brought.model.state_dict().items()}


@pytest.mark.parametrize("name", ["resnet", "mlp", "vit", "decoder"])
def test_states_load_from_the_original(name: str) -> None:
    net, model = original(name), copy.deepcopy(case(name).brought.model)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    model.load_state_dict(net.state_dict())
    x = case(name).inputs(4)
    assert torch.equal(model(x), net(x))


def test_products_with_parameters_become_layers() -> None:
    model = case("functional").brought.model
    made = kinds(model)
    assert made["kernel"] == "Conv2d" and made["first"] == "Linear" and made["gelu"] == "GELU"
    assert "second" not in made  # it is computed before it is used, so it stays a parameter
    assert {n for n, _ in model.named_parameters()} == {"kernel.weight", "first.weight", "second", "shift"}
    assert torch.equal(model.get_parameter("first.weight"), original("functional").first.T)  # type: ignore[union-attr]
    assert any("stored [in, out]" in n and "first" in n for n in case("functional").brought.notes)


def test_tied_weights_stay_tied() -> None:
    model = copy.deepcopy(case("tokens").brought.model)
    embed, head = model.get_submodule("embed"), model.get_submodule("head")
    assert (type(embed), type(head)) == (nn.Embedding, nn.Linear)
    assert embed.weight is head.weight
    assert model.get_submodule("attend.in_proj").weight.shape == (24, 8)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in original("tokens").parameters())


def test_recurrent_layers_stay_calls_that_train() -> None:
    model = copy.deepcopy(case("recurrent").brought.model)
    assert any("stay calls (gru, lstm)" in n for n in case("recurrent").brought.notes)
    x = series(4)
    model(x).square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in model.parameters())
    model.train()
    assert not torch.equal(model(x), model(x))  # dropout between its layers is back
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", ["cnn", "tokens", "mlp"])
def test_exported_in_training_mode(name: str) -> None:
    c = case(name, training=True)
    x = c.inputs(4)
    assert any("training mode" in n for n in c.brought.notes)
    assert torch.equal(c.brought.model(x), original(name)(x))
    if name == "cnn":
        state = c.brought.model.state_dict()
        assert int(state["norm.num_batches_tracked"]) == 0  # reading and trying the program moved nothing
        assert all(torch.equal(v, state[k]) for k, v in original("cnn").state_dict().items())


def test_training_moves_statistics_as_in_the_original() -> None:
    net, model = original("cnn"), copy.deepcopy(case("cnn").brought.model)
    x = images(6)
    outs = []
    for one in (net, model):
        one.train()
        torch.manual_seed(9)
        outs.append(one(x))
        outs[-1].square().sum().backward()
    assert torch.equal(*outs)
    assert int(model.get_buffer("norm.num_batches_tracked")) == 1
    assert torch.equal(model.get_buffer("norm.running_var"), net.get_buffer("norm.running_var"))
    assert all(torch.equal(p.grad, model.get_parameter(n).grad) for n, p in net.named_parameters())
    assert not torch.equal(model(x), model(x))  # dropout


def test_inputs_are_never_written_to() -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3)).eval()
    brought = through_file(torch.export.export(net, (images(4),)))
    x = images(4) - 0.5
    kept = x.clone()
    out = brought.model(x)
    assert torch.equal(x, kept)
    assert torch.equal(out, net(kept.clone()))


def test_decomposed_programs_too() -> None:
    c = case("cnn")
    brought = through_file(c.program.run_decompositions())
    assert any("dropout" in n and "gone" in n for n in brought.notes)
    assert not any("gone" in n for n in c.brought.notes)
    made = kinds(brought.model)
    assert made["conv1"] == "Conv2d" and made["norm"] == "BatchNorm2d" and made["layers.0"] == "Linear"
    x = images(4)
    torch.testing.assert_close(brought.model(x), c.net(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2])
def test_small_batches_are_made_free_too(rows: int) -> None:
    c = case("tokens", rows)
    with torch.no_grad():
        torch.testing.assert_close(c.brought.model(words(7)), c.net(words(7)), rtol=1e-5, atol=1e-5)


def test_a_free_batch_needs_no_change() -> None:
    c = case("mlp", free=True)
    assert not any("fixed" in n for n in c.brought.notes)
    plan = c.brought.model._plan
    assert not any(isinstance(a, Batch) for step in plan.steps for a in step.args)
    assert torch.equal(c.brought.model(images(4)), c.net(images(4)))


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) - x.flatten(1).mean(0)


class Pinned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.rand(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] * self.rows


@pytest.mark.parametrize("net", [Mixing(), Pinned()])
def test_what_cannot_be_free_says_how_to_export(net: nn.Module) -> None:
    with pytest.raises(CupelError, match="dynamic_shapes"):
        through_file(torch.export.export(net, (images(4),)))


def test_copies_processes_traces_and_exports() -> None:
    c = case("cnn")
    model, x = c.brought.model, images(5)
    wanted = model(x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), wanted)
    assert torch.equal(copy.deepcopy(model)(x), wanted)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), wanted)
    assert torch.equal(built(*drawn(model))(x), wanted)
    again = through_file(torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)))
    assert torch.equal(again.model(x), wanted)
    assert kinds(again.model) == kinds(model)
    assert ledger_of(model, images(1)).macs() == {
        path: macs for path, macs in ledger_of(c.net, images(1)).macs().items() if macs or path in kinds(model)
    } | {path: 0 for path in ledger_of(model, images(1)).macs() if path not in kinds(c.net)}


def test_reading_draws_no_random_number() -> None:
    state = torch.get_rng_state()
    through_file(case("cnn").program)
    assert torch.equal(torch.get_rng_state(), state)


@cache
def bench() -> tuple[Subject, Subject]:
    """A small network that came as a program, trained on its own data; and the original, trained alike."""
    subject = build(DigitsCnn(width=8, examples=1500), Context())
    budget = replace(subject.budget, epochs=8, lr=0.05)
    found = []
    for model in (copy.deepcopy(case("cnn", training=True).brought.model), original("cnn")):
        made = fit(model, subject.data, subject.task, budget=budget, seed=0)
        found.append(replace(subject.with_model(made.eval()), budget=replace(budget, epochs=3, lr=0.02)))
    return found[0], found[1]


def hits(subject: Subject) -> float:
    return float((subject.outputs("test").argmax(1) == subject.data.test.targets).float().mean())


def test_it_trains_as_the_original_does() -> None:
    lifted, plain = bench()
    assert isinstance(lifted.model, Lifted)
    assert hits(lifted.with_model(case("cnn").brought.model)) < 0.3
    assert hits(lifted) > 0.8
    state = plain.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in lifted.model.state_dict().items())


@pytest.mark.parametrize("technique", [PDP(sparsity=0.8), MagnitudePrune(sparsity=0.8)])
def test_it_is_pruned(technique: object) -> None:
    subject, _ = bench()
    model = copy.deepcopy(subject.model)
    model = fit(model, subject.data, subject.task, techniques=[technique], budget=subject.budget, seed=0)
    weights = torch.cat([p.flatten() for p in model.parameters() if p.ndim > 1])
    assert float((weights == 0).float().mean()) == pytest.approx(0.8, abs=0.03)
    assert hits(subject.with_model(model)) > 0.5


def test_it_is_quantised() -> None:
    subject, _ = bench()
    grids = apply(DQA(bits=4), subject).model
    assert sum(isinstance(m, Gridded) for m in grids.modules()) == 4  # two convolutions and two linear layers
    x = subject.data.test.inputs[:64]
    assert not torch.equal(grids(x), subject.model(x))
    int8 = apply(Int8PTQ(), subject)
    assert isinstance(int8.model, Int8Net) and int8.model.whole
    packed = [
        type(m).__name__
        for m in int8.model.modules()
        if "quantized" in type(m).__module__ and "Packed" not in type(m).__name__
    ]
    assert sum("Conv" in n for n in packed) == 2 and sum("Linear" in n for n in packed) == 2
    assert hits(int8) > hits(subject) - 0.05


def test_it_is_factored() -> None:
    subject, _ = bench()
    model = apply(Greenformer(rank=0.4), subject).model
    pairs = {path for path, m in model.named_modules() if isinstance(m, LowRank)}
    assert "layers.0" in pairs
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in subject.model.parameters())
    whole = apply(Greenformer(rank=1.0), subject).model
    x = subject.data.test.inputs[:16]
    assert torch.equal(whole(x), subject.model(x))


def test_it_is_attacked() -> None:
    subject, _ = bench()
    found = Evasion(eps=0.25, examples=24, steps=8, queries=20, cw_examples=4).measure(subject, Context())
    assert found["masking_signs"].value == 0
    assert found["pgd"].value < found["clean_accuracy"].value - 0.3  # gradients reach the input
    assert not any("no input gradients" in n for n in found.notes)
