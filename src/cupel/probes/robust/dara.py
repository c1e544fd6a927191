"""Probe `dara`: is the network what its name says? Family, size and number format against what is inside."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from cupel.core.context import Context, derive, global_seed
from cupel.core.errors import NotApplicable
from cupel.core.fit import fit
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.scorecard import Reading, Readings, exact
from cupel.core.tasks import Classification
from cupel.core.types import Budget, Examples, Subject, still
from cupel.ops.graph_reader import read_graph, vector
from cupel.storage.state import state_of

CARD = Card(
    name="dara",
    family="robust",
    source="W. Jiang, M. Kim, C. Cheung, H. Kim, G. K. Thiruvathukal, J. C. Davis, Naming Practices of Pre-Trained "
    "Models in Hugging Face, 2023, arXiv 2310.01642, section on detecting naming anomalies (DARA)",
    tags=("naming", "supply chain", "architecture", "anomaly", "audit"),
    readings=("margin", "confidence", "known_tokens", "anomalies", "parameters"),
    tiny={"name": "resnet"},
)

# Words in names that stand for one of the families of `ops/architectures.json`.
_ALIASES = {
    "mlp": "mlp", "dnn": "mlp", "vgg": "vgg", "resnet": "resnet", "resnext": "resnet", "wideresnet": "resnet",
    "densenet": "densenet", "mobilenet": "mobilenet", "separable": "separable", "squeezenet": "squeezenet",
    "inception": "inception", "googlenet": "inception", "vit": "vit", "deit": "vit", "mixer": "mixer",
    "dscnn": "ds-cnn", "lstm": "lstm", "gru": "gru", "fcn": "fcn",
}  # fmt: skip
_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}
_KINDS = {  # what a name may claim: its words, what must be so, and how that is said
    "int8": ("int8", "w8", "8bit", "quantized", "quantised", "ptq", "qat"),
    "float16": ("fp16", "f16", "float16", "half"),
    "bfloat16": ("bf16", "bfloat16"),
    "sparse": ("pruned", "sparse", "prune", "sparsity"),
}


@dataclass(frozen=True)
class Inside:
    """What is found in a network: parameters, share of zeros in its matrices, kinds of stored numbers."""

    parameters: int
    zeros: float
    kinds: frozenset[str]


def inside(model: nn.Module) -> Inside:
    """Counts over what a file of the network would hold."""
    held = [t for t in state_of(model).values() if isinstance(t, Tensor)]
    kinds = {"int8" if t.is_quantized or t.dtype in (torch.int8, torch.uint8) else str(t.dtype)[6:] for t in held}
    weights = [t.int_repr() if t.is_quantized else t for t in held if t.ndim > 1]
    # A zero point of quantised weights is 0 where their scales are symmetric.
    count = sum(w.numel() for w in weights)
    zeros = sum(int((w == 0).sum()) for w in weights) / count if count else 0.0
    numbers = sum(p.numel() for p in model.parameters()) or sum(t.numel() for t in held)
    return Inside(numbers, zeros, frozenset(kinds | ({"sparse"} if zeros >= 0.3 else set())))


def words_of(name: str) -> tuple[str, ...]:
    """Pieces of a name in small letters: letters, numbers, numbers with a unit, and pairs of neighbours.

    >>> words_of("ResNet18_int8-7b")
    ('res', 'net', '18', 'int', '8', '7b', 'resnet', 'net18', '18int', 'int8', '87b')
    """
    parts = re.findall(r"\d+(?:\.\d+)?[kmbKMB](?![A-Za-z0-9])|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    plain = [p.lower() for p in parts]
    return (*plain, *(a + b for a, b in pairwise(plain)))


def named_family(name: str) -> str:
    """The family that a name speaks of, or nothing.

    >>> named_family("my_resnet18.pt2"), named_family("MobileNetV2"), named_family("ds-cnn-s"), named_family("net")
    ('resnet', 'mobilenet', 'ds-cnn', '')
    """
    found = [_ALIASES[w] for w in words_of(name) if w in _ALIASES]
    return found[0] if found else ""


def broken_rules(name: str, it: Inside) -> list[str]:
    """What a name says of size, number format and sparsity, or fails to say, against what is inside."""
    words, found = set(words_of(name)), []
    for size, unit in re.findall(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([kmb])(?![a-z0-9])", name.lower()):
        claimed = float(size) * _UNITS[unit]
        if not 1 / 1.5 <= it.parameters / claimed <= 1.5:
            found.append(f"the name says {size}{unit} parameters; it has {it.parameters:,}")
    for kind, told in _KINDS.items():
        says, is_ = bool(words & set(told)), kind in it.kinds
        if says and not is_ and not (kind == "sparse" and it.zeros >= 0.05):
            found.append(
                f"the name says {kind}; inside are {', '.join(sorted(it.kinds))}, {it.zeros:.0%} of weights zero"
            )
        if is_ and not says and kind in ("int8", "sparse"):
            what = f"{it.zeros:.0%} of its weights are zero" if kind == "sparse" else "it holds 8-bit integers"
            found.append(f"the name is that of a dense float network; {what}")
    return found


@dataclass(frozen=True)
class Judge:
    """A classifier of token counts into families."""

    words: tuple[str, ...]
    labels: tuple[str, ...]
    net: nn.Module

    def probabilities(self, tokens: Mapping[str, int]) -> dict[str, float]:
        with still(self.net), torch.no_grad():
            p = self.net(vector(tokens, self.words)[None]).softmax(1)[0]
        return dict(zip(self.labels, p.tolist(), strict=True))


def learned(rows: Sequence[tuple[str, Mapping[str, int]]], *, seed: int = 0, epochs: int = 40, least: int = 2) -> Judge:
    """A classifier of `(label, token counts)`; words of fewer than `least` networks are left out."""
    words = sorted({w for _, tokens in rows for w in tokens})
    kept = tuple(w for w in words if sum(w in tokens for _, tokens in rows) >= least)
    labels = tuple(dict.fromkeys(label for label, _ in rows))
    x = torch.stack([vector(tokens, kept) for _, tokens in rows])
    y = torch.tensor([labels.index(label) for label, _ in rows])
    with global_seed(derive(seed, "dara")):
        net = nn.Sequential(
            nn.Linear(len(kept), 128), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, len(labels)),
        )  # fmt: skip
    budget = Budget(epochs=epochs, batch_size=64, optimizer="adam", lr=3e-3, schedule="cosine")
    data = Examples(x, y, torch.arange(len(y)))
    return Judge(kept, labels, fit(net, data, Classification(len(labels)), budget=budget, seed=seed).eval())


def corpus() -> list[tuple[str, str, int, dict[str, int]]]:
    """Family, variant, parameters and token counts of the bundled table (see `cupel.nets.families`)."""
    path = Path(__file__).parents[2] / "ops" / "architectures.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    words = table["words"]
    return [(family, name, size, {words[k]: n for k, n in counts}) for family, name, size, counts in table["networks"]]


@lru_cache(maxsize=1)
def bundled() -> Judge:
    """The classifier of the bundled table of networks, learned once in a process."""
    return learned([(family, tokens) for family, _, _, tokens in corpus()])


@dataclass(frozen=True)
class Dara:
    r"""Read the family of a network off its graph and hold it against the name.

    Three counts describe one traced forward: pairs of operations along its edges, operations with their
    settings, sizes in shapes. log(1 + count) of the words known from a corpus of networks with random
    weights goes through a classifier; `margin` is P(most likely family) - P(named family), 0 where they
    agree or the name speaks of no family. Rules hold the name's words against the stored numbers:
    parameters ("7b"), format ("int8", "fp16"), zeros ("pruned"), and compression that it keeps silent about.
    `anomalies` counts broken rules, and one for a margin above `threshold`.

    Use: for model files from elsewhere, and to find compressed copies that carry the original's name. It says what
    kind of network is inside, not whether its weights are good.

    Costs: one forward of two examples, and about a second for the classifier, once in a process.

    Shapes: inputs as the network takes them.

    Raises:
        NotApplicable: no test inputs, or a network that runs outside torch (ONNX) and shows no operations.

    Source: Jiang et al. 2023, arXiv 2310.01642; features: pairs, settings and dimensions as in its released code.

    Departs: operations of torch's dispatcher in place of layers, so that files and functional code read
    alike; a corpus of small networks of 14 families made here in place of downloaded ones; hidden layers
    of 128 and 64 in place of 512, 256 and 128, since the corpus has hundreds of networks and not thousands;
    families that the corpus does not know (`known_tokens` below `known`) are left unjudged; the rule on
    compression that a name hides is ours.

    Example:
        >>> Dara(name="resnet18-int8").threshold
        0.5
    """

    name: str = param("", "the network's name (empty: the name of its class)")
    threshold: float = param(0.5, "margin from which the family is an anomaly", ge=0, le=1)
    known: float = param(0.6, "least share of its operations that the corpus must know", ge=0, le=1)

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        name, it, judge = self.name or type(subject.model).__name__, inside(subject.model), bundled()
        batch = next(iter(subject.data.test.batches(2)), None)
        if batch is None:
            raise NotApplicable("dara must have test inputs to trace the network on; there are none. Give test data.")
        tokens = read_graph(subject.model, batch.to(ctx.device).inputs).tokens()
        made = {w: n for w, n in tokens.items() if not w.startswith("d") or not w[1:].isdigit()}
        if not made:
            raise NotApplicable("dara must see the network's operations; it shows none to torch. Bring it as .pt2.")
        share = sum(n for w, n in made.items() if w in set(judge.words)) / sum(made.values())
        odds, family = judge.probabilities(tokens), named_family(name)
        best = max(odds, key=lambda f: odds[f])
        judged = bool(family) and share >= self.known
        margin = odds[best] - odds[family] if judged else 0.0
        found = broken_rules(name, it)
        if margin > self.threshold:
            found.insert(0, f"the name says {family}; its graph is that of {best} (margin {margin:.2f})")
        notes = [f"name {name!r}: {text}" for text in found]
        notes += [f"family {family or 'not named'} by its name, {best} by its graph ({odds[best]:.2f})"]
        if share < self.known:
            notes.append(f"its graph is unlike all {len(odds)} known families ({share:.0%} known), so it is not judged")
        likely = sorted(odds.items(), key=lambda pair: -pair[1])[:5]
        return Readings.of(
            notes,
            {"families": {f: round(p, 4) for f, p in likely}},
            margin=Reading(margin, "1", "lower", 1, margin, margin),
            confidence=exact(odds[best], "1"),
            known_tokens=exact(share, "1"),
            anomalies=exact(len(found), "anomalies", "lower"),
            parameters=exact(it.parameters, "params"),
        )
