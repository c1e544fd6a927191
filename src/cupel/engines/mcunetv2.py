"""Engine `mcunetv2`: run the first layers patch by patch in little memory, and search networks together with that."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import PlanError, nearest
from cupel.core.params import check, param
from cupel.core.protocols import Card
from cupel.ops.evolve import Genome, evolve
from cupel.ops.map_memory import Footprint, Plan, chosen, footprint, plan
from cupel.ops.map_numbers import Array, Numbers, codes, floats
from cupel.ops.map_program import Program, program_of
from cupel.ops.map_runs import executed, ranges_of

CARD = Card(
    name="mcunetv2",
    family="compress",
    source="J. Lin, W.-M. Chen, H. Cai, C. Gan, S. Han, MCUNetV2: Memory-Efficient Patch-based Inference for Tiny Deep "
    "Learning, NeurIPS 2021, arXiv 2110.15352, section 3",
    tags=("memory", "microcontroller", "int8", "architecture search"),
    needs=("weights", "images"),
    tiny={"patches": 2},
)
TRUST = 1e-3  # distance from torch's own outputs, relative to their size, beyond which a recording is not believed


@dataclass(frozen=True)
class PatchJob:
    """A trained network to run in little memory.

    Args:
        model: maps `[N, C, H, W]` to one tensor; not changed.
        images: `[N, C, H, W]` on the CPU; all of them set the ranges of int8, and all are run.
        split: module whose output is put together from patches; empty for the cut, and the count of patches up to
            the engine's, that need the least memory.
    """

    model: nn.Module
    images: Tensor
    split: str = ""


@dataclass(frozen=True)
class PatchTrace:
    """What both ways of running did.

    Args:
        split: module at the cut; empty if whole maps need the least memory.
        patches: a side.
        outputs: `[N, ...]`, of the patches.
        gap: largest distance between the outputs of both ways; 0 in int8 means the same integers.
        model_gap: largest distance of the plain outputs from torch's in float32.
        memory, plain_memory: by the model, in bytes.
        traced_bytes, plain_traced_bytes: most memory that NumPy really held, what it works results out with included.
        macs, plain_macs: multiply-adds that were carried out for one image, halos and all.
    """

    split: str
    patches: int
    outputs: Tensor
    gap: float
    model_gap: float
    memory: Footprint
    plain_memory: Footprint
    traced_bytes: int
    plain_traced_bytes: int
    macs: int
    plain_macs: int


@dataclass(frozen=True)
class SearchJob:
    """Networks to choose from, and what the best may need.

    Args:
        choices: values of every gene: kernels, expansions, depths, widths, resolution, whatever `build` reads.
        build: genome -> network and the shape `(C, H, W)` of its images.
        peak_bytes, flash_bytes, macs: most memory for activations, for weights, most multiply-adds with halos.
        score: genome and network -> how good, higher is better; by default the logarithm of the plain multiply-adds.
        population, generations: of the search.
    """

    choices: Mapping[str, Sequence[object]]
    build: Callable[[Genome], tuple[nn.Module, tuple[int, int, int]]]
    peak_bytes: float = math.inf
    flash_bytes: float = math.inf
    macs: float = math.inf
    score: Callable[[Genome, nn.Module], float] | None = None
    population: int = 16
    generations: int = 8


@dataclass(frozen=True)
class SearchTrace:
    """The best network that fits, with its schedule; `best` is `None` if none of the `tried` fits."""

    best: Genome | None
    score: float
    split: str
    patches: int
    memory: Footprint | None
    flash_bytes: int
    history: tuple[float, ...] = ()
    tried: int = 0
    allowed: int = 0


@dataclass(frozen=True)
class MCUNetV2:
    r"""Compute a large early map in parts, each from the part of the image it depends on, and get the same output.

    An output box [lo, hi) of a layer with kernel k, stride s, padding a needs the inputs [lo s - a, (hi-1) s - a + k),
    cut to the real map: only true borders are padded. Boxes go back from each of p x p tiles of the cut to the image,
    a shortcut's with the widest of its readers. Peak of the patches: the cut's whole map, and the most a tile holds;
    peak of all: the larger of that and of the later layers on whole maps. A tile's halo is computed again by its
    neighbours: the extra multiply-adds are counted while they run. A depthwise convolution overwrites its input with
    one channel beside it, and a sum its shortcut. A `SearchJob` looks for a network and its schedule together: every
    candidate is judged with the cut and the p that fit `peak_bytes` with the least work.

    Use: for convolutional networks whose first maps do not fit a device's memory. Not where the early kernels are
    large or the maps already small: halos then cost more than they save.

    Costs: nothing in accuracy, 3 to 30% more multiply-adds; weights stay in flash. The executor itself is NumPy, for
    proof and for counting, and far slower than torch.

    Shapes: images `[N, C, H, W]`; outputs as the model's.

    Raises:
        PlanError: a split that is no cut (a shortcut passes it by); a network that cannot be recorded.

    Source: Lin, Chen, Cai, Gan, Han, NeurIPS 2021, arXiv 2110.15352; `nets.mobilenet.redistributed` is its other half.

    Departs: candidates of the search are judged by a score the job brings, not by a once-for-all network; the schedule
    is not a gene but solved exactly for each. Tiles at a border have no halo beyond it and count as they are. The
    channel beside a depthwise convolution is counted while a shortcut is alive: MobileNetV2 at 224 takes 176,400 bytes
    where the paper's model says 175,616. No halos are cached.

    Example:
        >>> from cupel.nets.convnet import small
        >>> job = PatchJob(small(), torch.zeros(1, 1, 16, 16), split="block3")
        >>> trace = MCUNetV2(patches=2, numbers="float32").run(job, Context())
        >>> trace.patches, round(trace.memory.overhead, 2), trace.gap < 1e-5
        (2, 0.26, True)
    """

    patches: int = param(4, "patches a side, at most where the engine chooses", ge=1, le=64)
    numbers: str = param("int8", "how maps are held", choices=("int8", "float32"))
    resident: bool = param(False, "keep the whole image in memory, instead of reading each patch's crop when it begins")

    def run(self, job: PatchJob | SearchJob, ctx: Context) -> PatchTrace | SearchTrace:
        """Run a `PatchJob` both ways, or search with a `SearchJob`."""
        check(self)
        return self._search(job, ctx) if isinstance(job, SearchJob) else self._run(job)

    def _run(self, job: PatchJob) -> PatchTrace:
        model = copy.deepcopy(job.model).cpu().eval()
        program = recorded(model, job.images[:1])
        whole, (tiled, memory, patches) = plan(program), self._planned(program, job.split)
        images = [image.numpy() for image in job.images.float()]
        numbers, model_gap = self._numbers(program, model, images)
        ours, theirs = executed(numbers, tiled, images), executed(numbers, whole, images)
        return PatchTrace(
            program.kernels[tiled.cut - 1].module if tiled.cut else "",
            patches if tiled.cut else 1,
            torch.from_numpy(np.stack(ours.results)).float().view(len(images), *program.whole[program.output][1:]),
            max(float(abs(a - b).max()) for a, b in zip(ours.results, theirs.results, strict=True)),
            model_gap,
            memory.times(self._each),
            footprint(program, whole).times(self._each),
            ours.most,
            theirs.most,
            ours.macs,
            theirs.macs,
        )

    @property
    def _each(self) -> int:
        return 1 if self.numbers == "int8" else 4

    def _planned(self, program: Program, split: str) -> tuple[Plan, Footprint, int]:
        cuts = program.cuts()
        if not split:
            return chosen(program, self.patches, cuts, resident=self.resident)
        ends = {program.kernels[c - 1].module: c for c in cuts}
        inside = [c for name, c in ends.items() if name == split or name.startswith(f"{split}.")]
        if not inside:
            raise PlanError(
                f"split must be a module whose output is the only map alive; got {split!r}.{nearest(split, ends)} "
                f"Take one of {', '.join(ends) or 'none: this network cannot be cut'}."
            )
        made = plan(program, max(inside), self.patches)
        return made, footprint(program, made, self.resident), self.patches

    def _numbers(self, program: Program, model: nn.Module, images: Sequence[Array]) -> tuple[Numbers, float]:
        """The program in the format asked for, and how far its plain float32 outputs are from the network's own."""
        plain = floats(program)
        ranges, results = ranges_of(plain, images)
        gap, size = 0.0, 1e-12
        for image, result in zip(images, results, strict=True):
            with torch.no_grad():
                want = model(torch.from_numpy(image)[None]).flatten().numpy()
            gap, size = max(gap, float(abs(result - want).max())), max(size, float(abs(want).max()))
        if not gap <= TRUST * size:
            raise PlanError(
                f"a recorded network must give the network's own outputs; it is {gap:.2g} away (largest {size:.2g}). "
                "Remove what depends on the input's values or on chance from its forward."
            )
        return (plain if self.numbers == "float32" else codes(program, ranges)), gap

    def _search(self, job: SearchJob, ctx: Context) -> SearchTrace:
        fits: dict[str, tuple[str, int, Footprint, int]] = {}

        def judge(genome: Genome) -> float | None:
            with ctx.scope("build"):
                model, shape = job.build(genome)
            program = recorded(model.eval(), torch.zeros(1, *shape))
            flash = sum(k.weight.numel() + 4 * len(k.weight) for k in program.kernels if k.weight is not None)
            limit = job.peak_bytes / self._each
            made, memory, patches = chosen(program, self.patches, program.cuts(), limit, self.resident)
            memory = memory.times(self._each)
            if memory.peak > job.peak_bytes or flash > job.flash_bytes or memory.macs > job.macs:
                return None
            split = program.kernels[made.cut - 1].module if made.cut else ""
            fits[repr(genome)] = (split, patches, memory, flash)
            return math.log(memory.plain_macs) if job.score is None else job.score(genome, model)

        found = evolve(job.choices, judge, ctx.rng("search"), job.population, job.generations)
        cut, patches, memory, flash = fits.get(repr(found.best), ("", 0, None, 0))
        told = found.history, found.tried, found.allowed
        return SearchTrace(found.best, found.score, cut, patches, memory, flash, *told)


def recorded(model: nn.Module, image: Tensor) -> Program:
    """The network's program; a network that cannot be recorded is refused."""
    try:
        return program_of(model, image)
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise PlanError(
            f"a network for mcunetv2 must map images [1, C, H, W] to one tensor; recording it failed: {error}. "
            "Give images of the shape it takes, or another network."
        ) from None
