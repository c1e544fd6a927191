"""cost: closed forms, an independent counter, liveness by hand, and what must not be counted."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.scorecard import Readings
from cupel.core.shelf import BITS, Shelf
from cupel.core.steps import apply, build
from cupel.core.tasks import Classification
from cupel.core.types import Examples, Splits, Subject
from cupel.nets.separable import SeparableNet
from cupel.ops.ledger import ledger_of
from cupel.probes.cost.cost import Cost
from cupel.storage.state import save_model
from cupel.techniques.compress.binaryconnect import BinaryConnect
from cupel.techniques.compress.dqa import DQA
from cupel.techniques.compress.int8_ptq import Int8PTQ
from cupel.workloads.vision.digits_cnn import DigitsCnn
from cupel.workloads.vision.digits_mlp import DigitsMlp

torch.set_num_threads(1)


def bench(net: nn.Module, x: Tensor) -> Subject:
    data = Examples(x, torch.zeros(len(x), dtype=torch.long), torch.arange(len(x)))
    return Subject(net.eval(), Splits(data, data, data), Classification(2))


def cost(subject: Subject) -> Readings:
    return Cost().measure(subject, Context())


def numbers(subject: Subject) -> dict[str, float]:
    return {name: r.value for name, r in cost(subject).items()}


@pytest.mark.parametrize("width", [4, 16])
def test_digits_cnn_equals_the_closed_form(width: int) -> None:
    w = width
    found = numbers(build(DigitsCnn(width=w, examples=96), Context()))
    assert found["operations"] == 64 * 9 * w + 16 * 9 * w * 2 * w + 16 * 9 * 4 * w * w + 8 * w * 10
    assert found["params"] == 9 * w + 18 * w * w + 36 * w * w + 2 * (w + 2 * w + 2 * w) + 80 * w + 10
    # The largest pair of maps is what enters and leaves the first block's norm, in four-byte floats.
    assert found["peak_activation_bytes"] == 2 * 64 * w * 4


def test_mlp_equals_the_closed_form() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    found = numbers(bench(net, torch.rand(5, 1, 8, 8)))
    assert found["operations"] == 64 * 300 + 300 * 100 + 100 * 10
    assert found["params"] == found["operations"] + 410
    assert found["peak_activation_bytes"] == 2 * 300 * 4  # ReLU's input and output


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: SeparableNet(1, 10, 12, 3), (1, 1, 8, 8)),
        (lambda: nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), groups=2), (1, 6, 9, 11)),
        (lambda: nn.Sequential(nn.Conv1d(3, 8, 5), nn.ReLU(), nn.Conv1d(8, 2, 3)), (1, 3, 30)),
        (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (1, 4, 5, 5)),
        (lambda: nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 3)), (1, 5, 7)),
    ],
)
def test_operations_equal_an_independent_counter(make: object, shape: tuple[int, ...]) -> None:
    fvcore = pytest.importorskip("fvcore.nn", reason="the independent counter fvcore is not installed")
    net, x = make().eval(), torch.rand(shape)  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counted = fvcore.FlopCountAnalysis(net, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        wanted = sum(n for op, n in counted.by_operator().items() if op in ("conv", "linear", "addmm", "matmul"))
    assert sum(op.macs for op in ledger_of(net, x).ops) == wanted > 0


def test_attention_recurrence_and_functional_calls_count() -> None:
    length, d, hidden = 5, 16, 32
    macs = sum(op.macs for op in ledger_of(attention().eval(), torch.rand(1, length, d)).ops)
    assert macs == length * (4 * d * d + 2 * d * hidden) + 2 * length * length * d
    for kind, gates in ((nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)):
        net = kind(6, 8, num_layers=2, bidirectional=True, batch_first=True).eval()
        wanted = 2 * 7 * gates * 8 * ((6 + 8) + (16 + 8))
        assert sum(op.macs for op in ledger_of(net, torch.rand(1, 7, 6)).ops) == wanted, kind

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.v = nn.Parameter(torch.rand(6, 4)), nn.Parameter(torch.rand(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.mv(torch.einsum("bi,oi->bo", x, self.a), self.v) + torch.dot(self.v, self.v)

    assert sum(op.macs for op in ledger_of(Functional(), torch.rand(3, 4)).ops) == 3 * 24 + 3 * 6 + 6


def test_a_sparse_matrix_counts_its_entries() -> None:
    class Spread(nn.Module):
        def forward(self, edges: Tensor) -> Tensor:
            return torch.sparse.mm(edges, torch.ones(10, 4))

    edges = torch.eye(10).to_sparse()
    assert sum(op.macs for op in ledger_of(Spread(), edges).ops) == 10 * 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its csr tensors a beta
        assert sum(op.macs for op in ledger_of(Spread(), edges.to_sparse_csr()).ops) == 10 * 4


def test_masks_save_bytes_but_no_operations() -> None:
    subject = build(DigitsCnn(width=8, examples=96), Context())
    dense = numbers(subject)
    with torch.no_grad():
        for p in subject.model.parameters():
            if p.ndim > 1:
                p.masked_fill_(torch.rand_like(p) < 0.9, 0.0)
    masked = cost(subject)
    found = {name: r.value for name, r in masked.items()}
    for same in ("params", "operations", "peak_activation_bytes"):
        assert found[same] == dense[same]
    assert found["nonzero_params"] < 0.2 * dense["nonzero_params"] and found["size_bytes"] < 0.4 * dense["size_bytes"]
    rows = {row["layer"]: row for row in masked.figures["layers"]}
    weight = subject.model.block2.conv.weight
    assert rows["block2.conv"]["sparsity"] == pytest.approx(float((weight == 0).double().mean()))
    assert rows["block1.norm"]["sparsity"] == 0.0  # zeros in a shift are no sparsity
    assert sum(row["macs"] for row in rows.values()) == dense["operations"]
    assert sum(row["params"] for row in rows.values()) == dense["params"]


def test_size_is_what_is_written(tmp_path: object) -> None:
    subject = build(DigitsCnn(width=4, examples=96), Context())
    assert numbers(subject)["size_bytes"] == save_model(subject.model, tmp_path / "m")  # type: ignore[operator]


def test_liveness_of_a_skip_connection_by_hand() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.relu = nn.Linear(100, 10), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:  # x 400 bytes
            a = self.relu(x)  # 400; x is dead after this
            b = self.narrow(a)  # 40
            c = self.relu(b)  # 40, a still waits
            return a + F.pad(c, (0, 90))  # 400 for the pad, 400 for the sum

    ledger = ledger_of(Skip(), torch.rand(1, 100))
    # relu, narrow, relu, and the calls of the last line; a is held until the sum.
    held = ledger.live_bytes()
    assert held[:3] == [400 + 400, 400 + 40, 400 + 40 + 40]
    assert max(held) == 400 + 400 + 400 and held[-1] == 1200

    class Early(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out = x[:, :10].clone()
            (x * 2).sum()
            return out

    # clone, product, sum: the output made first is held to the end.
    assert ledger_of(Early(), torch.rand(1, 100)).live_bytes()[-2:] == [400 + 40 + 400, 40 + 400 + 4]

    class Late(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            small = x[:, :10].clone()
            return small * 2 + 1

    assert max(ledger_of(Late(), torch.rand(1, 100)).live_bytes()) == 440


def test_in_place_layers_and_views_hold_one_buffer() -> None:
    x = torch.rand(1, 50)
    wide = nn.Sequential(nn.Linear(50, 80), nn.ReLU(), nn.Linear(80, 2))
    views = (nn.Unflatten(1, (8, 10)), nn.Flatten())
    tight = nn.Sequential(nn.Linear(50, 80), nn.ReLU(inplace=True), *views, nn.Linear(80, 2))
    assert max(ledger_of(wide.eval(), x).live_bytes()) == 2 * 320
    assert max(ledger_of(tight.eval(), x).live_bytes()) == 320 + 200


def test_tied_weights_count_once() -> None:
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    apart = numbers(bench(net, torch.rand(2, 6)))
    net[1].weight = net[0].weight
    tied = numbers(bench(net, torch.rand(2, 6)))
    assert (apart["params"], tied["params"]) == (72, 36)
    assert tied["operations"] == apart["operations"] == 72


def test_bits_come_from_the_shelf_and_emulation_is_no_activation() -> None:
    subject = build(DigitsCnn(width=4, examples=96), Context())
    plain = numbers(subject)
    subject = replace(subject, shelf=Shelf(subject.data.fingerprint))
    made = apply(DQA(bits=4, examples=16), subject)
    after = cost(made)
    rows = {row["layer"]: row for row in after.figures["layers"]}
    assert made.shelf is not None
    assert {name: rows[name]["bits"] for name in made.shelf.get(BITS)} == dict(made.shelf.get(BITS))
    assert rows["block1.norm"]["bits"] is None
    for same in ("params", "operations", "peak_activation_bytes"):
        assert after[same].value == plain[same]


def test_subject_is_untouched_and_figures_are_json() -> None:
    subject = build(DigitsCnn(width=4, examples=96), Context())
    subject.model.train()
    before = copy.deepcopy(subject.model.state_dict())
    state = torch.get_rng_state()
    readings = cost(subject)
    json.dumps(readings.figures, allow_nan=False)
    assert all(torch.equal(v, before[k]) for k, v in subject.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in subject.model.modules())
    assert all(p.requires_grad for p in subject.model.parameters())
    assert all(r.better == "lower" for r in dict(readings).values())


def test_hooks_are_gone_after_an_error() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2))
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cost(bench(net, torch.rand(2, 3)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_operations_are_told_by_the_width_of_stored_weights() -> None:
    subject = build(DigitsMlp(hidden=(16,), examples=96), Context())
    plain = Cost().measure(subject, Context())
    total = int(plain["operations"].value)
    assert plain.figures["operations by bits"] == [{"bits": "32", "operations": total}]
    int8 = Cost().measure(apply(Int8PTQ(examples=16), subject), Context())
    assert int8.figures["operations by bits"] == [{"bits": "8", "operations": total}]
    budget = replace(subject.budget, epochs=1)
    signs = fit(subject.model, subject.data, subject.task, techniques=[BinaryConnect()], budget=budget)
    assert Cost().measure(subject.with_model(signs), Context()).figures["operations by bits"] == [
        {"bits": "1", "operations": total}
    ]
