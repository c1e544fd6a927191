"""Claim of `model-parsing`: perturbations name the victim's kernel and activation, less so on new seeds and attacks."""

from __future__ import annotations

from cupel.core.context import Context
from cupel.core.steps import build
from cupel.probes.robust.model_parsing import ModelParsing
from cupel.runner.claims import Claim
from cupel.workloads.vision.digits_cnn import DigitsCnn

CLAIM = Claim(
    method="model-parsing",
    statement="On digits, 18 victims (3 kernels x 3 activations x 2 sparsities) and PGD-10 at linf 0.2: from a "
    "perturbation of an image it never saw, the parser names the kernel of the victims it knows in at least 65% of "
    "cases and the activation in 45% (guessing: 33%), the kernel 8 points more often than from the attacked image; both "
    "half the radius and FGSM lower the kernel's share",
    paper="135 victims on CIFAR-10: attributes recovered far above chance where the attack is the one trained on; "
    "perturbations beat raw adversarial images; worse across attacks and strengths",
    bounds={
        "kernel": ">= 0.65",
        "activation": ">= 0.45",
        "delta_gain": ">= 0.08",
        "half_eps_drop": "> 0",
        "fgsm_drop": "> 0",
    },
    seeds=(0, 1, 2),
    quick_seeds=1,
)


def measure(seed: int, quick: bool) -> dict[str, float]:
    subject = build(DigitsCnn(), Context(seed=seed))  # never trained: the victims are the probe's own
    probe = ModelParsing(images=150, epochs=3, parser_epochs=4) if quick else ModelParsing()
    readings = probe.measure(subject, Context(seed=seed))
    found = {name: r.value for name, r in readings.items() if name != "subject_called_sparse"}
    return {
        "delta_gain": found["kernel"] - found["kernel_raw"],
        "half_eps_drop": found["kernel"] - found["kernel_half_eps"],
        "fgsm_drop": found["kernel"] - found["kernel_fgsm"],
        "new_seed_drop": found["kernel"] - found["kernel_new_seed"],
        **found,
    }
