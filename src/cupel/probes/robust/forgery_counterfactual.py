"""Probe `forgery-counterfactual`: what must vanish from a forgery until the detector calls it real?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.descend import sign_move
from cupel.core.errors import NotApplicable
from cupel.core.fit import fit
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, mean_of, share
from cupel.core.types import Bounds, Budget, Examples, Subject, still
from cupel.nets.resnet8 import ResNet8
from cupel.nets.spectral import SpectralMlp
from cupel.ops.forgeries import FAKE, PARTS, REAL, Attacked, Scene, flat, scene_of, transferred
from cupel.ops.frechet import frechet
from cupel.ops.labelled import evenly, judged_classes, labelled_inputs
from cupel.ops.latent import LatentNet, Reconstruction, Rivalry
from cupel.ops.latent_walks import removing, walk

CARD = Card(
    name="forgery-counterfactual",
    family="robust",
    source="Y. Li, S. Yang, W. Wang, Z. He, B. Peng, J. Dong, Counterfactual Explanations for Face Forgery Detection "
    "via Adversarial Removal of Artifacts, ICME 2024, arXiv 2404.08341",
    tags=("forgery", "fake detection", "counterfactual", "explanation", "latent attack", "transfer"),
    needs=("classes", "images", "bounded", "gradients", "forgeries"),
    readings=(
        "latent_success", "latent_transfer", "pixel_success", "pixel_transfer", "inversion_real", "coarse_success",
        "middle_success", "fine_success", "latent_frechet", "pixel_frechet", "trace", "fakes_caught",
    ),
    tiny={"latent": 6, "width": 16, "epochs": 2, "steps": 8, "examples": 16},
)  # fmt: skip
KINDS = ("latent", *PARTS, "pixel")


@dataclass(frozen=True)
class ForgeryCounterfactual:
    r"""Move the latent code of each forgery until the detector says "real", and compare with moving its pixels.

    An adversarial autoencoder learns the real training images; its decoder G is then adapted to forgeries, with
    the encoder E frozen. w_0 is E(x), refined by descent on |G(w) - x|^2. From there w <- w - alpha
    sign(grad P_fake(G(w))^2), until P_real - P_fake > kappa.
    The counterfactual is G(w), its trace |G(w) - G(w_0)|: the inversion's error is not shown as an artefact. A code
    has coarse, middle and fine entries, which enter G at its three layers; `coarse_success` and
    its like move one kind alone. The peer moves pixels by the same rule to the same kappa.

    Only forgeries that the detector catches, and still catches as G(w_0), count in `..._success`;
    `inversion_real` is the share that G(w_0) alone turns real. `..._transfer`: share that detectors of other
    shapes call real, among those attacked with success that they call fake both before and as G(w_0).
    `..._frechet`: Frechet distance of the pixels to those of the real test images.

    Use: to see what a detector of forgeries looks at, and whether others look at the same. Not for other classifiers.

    Costs: training an autoencoder and two further detectors, and up to `steps` gradients for each of five attacks.

    Shapes: inputs `[N, C, H, W]` within the bounds, class 1 forged; outputs `[N, 2]`.

    Raises:
        NotApplicable: outputs are not two scores, or there are no forgeries to train or to test on.

    Source: Li, Yang, Wang, He, Peng, Dong, ICME 2024, arXiv 2404.08341.

    Departs: an autoencoder of perceptrons in place of StyleGAN2 and e4e, with three layers in place of 18; codes are
    refined after encoding; the adaptation lowers the squared error alone; no SSIM and LPIPS. Success is judged on
    images rounded to 8 bits.

    Example:
        >>> ForgeryCounterfactual(kappa=0.5).latent
        32
    """

    latent: int = param(32, "entries of a code", ge=3)
    width: int = param(128, "hidden units of the autoencoder", ge=1)
    epochs: int = param(60, "passes in which autoencoder and adaptation are trained", ge=1)
    alpha: float = param(0.02, "step in the code, whose entries have standard deviation 1", gt=0)
    pixel_alpha: float = param(0.004, "step of the peer in pixels, in shares of the range", gt=0)
    radius: float = param(0.0, "how far an entry of the code may move (0: anywhere)", ge=0)
    kappa: float = param(0.2, "margin P_real - P_fake at which a forgery is left", ge=0, lt=1)
    steps: int = param(300, "most steps of an attack", ge=1)
    examples: int = param(200, "test forgeries that are attacked (0: all)", ge=0)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        scene, witnesses = self.staged(subject, ctx)
        return self.judged(scene, {kind: self.attacked(scene, kind) for kind in KINDS}, witnesses)

    def staged(self, subject: Subject, ctx: Context) -> tuple[Scene, list[nn.Module]]:
        """The detector with its forgeries and the generator that inverts them, and the detectors of other shapes."""
        out, y = judged_classes(subject, "forgery-counterfactual")
        x, _ = labelled_inputs(subject, "forgery-counterfactual")
        parts = list(subject.data.train.batches(500))
        if not parts:
            raise NotApplicable("forgery-counterfactual must have training images; there are none. Give them.")
        seen = Examples(*(torch.cat([getattr(b, k) for b in parts]) for k in ("inputs", "targets", "index")))
        if out.shape[1] != 2 or min(int((t == k).sum()) for t in (y, seen.targets) for k in (REAL, FAKE)) < 2:
            raise NotApplicable(
                "forgery-counterfactual must have a detector of two classes, 0 real and 1 forged, and images of both; "
                f"got {out.shape[1]} classes. Use it on a workload of forgeries."
            )
        fakes = x[y == FAKE]
        fakes = fakes[evenly(len(fakes), self.examples)].to(ctx.device)
        with still(subject.model) as model:
            net = self._generator(subject.bounds or Bounds(), seen, ctx)
            scene = scene_of(model, net, subject.bounds or Bounds(), fakes, x[y == REAL])
        return scene, [self._witness(net, subject, seen, ctx) for net in ("spectral", "residual")]

    def _witness(self, kind: str, subject: Subject, seen: Examples, ctx: Context) -> nn.Module:
        """A detector of another shape, trained as long as the subject would be by default."""
        shape = tuple(seen.inputs.shape[1:])
        with ctx.scope(kind):
            net: nn.Module = SpectralMlp(shape, (128, 64), 2) if kind == "spectral" else ResNet8(shape[0], 2, 8)
        seed = int(torch.randint(2**31, (1,), generator=ctx.rng(kind)))
        return fit(net, seen, subject.task, budget=subject.budget, seed=seed, device=ctx.device)

    def _generator(self, bounds: Bounds, seen: Examples, ctx: Context) -> LatentNet:
        """Learn the real images, then adapt the decoder to forgeries."""
        with ctx.scope("autoencoder"):
            net = LatentNet(seen.inputs[0].numel(), self.width, self.latent, dropout=0.0, layered=True)
        data = Examples(flat(seen.inputs, bounds), torch.zeros(len(seen), 1, dtype=torch.long), seen.index)
        budget = Budget(epochs=self.epochs, batch_size=64, optimizer="adam", lr=2e-3, schedule="cosine")
        seeds = torch.randint(2**31, (2,), generator=ctx.rng("autoencoder")).tolist()
        task, rivalry = Reconstruction(self.latent), Rivalry(torch.zeros(1, self.latent), 2e-4)
        fit(net, data.take(seen.targets == REAL), task, techniques=[rivalry], budget=budget, seed=seeds[0])
        net.encoder.requires_grad_(False)
        fit(net, data, task, budget=budget, seed=seeds[1])
        return net.to(ctx.device).requires_grad_(False)

    def attacked(self, scene: Scene, kind: str) -> Attacked:
        """One kind of attack: codes moved as a whole (`latent`) or in one part, or pixels moved by the same rule."""
        low, high = scene.bounds.low, scene.bounds.high
        with still(scene.model):
            if kind == "pixel":
                goal = removing(scene.model, lambda x: x.clamp(low, high), self.kappa)
                step = sign_move(self.pixel_alpha * (high - low))
                moved = walk(scene.fakes, goal, self.steps, step, 0.0, None).clamp(low, high)
            else:
                goal = removing(scene.model, scene.make, self.kappa)
                free = scene.free(kind)
                moved = scene.make(walk(scene.codes, goal, self.steps, sign_move(self.alpha), self.radius, free))
            return Attacked(moved, scene.says_real(moved))

    def judged(self, scene: Scene, found: dict[str, Attacked], witnesses: list[nn.Module]) -> Readings:
        """What the attacks did, to the detector and to others."""
        turned = scene.says_real(scene.inverted)  # by the inversion alone
        held = ~turned
        n = int(held.sum())
        made: dict[str, Reading] = {}
        for name, attack in found.items():
            made[f"{name}_success"] = _share(int((attack.real & held).sum()), n)
        for name in ("latent", "pixel"):
            won, votes = found[name].real & held, transferred(scene, found[name], witnesses)
            made[f"{name}_transfer"] = _share(int(votes.sum()), len(votes))
            far = (
                frechet(found[name].images[won].flatten(1).cpu(), scene.real.flatten(1)) if int(won.sum()) > 1 else 0.0
            )
            made[f"{name}_frechet"] = Reading(far, "1", "higher", int(won.sum()), far, far)
        trace = (found["latent"].images - scene.inverted).abs()
        sizes = trace.flatten(1).mean(1)[found["latent"].real & held].tolist()
        made["trace"] = mean_of(sizes, "1", "higher") if sizes else Reading(0.0, "1", "higher", 0, 0.0, 0.0)
        made["inversion_real"] = _share(int(turned.sum()), len(turned))
        made["fakes_caught"] = share(len(scene.fakes), scene.count)
        notes = [
            f"code steps {self.alpha:g}, pixel steps {self.pixel_alpha:g} of the range, at most {self.steps}, to "
            f"margin {self.kappa:g}, 1 start, no bound on the pixels; {n} forgeries are still caught when inverted",
            "transfer to a perceptron on cosine coefficients and a residual network, trained on the same data",
        ]
        shown = _gallery(scene, found, trace, held)
        return Readings({name: made[name] for name in CARD.readings}, tuple(notes), {"counterfactuals": shown})


def _share(hits: int, count: int) -> Reading:
    """Successes of an attack: lower is better for the detector; nothing to attack is no success."""
    return share(hits, count, "lower") if count else Reading(0.0, "share", "lower", 0, 0.0, 1.0)


def _gallery(scene: Scene, found: dict[str, Attacked], trace: Tensor, held: Tensor) -> list[dict[str, object]]:
    """Up to six forgeries, as they are, inverted, and called real; and what was changed."""
    rows = (found["latent"].real & held).nonzero().flatten().tolist()
    rows = rows[:: max(1, len(rows) // 6)][:6] if scene.fakes[:1].numel() <= 4096 else []

    def grid(image: Tensor) -> object:
        return ((image.double().cpu() * 1e3).round() / 1e3).tolist()

    return [
        {"forgery": grid(scene.fakes[r]), "inverted": grid(scene.inverted[r]),
         "counterfactual": grid(found["latent"].images[r]), "trace": grid(trace[r]),
         "by_pixels": grid(found["pixel"].images[r])}
        for r in rows
    ]  # fmt: skip
