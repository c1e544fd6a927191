"""`accuracy` against scikit-learn and by hand."""

from __future__ import annotations

from sklearn.metrics import accuracy_score, confusion_matrix, recall_score

from cupel.core.context import Context
from cupel.core.steps import FitStep
from cupel.probes.quality.accuracy import Accuracy
from cupel.runner.bench import prepare
from cupel.workloads.vision.digits_cnn import DigitsCnn


def test_equals_scikit_learn() -> None:
    subject, _ = prepare(DigitsCnn(width=8), [FitStep({"epochs": 2})])
    found = Accuracy().measure(subject, Context())
    truth, guess = subject.data.test.targets.numpy(), subject.outputs().argmax(-1).numpy()
    assert abs(found["accuracy"].value - accuracy_score(truth, guess)) < 1e-12
    assert abs(found["worst_class_accuracy"].value - recall_score(truth, guess, average=None).min()) < 1e-6
    assert found.figures["confusion"] == confusion_matrix(truth, guess).tolist()
    assert found["accuracy"].count == len(truth)


def test_classes_without_examples_do_not_count() -> None:
    subject, _ = prepare(DigitsCnn(width=8), [FitStep({"epochs": 2})])
    some = subject.data.test.where(lambda b: b.targets < 3)
    from dataclasses import replace

    subject = subject.with_data(replace(subject.data, test=some))
    found = Accuracy().measure(subject, Context())
    assert found["worst_class_accuracy"].value > 0 and found["worst_class_accuracy"].count < len(some)
