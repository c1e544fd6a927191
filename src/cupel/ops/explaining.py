"""What probes of explanations share: which outputs are explained, and what is reported about the maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cupel.core.errors import NotApplicable
from cupel.core.scorecard import Reading, exact, mean_of
from cupel.core.types import Subject
from cupel.ops.attribution import area, gini, ranked_curve
from cupel.ops.corruptions import gaussian_blur
from cupel.ops.labelled import classes_of


@dataclass(frozen=True)
class Scene:
    """Inputs `[B, C, *space]`, the classes `[B]` whose probability is explained, and the two starting points."""

    subject: Subject
    inputs: Tensor
    classes: Tensor
    index: Tensor

    def value(self, x: Tensor, rows: Tensor) -> Tensor:
        """Probability of the explained class, `[R]`."""
        scores = self.subject.task.scores(self.subject.model(x))
        return scores.gather(1, self.classes[rows][:, None]).squeeze(1)

    @property
    def black(self) -> Tensor:
        """Inputs without content: the lower bound, or 0 where inputs have no bounds."""
        return torch.full_like(self.inputs, self.subject.bounds.low if self.subject.bounds else 0.0)

    @property
    def blurred(self) -> Tensor:
        """Inputs without detail: a Gaussian of 11 pixels and sigma 5."""
        return gaussian_blur(self.inputs, 5.0, radius=5)


def scene_of(subject: Subject, count: int, draw: torch.Generator) -> Scene:
    """`count` test inputs drawn by `draw`, each with the class that the model predicts.

    Raises:
        NotApplicable: inputs are no images or series, or no gradient reaches them.
    """
    classes_of(subject.data.test, "attribution")
    batches = list(subject.data.test.batches(500))
    parts = [b.inputs for b in batches]
    if not all(isinstance(x, Tensor) and x.is_floating_point() and x.ndim in (3, 4) for x in parts):
        raise NotApplicable(
            "attribution must have images [N, C, H, W] or series [N, C, T] as inputs; got others. "
            "Leave this probe out for this workload."
        )
    inputs = torch.cat(parts)
    out = subject.outputs("test")
    if out.ndim != 2:
        raise NotApplicable(
            f"attribution must have one score per class, [N, K]; got outputs {tuple(out.shape)}. "
            "Leave this probe out for this workload."
        )
    rows = torch.randperm(len(inputs), generator=draw)[:count].sort().values
    device = next((p.device for p in subject.model.parameters()), torch.device("cpu"))
    classes = subject.task.predict(out)[rows]
    scene = Scene(subject, inputs[rows].to(device), classes.to(device), torch.cat([b.index for b in batches])[rows])
    _need_gradients(scene)
    return scene


def _need_gradients(scene: Scene) -> None:
    trial = scene.inputs[:1].clone().requires_grad_(True)
    try:
        reached = scene.value(trial, torch.zeros(1, dtype=torch.long, device=trial.device)).requires_grad
    except RuntimeError as error:  # some integer kernels refuse inputs that want gradients
        raise NotApplicable(_no_gradients(str(error).split("\n")[0])) from error
    if not reached:
        raise NotApplicable(_no_gradients("the output does not depend on it differentiably"))


def _no_gradients(why: str) -> str:
    return (
        f"the network must pass gradients to its input; this one does not ({why}). Integer kernels have none: "
        "measure the network before it is converted."
    )


def judged(
    scene: Scene, maps: Tensor, gaps: Tensor, passes: int, points: int, draw: torch.Generator
) -> dict[str, Reading]:
    """The readings that every attribution method reports, and what maps of random numbers would get.

    Args:
        scene: what is explained.
        maps: `[B, *space]`.
        gaps: completeness error of each input, `[B]`.
        passes: gradients taken for each input.
        points: steps of the deletion and insertion curves.
        draw: of the random maps.
    """
    chance = torch.rand(maps.shape, generator=draw).to(maps)

    def areas(of: Tensor) -> tuple[Reading, Reading]:
        gone = area(ranked_curve(scene.value, scene.inputs, scene.black, of, points))
        come = area(ranked_curve(scene.value, scene.blurred, scene.inputs, of, points))
        return mean_of(gone.tolist(), "share", "lower"), mean_of(come.tolist(), "share", "higher")

    deletion, insertion = areas(maps)
    deletion_chance, insertion_chance = areas(chance)
    return {
        "deletion_auc": deletion,
        "insertion_auc": insertion,
        "deletion_auc_random": deletion_chance,
        "insertion_auc_random": insertion_chance,
        "completeness_error": mean_of(gaps.tolist(), "1", "lower"),
        "sparsity_gini": mean_of(gini(maps).tolist(), "1", "higher"),
        "passes": exact(passes, "passes", "lower"),
    }


def gallery(scene: Scene, maps: Tensor, most: int = 6, side: int = 32) -> Sequence[Mapping[str, object]]:
    """The first inputs and their maps as plain JSON for the page; large ones are averaged down to `side`."""
    pages = []
    for i in range(min(most, len(maps))):
        picture, heat = scene.inputs[i], maps[i][None]
        shape = [min(n, side) if picture.ndim == 3 else min(n, 8 * side) for n in heat.shape[1:]]
        if list(heat.shape[1:]) != shape:
            picture, heat = (F.interpolate(x[None], shape, mode="area")[0] for x in (picture, heat))
        pages.append(
            {
                "index": int(scene.index[i]),
                "class": int(scene.classes[i]),
                "input": _rounded(picture),
                "map": _rounded(heat[0]),
            }
        )
    return pages


def _rounded(x: Tensor) -> object:
    return (x.detach().cpu().double() * 1e4).round().div(1e4).tolist()
