"""Claim of `cora-gcn`: with 140 labels, citations tell the field of a paper where its words alone do not."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from cupel.core.context import Context
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import Subject
from cupel.ops.node_graph import graph_in
from cupel.runner.claims import Claim
from cupel.workloads.structured.cora_gcn import CoraGCN

CLAIM = Claim(
    method="cora-gcn",
    statement="On the public split of Cora a two-layer graph convolutional network reaches 0.80 test accuracy, at least 15 "
    "points more than the same network, trained with the same budget, on a graph without edges",
    paper="Cora: 81.5 percent; a multilayer perceptron on the words 55.1 percent",
    bounds={"accuracy": ">= 0.80", "gain_over_words_alone": ">= 0.15"},
)


def trained(subject: Subject, model: nn.Module, seed: int, quick: bool) -> float:
    budget = replace(subject.budget, epochs=40 if quick else 200)
    done = subject.with_model(fit(model, subject.data, subject.task, budget=budget, seed=seed))
    return float((done.outputs().argmax(1) == done.data.test.targets).double().mean())


def measure(seed: int, quick: bool) -> dict[str, float]:
    subject = build(CoraGCN(), Context(seed=seed))
    lone = copy.deepcopy(subject.model)
    graph_in(lone, "claim").edges = torch.zeros(2, 0, dtype=torch.long)
    words = trained(subject, lone, seed, quick)
    whole = trained(subject, subject.model, seed, quick)
    return {"accuracy": whole, "words_alone": words, "gain_over_words_alone": whole - words}
