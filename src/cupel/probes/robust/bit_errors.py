"""Probe `bit-errors`: does the network survive random bit flips in the memory that holds its weights?"""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from cupel.core.context import Context
from cupel.core.errors import CupelError, NotApplicable
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, exact, mean_of, share
from cupel.core.types import Batch, Dataset, Examples, Subject, Task, still
from cupel.ops.bit_flips import crossing, fault_positions, flipped, part_of, word_bits
from cupel.ops.labelled import evenly, judged_classes
from cupel.storage.state import fill, state_of

CARD = Card(
    name="bit-errors",
    family="robust",
    source="B. Reagen et al., Ares: A Framework for Quantifying the Resilience of Deep Neural Networks, DAC 2018, "
    "doi 10.1145/3195970.3195997; D. Stutz, N. Chandramoorthy, M. Hein, B. Schiele, Bit Error Robustness for "
    "Energy-Efficient DNN Accelerators, MLSys 2021, arXiv 2006.13977",
    tags=("robustness", "hardware", "fault injection", "bit flip", "soft error", "memory"),
    needs=("classes", "weights"),
    readings=(
        "accuracy_1_in_1e6", "accuracy_1_in_1e5", "accuracy_1_in_1e4", "accuracy_1_in_1e3",
        "rate_one_point", "rate_half", "worst_bit", "worst_bit_accuracy", "stored_bits",
    ),
    ordered={"accuracy_1_in_1e6": "trained"},
    tiny={"draws": 2, "scan": 1, "examples": 24},
)  # fmt: skip

NAMED = {f"accuracy_1_in_1e{k}": 10.0**-k for k in (6, 5, 4, 3)}
RATES = tuple(10.0 ** (k / 2) for k in range(-12, -5))  # half decades from 1e-6 to 1e-3


