"""Claim of `ambiguess`: supervisors that notice true ambiguity are not those that notice invalid inputs best."""

from __future__ import annotations

from cupel.core.steps import FitStep
from cupel.probes.robust.ambiguess import Ambiguess
from cupel.runner.bench import prepare
from cupel.runner.claims import Claim
from cupel.workloads.vision.digits_cnn import DigitsCnn

CLAIM = Claim(
    method="ambiguess",
    statement="On digits, six pairs of classes, 60 images each: autoencoder error and MDSA tell invalid inputs with an "
    "AUROC of at least 0.98 and ambiguous ones with at most 0.65; max softmax and the entropy of a five-network ensemble "
    "tell ambiguous ones with at least 0.75; the orders of the supervisors on both kinds agree no better than chance "
    "(Kendall's tau at most 0)",
    paper="MNIST and Fashion-MNIST: no supervisor wins on every kind of hard input; softmax scores and ensembles notice "
    "true ambiguity and are weaker on invalid and adversarial inputs, surprise adequacy and autoencoders the reverse",
    bounds={
        "autoencoder_invalid": ">= 0.98",
        "mdsa_invalid": ">= 0.98",
        "autoencoder_ambiguous": "<= 0.65",
        "mdsa_ambiguous": "<= 0.65",
        "max_softmax_ambiguous": ">= 0.75",
        "ensemble_entropy_ambiguous": ">= 0.75",
        "rank_tau": "<= 0",
    },
    explains="Only the bound on MDSA for ambiguous inputs is missed: 0.73 (0.70 to 0.78 over seeds) where the sheet's prototype had 0.57. Ours takes a class's mean and shrunk covariance before the last layer; that images between two classes lie outside both there is the likely reason, not tested. MDSA is still below softmax (0.88) and the ensemble (0.88), and tau is negative in every seed",
)
PAIRS = ("3-8", "4-9", "1-7", "5-9", "2-3", "0-6")


def measure(seed: int, quick: bool) -> dict[str, float]:
    steps = [FitStep({"epochs": 6} if quick else {})]
    subject, ctx = prepare(DigitsCnn(width=8 if quick else 16), steps, seed)
    probe = Ambiguess(pairs=PAIRS[:3], epochs=100, tries=1, networks=1) if quick else Ambiguess(pairs=PAIRS)
    found = probe.measure(subject, ctx.child("probe-ambiguess"))
    table = found.figures["auroc"]
    adaptive = {f"{name}_adaptive": row["adaptive"] for name, row in table.items() if "adaptive" in row}
    rest = {f"{name}_{kind}": value for name, row in table.items() for kind, value in row.items() if kind != "adaptive"}
    counts = {f"inputs_{kind}": float(found[f"mdsa_{kind}"].count) for kind in ("adaptive", "adversarial", "ambiguous")}
    return {
        **adaptive,
        **rest,
        **counts,
        **{name: found[name].value for name in ("rank_tau", "pairs_accepted", "in_pair")},
        "accuracy": float((subject.outputs().argmax(1) == subject.data.test.targets).double().mean()),
    }
