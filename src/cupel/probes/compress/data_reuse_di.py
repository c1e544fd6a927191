"""Probe `data-reuse-di`: how often the network uses a value once it is read, weights and activations weighed apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from cupel.core.context import Context
from cupel.core.errors import NotApplicable
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Readings, exact
from cupel.core.types import Subject, still
from cupel.ops.reuse import Traffic, layerwise, total, traffic_of

CARD = Card(
    name="data-reuse-di",
    family="compress",
    source="N. K. Jha, S. Mittal, Modeling Data Reuse in Deep Neural Networks by Taking Data-Types into Cognizance, "
    "IEEE Transactions on Computers 70(9), 2021, arXiv 2008.02565",
    tags=("cost", "energy", "data reuse", "arithmetic intensity"),
    readings=("macs", "weights", "activations", "intensity", "layer_intensity", "di", "layer_di"),
)


def layer_rows(layers: Sequence[Traffic], alpha: float) -> list[dict[str, Any]]:
    """One row a layer, in the order they run."""
    return [
        {
            "layer": t.module or "(model)",
            "kind": t.kind,
            "macs": t.macs,
            "weights": t.weights,
            "activations": t.activations,
            "intensity": t.intensity() / 2,
            "di": t.intensity(alpha),
        }
        for t in layers
    ]


def kind_rows(layers: Sequence[Traffic], alpha: float) -> list[dict[str, Any]]:
    """One row a kind of layer: its share of the work, and the intensities of all layers of the kind together."""
    whole, rows = total(layers), []
    for kind in sorted({t.kind for t in layers}):
        t = total([t for t in layers if t.kind == kind])
        share = t.macs / whole.macs
        rows.append({"kind": kind, "macs_share": share, "intensity": t.intensity() / 2, "di": t.intensity(alpha)})
    return rows


@dataclass(frozen=True)
class DataReuseDI:
    r"""Multiply-adds per value that is read or written, with weights and activations counted at different worth.

    Over the layers l of one forward, with M multiply-adds, W weights and A = input + output values:
    AI = sum M / sum (W + A), and DI = sum M / (alpha sum W + (1 - alpha) sum A), which is 2 AI at alpha = 0.5.
    `intensity` and `di` are these sums over the whole network; `layer_intensity` and `layer_di` are the plain means of
    the layers' own values. A batch multiplies M and A and leaves W. The figures hold one row a layer and one row a
    kind: standard, grouped, depthwise and pointwise convolution, linear, attention (both factors are activations),
    recurrent.

    Use: to compare networks, or the same network before and after compression, where no power meter is at hand: less
    work at a lower DI can cost more energy or time a multiply-add. Not to rank networks across machines: alpha belongs
    to a machine. `ops.reuse.fitted_alpha` finds it from measured networks.

    Costs: one recorded forward of one input; nothing is trained or timed.

    Shapes: any inputs the network takes.

    Raises:
        NotApplicable: no test input, or a network without a matrix product that torch shows.

    Source: Jha and Mittal, arXiv 2008.02565: cumulative and layerwise intensity, and the data-type aware one.

    Departs: reconstructed from the description, without the paper's text: that alpha weighs the weights, not the
    activations, is our choice, and the default 0.2 puts the reported best share of about 0.8 on the activations. A
    weight that a module uses several times counts once, and so do values that the unfolding of a convolution repeats.
    Elementwise layers, norms and pooling move values and multiply none: they are left out.

    Example:
        >>> DataReuseDI(alpha=0.5).batch
        1
    """

    alpha: float = param(0.2, "worth of a weight; an activation's is 1 - alpha", ge=0, lt=1)
    batch: int = param(1, "inputs that share one reading of the weights", ge=1)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        model = subject.model
        if not len(subject.data.test):
            raise NotApplicable("data-reuse-di must have a test input to count on; there is none. Give test data.")
        device = next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))
        inputs = next(iter(subject.data.test.batches(1))).to(device).inputs
        with still(model), ctx.scope("forward"):
            found, missing = traffic_of(model, inputs)
        if not found:
            raise NotApplicable(
                "data-reuse-di must see a matrix product of dense values in the network; there is none in what torch "
                "runs. Leave it out."
            )
        layers = [t.on(self.batch) for t in found]
        whole = total(layers)
        notes = [f"alpha {self.alpha:g}, batch {self.batch}"]
        if missing:
            notes.append(f"{missing} multiply-adds with sparse or unknown operands are left out of every count")
        return Readings.of(
            notes=notes,
            macs=exact(whole.macs, "ops", "lower"),
            weights=exact(whole.weights, "params", "lower"),
            activations=exact(whole.activations, "1", "lower"),
            intensity=exact(whole.intensity() / 2, "1", "higher"),
            layer_intensity=exact(layerwise(layers) / 2, "1", "higher"),
            di=exact(whole.intensity(self.alpha), "1", "higher"),
            layer_di=exact(layerwise(layers, self.alpha), "1", "higher"),
            figures={"layers": layer_rows(layers, self.alpha), "kinds": kind_rows(layers, self.alpha)},
        )
