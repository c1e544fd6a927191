"""Claim of `gb-cnn`: a deep network grown by boosting beats the same depth and width trained as a whole."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import apply, build
from cupel.core.tasks import Classification
from cupel.core.types import Budget, Subject
from cupel.data.digits import digits
from cupel.data.splits import stratified
from cupel.nets.mlp import Mlp
from cupel.runner.claims import Claim
from cupel.techniques.train.gb_cnn import Boosted, GbCnn
from cupel.workloads.vision.fashion_mnist_cnn import FashionMnistCnn

CLAIM = Claim(
    method="gb-cnn",
    statement="On digits GB-DNN with 10 layers of 20 units is 5 points above an MLP of that shape trained end to end, its "
    "training loss never rises, and round 5 is within half a point of the last. On 4,000 Fashion-MNIST images GB-CNN "
    "keeps the accuracy of the trained network it starts from (within 0.3 points) at a lower log-loss",
    paper="better accuracy than CNNs and deep networks of the same architecture on several image and tabular sets",
    bounds={
        "digits_gain_depth_10": ">= 0.05",
        "digits_loss_rises": "<= 0",
        "digits_round_5_short_of_last": "<= 0.005",
        "fashion_gain": ">= -0.003",
        "fashion_log_loss_change": "< 0",
    },
    seeds=(0, 1, 2),
    quick_seeds=1,
    explains="Accuracy rises (0.854 to 0.862) but so does the log-loss (0.40 to 0.46): the start, trained for 5 epochs, "
    "is not overconfident yet, and further passes make it so. The same network trained for as many epochs as start and "
    "rounds together ends at the same log-loss (0.45) and at 0.858.",
)


def share(out: Tensor, targets: Tensor) -> float:
    return float((out.argmax(1) == targets).double().mean())


def log_loss(subject: Subject) -> float:
    return float(subject.task.loss(subject.outputs(), subject.data.test.whole()))


def breast_cancer() -> Subject:
    """569 rows of 30 measurements, standardised by the training part; two classes."""
    x, y = load_breast_cancer(return_X_y=True)
    data = stratified(torch.from_numpy(x).float(), torch.from_numpy(y).long(), valid=0.1, test=0.3, data_seed=0)
    mean, std = data.train.inputs.mean(0), data.train.inputs.std(0)
    parts = {p: getattr(data, p) for p in ("train", "valid", "test")}
    scaled = {p: part.having(inputs=(part.inputs - mean) / std) for p, part in parts.items()}
    return Subject(Mlp(30, (20,), 2), replace(data, **scaled), Classification(2))


def end_to_end(subject: Subject, depth: int, seed: int, epochs: int) -> float:
    """Test accuracy of an MLP of 20-unit layers, at the learning rate that validates best."""
    data, features = subject.data, subject.data.train.inputs[0].numel()
    found = []
    for lr in (1e-3, 3e-3):
        with Context(seed=seed).scope("mlp"):
            net = Mlp(features, (20,) * depth, subject.task.classes)
        budget = Budget(epochs=epochs, batch_size=128, lr=lr)
        done = subject.with_model(fit(net, data, subject.task, budget=budget, seed=seed))
        found.append((share(done.outputs("valid"), data.valid.targets), share(done.outputs(), data.test.targets)))
    return max(found)[1]


def dense(name: str, subject: Subject, seed: int, quick: bool) -> dict[str, float]:
    rounds, epochs = 10, 40 if quick else 100
    data = subject.data
    made = apply(GbCnn(trunk="none", rounds=rounds, epochs=epochs), subject, seed=seed)
    with torch.no_grad():
        tests, trains = made.model.staged(data.test.inputs), made.model.staged(data.train.inputs)
    losses = [float(subject.task.loss(out, data.train.whole())) for out in trains]
    accuracies = [share(out, data.test.targets) for out in tests]
    # As many passes over the data as all rounds may take together, up to 150.
    depths = (10,) if quick else (1, 10)
    flat = {d: end_to_end(subject, d, seed, 60 if quick else 150) for d in depths}
    found = {f"{name}_mlp_depth_{d}": value for d, value in flat.items()}
    return found | {
        f"{name}_boosted": accuracies[-1],
        f"{name}_gain_depth_10": accuracies[-1] - flat[10],
        f"{name}_loss_rises": float(sum(b > a + 1e-6 for a, b in pairwise(losses))),
        f"{name}_round_5_short_of_last": accuracies[-1] - accuracies[4],
    }


def convolutional(seed: int, quick: bool) -> dict[str, float]:
    rounds, each = 3, 1 if quick else 4
    workload = FashionMnistCnn(width=8, train_examples=1000 if quick else 4000)
    subject, again = build(workload, Context(seed=seed)), build(workload, Context(seed=seed))
    plan = subject.budget
    start = subject.with_model(fit(subject.model, subject.data, subject.task, budget=plan, seed=seed))
    # 100 units and half Newton steps at the workload's own lr, chosen on seed 99: 20 units lose 2 to 4 points here.
    grown = GbCnn(rounds=rounds, epochs=each, patience=each, units=100, shrinkage=0.5, lr=plan.lr)
    ours = apply(grown, start, seed=seed)
    net = ours.model
    drift = ours.with_model(Boosted([net.trunks[-1]], net.dense, net.heads, net.scale).eval())
    longer = replace(plan, epochs=plan.epochs + rounds * each)
    long = again.with_model(fit(again.model, again.data, again.task, budget=longer, seed=seed))
    targets = subject.data.test.targets
    found = {}
    for name, done in (("start", start), ("boosted", ours), ("shared_trunk", drift), ("trained_as_long", long)):
        found[f"fashion_{name}"] = share(done.outputs(), targets)
        found[f"fashion_{name}_log_loss"] = log_loss(done)
    found["fashion_log_loss_against_as_long"] = (
        found["fashion_boosted_log_loss"] - found["fashion_trained_as_long_log_loss"]
    )
    found["fashion_gain"] = found["fashion_boosted"] - found["fashion_start"]
    found["fashion_log_loss_change"] = found["fashion_boosted_log_loss"] - found["fashion_start_log_loss"]
    return found


def measure(seed: int, quick: bool) -> dict[str, float]:
    figures = Subject(Mlp(64, (20,), 10), digits(), Classification(10))
    found = dense("digits", figures, seed, quick) | dense("cancer", breast_cancer(), seed, quick)
    return found | convolutional(seed, quick)