def stored_words(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of the numbers that a network computes with, each with the name that it is first stored under.

    Floats (running statistics of norms too), the integers of quantised layers, int8 codes, and bytes where a
    module packs its weights into them; no counters, and no file that a module runs as it is.
    """
    packing = tuple(f"{path}." if path else "" for path, m in model.named_modules() if hasattr(m, "packed_state"))
    seen: dict[tuple[object, ...], str] = {}
    found = {}
    for name, x in state.items():
        codes = x.ndim > 0 and (x.dtype == torch.int8 or (x.dtype == torch.uint8 and name.startswith(packing)))
        if x.numel() and x.layout == torch.strided and (x.is_quantized or x.is_floating_point() or codes):
            key = (name,) if x.is_quantized else (x.data_ptr(), x.shape, x.stride(), x.dtype)
            found[name] = seen.setdefault(key, name)
    return found


def right_answers(model: nn.Module, batches: Sequence[Batch], task: Task) -> Tensor:
    """Which answers are right, `[N]` bool; an output with a NaN or an infinity in it is wrong."""
    found = []
    with still(model), torch.no_grad():
        for batch in batches:
            out = model(batch.inputs)
            right = task.predict(out) == batch.targets
            found.append((right & out.isfinite().flatten(1).all(1)).cpu())
    return torch.cat(found)


def joined(hits: Sequence[int], count: int) -> tuple[Reading, Reading]:
    """Mean accuracy over draws of `hits` out of `count`: with the interval of draws alone, and with inputs too."""
    drawn = mean_of([h / count for h in hits], "share", "higher")
    own = share(round(drawn.value * count), count)
    assert drawn.low is not None and drawn.high is not None and own.low is not None and own.high is not None
    down = math.hypot(drawn.value - drawn.low, own.value - own.low)
    up = math.hypot(drawn.high - drawn.value, own.high - own.value)
    both = replace(drawn, low=max(0.0, drawn.value - down), high=min(1.0, drawn.value + up))
    return replace(drawn, low=max(0.0, drawn.low), high=min(1.0, drawn.high)), both


@dataclass(frozen=True)
class _Memory:
    """A copy of the network that is filled with wrong numbers, the right ones, and what it is asked."""

    model: nn.Module
    state: Mapping[str, Tensor]
    names: Mapping[str, str]
    batches: Sequence[Batch]
    task: Task

    def sizes(self) -> dict[str, int]:
        """Stored bits of every tensor; tied ones once."""
        return {n: self.state[n].numel() * word_bits(self.state[n]) for n in dict.fromkeys(self.names.values())}

    def hits(self, faults: Mapping[str, Tensor]) -> int:
        """How many answers are right with the bits at `faults` (tensor name -> positions) turned over."""
        wrong = {name: flipped(self.state[name], at) for name, at in faults.items() if len(at)}
        state = {name: wrong.get(self.names.get(name, ""), x) for name, x in self.state.items()}
        try:
            return int(right_answers(fill(self.model, state), self.batches, self.task).sum())
        except (RuntimeError, ValueError, CupelError):  # kernels that refuse a scale of NaN give no right answer
            return 0


@dataclass(frozen=True)
class BitErrors:
    r"""Turn over random bits of the stored weights at given rates and count the answers that stay right.

    Each stored bit flips by itself with chance p, in float words as in int8 codes. Faults of a lower rate
    are a part of those of a higher one, and they depend on the names and sizes of tensors alone, so
    networks of one form meet the same faults. `accuracy_1_in_1e4` is the mean over draws at p = 1e-4.
    `rate_one_point`: the p at which the mean accuracy is 0.01 under that without faults; `rate_half`: at
    which half is lost of what it has above one over the number of classes. `worst_bit` is the position
    whose flip in one random weight costs most, `worst_bit_accuracy` the mean accuracy after that one flip.

    Shapes: logits `[N, K]`, targets `[N]`.

    Raises:
        NotApplicable: the network stores no numbers, cannot be copied, or does not classify.

    Source: Reagen et al., DAC 2018, for faults in stored weights at a bit error rate; Stutz et al., MLSys
    2021, section 3, for independent flips, nested over rates, as errors of memory at low voltage.

    Departs: float32 words too, as most checkpoints hold them; pruned weights lie as zeros in dense words;
    running statistics of norms are stored numbers like the rest. Inputs and activations are not hit.
    Outputs with a NaN or an infinity count as wrong.

    Example:
        >>> BitErrors(draws=20).examples
        300
    """

    draws: int = param(10, "independent draws of faults", ge=2)
    scan: int = param(4, "random weights in which every bit position is flipped alone", ge=1)
    examples: int = param(300, "test inputs that every faulty network is asked (0: all)", ge=0)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        out, _ = judged_classes(subject, "bit-errors")
        memory = self._memory(subject)
        count = sum(len(b) for b in memory.batches)
        clean = memory.hits({})
        sizes = memory.sizes()
        hits, flips = self._over_rates(memory, sizes, clean, ctx)
        alone, both = zip(*(joined([row[i] for row in hits], count) for i in range(len(RATES))), strict=True)
        bits, sample, scanned = self._over_bits(memory, sizes, ctx)
        worst = min(range(bits), key=lambda b: (sum(scanned[b]), -b))
        chance = 1 / out.shape[1]
        bars = {"rate_one_point": clean / count - 0.01, "rate_half": (clean / count + chance) / 2}
        rates = {name: _rate(alone, bar) for name, bar in bars.items()}
        notes = [
            f"{clean / count:.3f} of {count} inputs right without faults; {sum(sizes.values())} stored bits, "
            f"{flips[0]:.1f} to {flips[-1]:.0f} of them flipped",
            f"worst bit: {worst} of 0 to {bits - 1}, {part_of(worst, sample)}",
            *(f"{n} lies outside the rates tried" for n, r in rates.items() if r.value in (RATES[0], RATES[-1])),
            *(
                ["without faults the accuracy is at chance already: there is little to lose"]
                if clean <= chance * count
                else []
            ),
        ]
        ends = {"accuracy": "value", "95% low": "low", "95% high": "high"}
        curves = {name: [getattr(r, end) for r in both] for name, end in ends.items()}
        per_bit = [sum(found) / len(found) / count for found in scanned]
        figures = {
            "accuracy_by_rate": _over_rates("accuracy", True, curves) | {"clean": clean / count},
            "bits_flipped": _over_rates("bits", False, {"bits flipped": flips}),
            "accuracy_by_bit": {
                "x": "position of the flipped bit, 0 the lowest", "y": "accuracy", "share": True,
                "series": {"accuracy": [list(point) for point in enumerate(per_bit)]},
            },
        }  # fmt: skip
        named = {name: both[RATES.index(rate)] for name, rate in NAMED.items()}
        return Readings.of(
            notes, figures, **named, **rates,
            worst_bit=exact(worst, "bit"),
            worst_bit_accuracy=joined(scanned[worst], count)[1],
            stored_bits=exact(sum(sizes.values()), "bits", "lower"),
        )  # fmt: skip

    def _memory(self, subject: Subject) -> _Memory:
        state = state_of(subject.model)
        names = stored_words(subject.model, state)
        if not names:
            raise NotApplicable(
                "bit-errors must find weights in memory; this network holds none that torch can reach. Give the "
                "network itself in place of a black box."
            )
        try:
            twin = copy.deepcopy(subject.model)
        except (TypeError, RuntimeError, NotImplementedError) as error:
            raise NotApplicable(f"bit-errors must copy the network; that failed: {error}. Leave it out.") from None
        device = next((p.device for p in twin.parameters()), torch.device("cpu"))
        data: Dataset = subject.data.test
        if isinstance(data, Examples):
            data = data.take(evenly(len(data), self.examples))
        return _Memory(twin, state, names, [b.to(device) for b in data.batches(500)], subject.task)

    def _over_rates(
        self, memory: _Memory, sizes: Mapping[str, int], clean: int, ctx: Context
    ) -> tuple[list[list[int]], list[float]]:
        """Right answers of every draw at every rate, and the mean number of flips at every rate."""
        hits, flips = [], [0.0] * len(RATES)
        for k in range(self.draws):
            drawn = {n: fault_positions(bits, RATES[-1], ctx.rng(f"{k}-{n}")) for n, bits in sizes.items()}
            row, last, had = [], clean, 0
            for i, rate in enumerate(RATES):
                faults = {n: at[marks <= rate / RATES[-1]] for n, (at, marks) in drawn.items()}
                now = sum(len(at) for at in faults.values())
                last = memory.hits(faults) if now != had else last  # nested: as many faults are the same faults
                had = now
                row.append(last)
                flips[i] += now / self.draws
            hits.append(row)
        return hits, flips

    def _over_bits(
        self, memory: _Memory, sizes: Mapping[str, int], ctx: Context
    ) -> tuple[int, Tensor, list[list[int]]]:
        """Bits a word of the commonest width, a tensor of it, and right answers by bit and by word hit."""
        words: dict[int, dict[str, int]] = {}
        for name, bits in sizes.items():
            width = word_bits(memory.state[name])
            words.setdefault(width, {})[name] = bits // width
        width = max(words, key=lambda w: sum(words[w].values()))
        names, ends = list(words[width]), list(accumulate(words[width].values()))
        chosen = torch.randint(ends[-1], (self.scan,), generator=ctx.rng("scan")).tolist()
        places = [(names[k], c - (ends[k - 1] if k else 0)) for c in chosen for k in [bisect_right(ends, c)]]
        found = [
            [memory.hits({name: torch.tensor([word * width + bit])}) for name, word in places] for bit in range(width)
        ]
        return width, memory.state[places[0][0]], found


def _over_rates(y: str, share: bool, values: Mapping[str, Sequence[float | None]]) -> dict[str, object]:
    tens = [round(math.log10(rate), 3) for rate in RATES]
    series = {name: [list(point) for point in zip(tens, line, strict=True)] for name, line in values.items()}
    return {"x": "share of bits flipped, as a power of ten", "y": y, "share": share, "series": series}


def _rate(curve: Sequence[Reading], bar: float) -> Reading:
    """The rate at which a curve reaches `bar`, and where the ends of its intervals do."""
    value = crossing(RATES, [r.value for r in curve], bar)
    low, high = (crossing(RATES, [float(getattr(r, side) or 0.0) for r in curve], bar) for side in ("low", "high"))
    return Reading(value, "flips per bit", "higher", curve[0].count, min(low, value), max(high, value))
