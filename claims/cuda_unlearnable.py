"""Claim of `cuda-unlearnable`: a network trained on class-wise filtered images fails on clean ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from cupel.core.context import Context, seeded
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.tasks import Classification
from cupel.core.types import Budget, Examples, TrainView, outputs_on
from cupel.data.local import local
from cupel.nets.convnet import ConvNet
from cupel.runner.claims import Claim
from cupel.techniques.integrity.cuda_unlearnable import CudaUnlearnable, class_kernels, filtered
from cupel.workloads.vision.digits_cnn import DigitsCnn

CLAIM = Claim(
    method="cuda-unlearnable",
    statement="Training on images filtered by a secret kernel per class loses at least 0.4 of clean test accuracy "
    "against training on clean images, at equal epochs and with perfect accuracy on the filtered images; with half of "
    "the images protected the network is no better than one trained on the clean half alone",
    paper="ImageNet-100, ResNet-18: 80.66% trained on clean images, 8.96% on CUDA's",
    bounds={"drop": ">= 0.4", "own_train": ">= 0.98", "half_over_clean_half": "<= 0.02", "cifar_drop": ">= 0.2"},
    quick_seeds=1,
)


def accuracy(model: nn.Module, data: Examples) -> float:
    return float((outputs_on(model, data).argmax(-1) == data.targets).double().mean())


def one_for_all(train: Examples, seed: int) -> Examples:
    """Control: the same blur for every class carries no label."""
    kernel = class_kernels(1, 3, 0.3, seeded(seed, "one"))
    return train.having(inputs=filtered(train.inputs, kernel.expand(len(train), -1, -1)))


def shuffled(train: Examples, seed: int) -> Examples:
    """Control: the same kernels, given to images without regard to class: same blur, no label in it."""
    kernels = class_kernels(10, 3, 0.3, seeded(seed, "shuffled"))
    pick = torch.randint(10, (len(train),), generator=seeded(seed, "pick"))
    return train.having(inputs=filtered(train.inputs, kernels[pick]))


def patched(train: Examples, seed: int) -> Examples:
    """Peer: a solid 2x2 patch, at a place and of a grey of its class."""
    draw = seeded(seed, "patch")
    row, column = (torch.randint(train.inputs.shape[-1] - 1, (10,), generator=draw) for _ in range(2))
    grey = torch.rand(10, generator=draw)
    inputs = train.inputs.clone()
    for k in range(10):
        here = train.targets == k
        inputs[here, :, row[k] : row[k] + 2, column[k] : column[k] + 2] = grey[k]
    return train.having(inputs=inputs)


def cifar(split: str, per_class: int) -> Examples:
    with np.load(local(f"cifar10/cifar10_{split}.npz"), allow_pickle=False) as held:
        images, labels = held["images"], held["labels"]
    rows = np.concatenate([np.flatnonzero(labels == k)[:per_class] for k in range(10)])
    y: Tensor = torch.from_numpy(labels[rows]).long()
    return Examples(torch.from_numpy(images[rows]).float().div(255), y, torch.arange(len(y)))


def on_cifar(seed: int, quick: bool) -> dict[str, float]:
    train, test = cifar("train_1000pc", 300), cifar("test_200pc", 100)
    guarded = CudaUnlearnable().data(TrainView(train, test), Context(seed=seed)).train
    found = {}
    sets = {"clean": train, "cuda": guarded} | ({} if quick else {"shuffled_filters": shuffled(train, seed)})
    for name, data in sets.items():
        with Context(seed=seed).scope("init"):
            net = nn.Sequential(nn.AvgPool2d(2), ConvNet(channels=3, classes=10, width=8))
        net = fit(net, data, Classification(10), budget=Budget(epochs=8, lr=3e-3, schedule="cosine"), seed=seed)
        found[f"cifar_{name}"] = accuracy(net, test)
        found[f"cifar_{name}_own_train"] = accuracy(net, data)
    return found | {"cifar_drop": found["cifar_clean"] - found["cifar_cuda"]}


def measure(seed: int, quick: bool) -> dict[str, float]:
    start = build(DigitsCnn(width=8 if quick else 16), Context(seed=seed))
    view = start.data.view()
    whole = CudaUnlearnable().data(view, Context(seed=seed)).train
    half = CudaUnlearnable(rate=0.5).data(view, Context(seed=seed)).train
    kept = view.train.take((half.inputs == view.train.inputs).flatten(1).all(1))
    sets = {"clean": view.train, "cuda": whole, "half": half, "clean_half": kept}
    if not quick:
        sets |= {"one_filter": one_for_all(view.train, seed), "patches": patched(view.train, seed)}
        sets |= {"shuffled_filters": shuffled(view.train, seed)}
    found = {}
    for name, data in sets.items():
        net = build(DigitsCnn(width=8 if quick else 16), Context(seed=seed)).model
        # The clean half gets as many updates as the whole: twice the epochs.
        epochs = start.budget.epochs * (2 if name == "clean_half" else 1)
        net = fit(net, data, start.task, budget=replace(start.budget, epochs=epochs), seed=seed)
        found[name] = accuracy(net, start.data.test)
        if name in ("cuda", "patches"):
            found["own_train" if name == "cuda" else "patches_own_train"] = accuracy(net, data)
    found["drop"] = found["clean"] - found["cuda"]
    found["half_over_clean_half"] = found["half"] - found["clean_half"]
    return found | on_cifar(seed, quick)
