"""caa: balls inside balls, chains against hand-made ones, NSGA-II against its definition, damage in closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from operator import le

import pytest
import torch
from torch import Tensor, nn

from cupel.core.context import Context, seeded
from cupel.core.errors import NotApplicable, ParamError
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.core.types import Bounds, Subject, still
from cupel.ops.attackers import GRADIENT, PEOPLE, SKIP, Space, ensemble, link, read, singles, written
from cupel.ops.composite import Composite, Link, Nested, spent
from cupel.ops.image_damage import DAMAGES, damaged
from cupel.ops.nsga2 import Genome, crowding, nsga2, ranks
from cupel.ops.odi import SCHEDULES, diversified, odi
from cupel.ops.projections import size_of
from cupel.ops.threats import Model, Tally, Threat, attacked
from cupel.probes.robust.caa import CAA
from cupel.workloads.vision.digits_mlp import DigitsMlp

torch.set_num_threads(1)
WIDE = Bounds(-9.0, 9.0)


@lru_cache(maxsize=1)
def trained() -> Subject:
    subject = build(DigitsMlp(hidden=(32,), examples=300), Context(seed=0))
    budget = replace(subject.budget, epochs=40, lr=5e-3)
    return subject.with_model(fit(subject.model, subject.data, subject.task, budget=budget, seed=0))


class Push:
    """Moves every input by `by`, whatever the ball; remembers what it was given."""

    def __init__(self, by: float) -> None:
        self.by, self.seen = by, []  # type: ignore[var-annotated]

    def __call__(
        self, model: Model, x: Tensor, y: Tensor, threat: Threat, draw: torch.Generator, *, tally: Tally | None = None
    ) -> Tensor:
        self.seen.append((x.clone(), threat.eps))
        if tally is not None:
            tally.gradients += threat.steps
        return x + self.by


def above(edge: float) -> Model:
    """Class 0 where the first entry is at most `edge`."""
    return lambda x: torch.stack([edge - x.flatten(1)[:, 0], x.flatten(1)[:, 0] - edge], 1)


def test_a_later_link_starts_where_the_one_before_ended_and_gets_what_stands() -> None:
    x, y = torch.tensor([[0.0], [0.9], [5.0]]), torch.zeros(3, dtype=torch.long)
    one, two = Push(0.4), Push(0.4)
    links = (Link(one, 0.5, 3, "after"), Link(two, 0.25, 5, "after"))
    tally = Tally.of(3)
    found = Composite(links)(above(1.0), x, y, Threat(eps=1.0, bounds=WIDE), seeded(0, "a"), tally=tally)
    assert torch.equal(two.seen[0][0], torch.tensor([[0.4]])) and two.seen[0][1] == 0.25
    assert torch.allclose(found, torch.tensor([[0.65], [1.3], [5.4]]))
    assert tally.gradients.tolist() == [8, 3, 3] and tally.queries.tolist() == [1, 0, 0]
    apart = Composite(links, chained=False)(above(1.0), x, y, Threat(eps=1.0, bounds=WIDE), seeded(0, "a"))
    assert float(apart[0, 0]) == 0.25  # from the clean input again


def test_links_together_reach_what_none_of_them_reaches_and_never_leave_the_ball() -> None:
    x, y = torch.zeros(1, 1), torch.zeros(1, dtype=torch.long)
    link_ = Link(Push(0.5), 0.5, 1, "after")
    threat = Threat(eps=1.0, bounds=WIDE)
    robust = {
        (count, chained): attacked(
            Composite((link_,) * count, chained), above(0.9), x, y, threat, seeded(0, "b")
        ).robust
        for count in (1, 2) for chained in (True, False)
    }  # fmt: skip
    assert robust == {(1, True): 1.0, (1, False): 1.0, (2, True): 0.0, (2, False): 1.0}
    far = Composite((link_,) * 5)(above(3.0), x, y, threat, seeded(0, "b"))
    assert float(far) == 1.0
    assert float(Composite((Link(Push(7.0), 0.5, 1, "free"),))(above(9.0), x, y, threat, seeded(0, "b"))) == 1.0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_inner_ball_lies_in_both_balls_and_the_box(norm: str) -> None:
    origin = torch.rand(50, 6, generator=seeded(1, "o"))
    whole = Threat(norm, 0.3)
    start = whole.admit(origin + torch.randn(50, 6, generator=seeded(1, "s")) * 0.2, origin)
    inner = Nested.within(whole, 0.2, 7)
    pairs, tried = torch.stack([start, origin], 1), torch.randn(50, 2, 6, generator=seeded(1, "t"))
    moved = inner.admit(tried, pairs)
    assert torch.equal(moved[:, 1], origin) and (inner.steps, inner.eps, inner.whole) == (7, 0.2, 0.3)
    assert float(size_of(moved[:, 0] - start, norm).max()) <= 0.2 + 1e-6
    assert float(size_of(moved[:, 0] - origin, norm).max()) <= 0.3 + 1e-6
    assert float(moved[:, 0].min()) >= 0 and float(moved[:, 0].max()) <= 1
    # A point of all three sets stays where it is.
    assert torch.allclose(inner.admit(moved, pairs), moved, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in PEOPLE if n != SKIP])
def test_every_attacker_keeps_to_its_ball_and_to_its_price(name: str) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 5)).requires_grad_(False)
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(5, 36, generator=seeded(2, "w")) * 0.05)
    x = torch.rand(6, 1, 6, 6, generator=seeded(2, name))
    y = net(x).argmax(1)
    part = link(name, 0.5, 5)
    tally = Tally.of(6)
    begin = (x + 0.01).clamp(0, 1)
    moved = part.run(net, x, begin, y, Threat(eps=0.05), seeded(2, "d"), tally)
    assert moved.shape == x.shape and bool(moved.isfinite().all())
    assert float((moved - x).abs().max()) <= 0.05 + 1e-6 and float(moved.min()) >= 0 and float(moved.max()) <= 1
    if part.how != "free":
        assert float((moved - begin).abs().max()) <= 0.025 + 1e-6
    # Rounding: multi-target gives a fifth of five steps, one each, to four classes, and five to three.
    # DDN looks once more where its last step led.
    assert int(tally.gradients.max()) <= {"multi-target": 19, "ddn": 6}.get(name, part.gradients)
    assert (int(tally.gradients.max()) > 0) == (part.cost != 0)
    again = part.run(net, x, begin, y, Threat(eps=0.05), seeded(2, "d"), Tally.of(6))
    assert torch.equal(moved, again)


def slow_ranks(costs: list[tuple[float, ...]]) -> list[int]:
    """Peel front after front off, by the definition."""
    left, found, rank = set(range(len(costs))), [0] * len(costs), 0
    while left:
        front = {
            i for i in left
            if not any(all(map(le, costs[j], costs[i])) and costs[j] != costs[i] for j in left)
        }  # fmt: skip
        for i in front:
            found[i] = rank
        left, rank = left - front, rank + 1
    return found


def test_ranks_are_the_fronts_that_peeling_leaves() -> None:
    draw = seeded(3, "costs")
    for count, objectives in ((1, 2), (40, 2), (40, 3)):
        costs = [tuple(row) for row in torch.randint(6, (count, objectives), generator=draw).tolist()]
        assert ranks(costs) == slow_ranks(costs)
    assert crowding([(0.0, 10.0), (1.0, 6.0), (2.0, 5.0), (10.0, 0.0)]) == [math.inf, 0.2 + 0.5, 0.9 + 0.6, math.inf]


def test_nsga2_finds_the_front_that_trying_all_finds_and_judges_nothing_twice() -> None:
    sizes = [(5, 4)] * 2
    asked: list[Genome] = []

    def judge(genome: Genome) -> tuple[float, float]:
        asked.append(genome)
        (a, b), (c, d) = genome
        return float((a - 3) ** 2 + b + (c - 1) ** 2), float(a + c + 3 * d)

    every = [judge(((a, b), (c, d))) for a in range(5) for b in range(4) for c in range(5) for d in range(4)]
    true = {cost for cost, rank in zip(every, ranks(every), strict=True) if rank == 0}
    asked.clear()
    found = nsga2(sizes, judge, seeded(4, "g"), population=16, generations=15, first=[((4, 3), (4, 3))])
    assert len(asked) == len(set(asked)) < 230 and asked[0] == ((4, 3), (4, 3))
    assert {cost for _, cost in found.best} == true
    assert list(found.history) == sorted(found.history, reverse=True)
    random = nsga2(sizes, judge, seeded(4, "g"), population=len(found.judged), generations=0)
    assert len({cost for _, cost in random.best} & true) < len(true)


def test_genomes_that_mean_the_same_have_one_form_and_policies_are_read_back() -> None:
    space = Space(("skip", "fgsm", "fog", "pgd"), 3, 80)
    a, b = space.normal(((0, 3, 4), (1, 2, 7), (3, 7, 3))), space.normal(((1, 2, 0), (3, 7, 3), (0, 1, 1)))
    assert a == b == ((1, 2, 0), (3, 7, 3), (0, 0, 0))
    assert written(space.links_of(a)) == ("fgsm:0.375:10", "pgd:1:40")
    words = ("spsa:0.5:20", "multi-target:1:50", "cw-l2:0.125:9")
    assert written(read(words)) == words
    for bad in ("pgd", "pgd:0:5", "pgd:1.5:5", "pgd:1:0", "nobody:1:5", "skip:1:5"):
        with pytest.raises(ValueError, match=bad):
            read([bad])
    pool = Space((*GRADIENT, SKIP), 2, 100)
    starts = [pool.links_of(genome) for genome in pool.alone(240)]
    assert [k[0].name for k in starts] == list(GRADIENT) and {len(k) for k in starts} == {1}
    assert max(k[0].gradients for k in starts) == 240  # nine targets for 50 of 100 steps
    assert len(PEOPLE) == 32 and Composite(ensemble(100, 5).links).gradients == 1480
    assert all(480 * 0.95 <= a.gradients <= 480 for n, a in singles(480, 5).items() if not n.startswith("fgsm"))


def test_diversified_starts_go_where_a_linear_network_points() -> None:
    weight = torch.randn(4, 9, generator=seeded(5, "w"))
    x, y = torch.full((30, 9), 0.5), torch.zeros(30, dtype=torch.long)
    # A row that is fooled stops; asking for a class that is read at no place lets all go on.
    model: Model = lambda z: torch.cat([z @ weight.T, torch.full((len(z), 1), -99.0)], 1)  # noqa: E731
    goal = replace(Threat(eps=0.2), targeted=True)
    found = diversified(model, x, x, torch.full_like(y, 4), goal, seeded(5, "d"))
    way = torch.rand(30, 5, generator=seeded(5, "d")) * 2 - 1
    assert torch.allclose(found, x + 0.2 * (way[:, :4] @ weight).sign())
    assert len({tuple(row) for row in found.tolist()}) > 15
    shares = {name: [SCHEDULES[name](t) for t in (0.0, 0.34, 0.5, 0.84)] for name in SCHEDULES}
    assert shares["cosine"] == pytest.approx([1.0, 0.741, 0.5, 0.062], abs=1e-3)
    assert shares["cyclical"] == pytest.approx([1.0, 0.999, 0.5, 0.469], abs=1e-3)
    assert shares["step"] == [1.0, 0.25, 0.25, 0.0625]
    # A line that cannot be crossed: the two diversified steps and 28 more all end at the edge of the ball.
    tally, line = Tally.of(1), lambda z: torch.cat([z + 9.0, -z], 1)
    moved = odi(
        line, torch.zeros(1, 1), torch.zeros(1).long(), Threat(eps=0.4, steps=30, bounds=WIDE), draw(), tally=tally
    )
    assert float(moved) == pytest.approx(-0.4) and tally.gradients.tolist() == [30]


def draw() -> torch.Generator:
    return seeded(5, "draw")


def test_damage_in_limits_and_closed_forms() -> None:
    draw, bounds = seeded(6, "x"), Bounds(-1.0, 3.0)
    x = torch.rand(4, 3, 12, 10, generator=draw) * 4 - 1
    for kind in DAMAGES:
        weak, strong = (damaged(x, kind, s, bounds, seeded(6, kind)) for s in (0.05, 1.0))
        assert strong.shape == x.shape and float(strong.min()) >= -1 and float(strong.max()) <= 3
        assert float((strong - x).abs().mean()) > 0.02, kind
        # JPEG and counted photons start from a coarse form already, a soft edge of a disc too.
        assert float((weak - x).abs().mean()) < float((strong - x).abs().mean()), kind
    flat = torch.full((2, 1, 8, 8), 0.25)
    for kind in ("gaussian-blur", "defocus-blur", "glass-blur", "zoom-blur", "pixelate", "elastic", "saturate"):
        assert torch.allclose(damaged(flat, kind, 0.7, Bounds(), seeded(6, kind)), flat, atol=1e-5), kind
    assert torch.allclose(damaged(flat, "brightness", 0.5, Bounds(), draw), flat + 0.3)
    assert torch.allclose(damaged(flat, "jpeg", 0.0, Bounds(), draw), flat, atol=0.01)
    ramp = torch.arange(64.0).view(1, 1, 8, 8) / 64
    assert torch.allclose(damaged(ramp, "contrast", 1.0, Bounds(), draw), 31.5 / 64 + 0.1 * (ramp - 31.5 / 64))
    blocks = damaged(ramp, "pixelate", 0.625, Bounds(), draw)  # four by four are left
    assert torch.allclose(blocks[0, 0, ::2, ::2], ramp[0, 0].reshape(4, 2, 4, 2).mean((1, 3)))
    assert len(damaged(ramp, "pixelate", 1.0, Bounds(), draw).unique()) == 4


def test_jpeg_of_one_block_is_the_slow_cosine_transform() -> None:
    x = torch.rand(1, 1, 8, 8, generator=seeded(7, "j"), dtype=torch.float64)
    from cupel.ops.image_damage import JPEG

    pixels, table = x[0, 0] * 255 - 128, torch.tensor(JPEG, dtype=torch.float64)
    quality = 90 - 85 * 0.4
    table = (table * (200 - 2 * quality) / 100).clamp(1, 255)
    wave = [
        [math.cos((2 * i + 1) * u * math.pi / 16) * (math.sqrt(0.125) if u == 0 else 0.5) for i in range(8)]
        for u in range(8)
    ]
    basis = torch.tensor(wave, dtype=torch.float64)
    kept = torch.einsum("ui,vj,ij->uv", basis, basis, pixels).div(table).round() * table
    want = (torch.einsum("ui,vj,uv->ij", basis, basis, kept) + 128) / 255
    assert torch.allclose(damaged(x, "jpeg", 0.4, Bounds(), seeded(7, "d"))[0, 0], want.clamp(0, 1), atol=1e-9)


def test_a_given_policy_is_judged_as_the_attack_it_names() -> None:
    subject, ctx = trained(), Context(seed=1)
    policy = ("fgsm:0.5:1", "pgd:1:6", "multi-target:1:5")
    found = CAA(eps=0.08, policy=policy, examples=30, restarts=1, steps=4).measure(subject, ctx)
    with still(subject.model) as model:
        rows = torch.linspace(0, len(subject.data.test) - 1, 30, dtype=torch.float64).round().long()
        x, y = subject.data.test.inputs[rows], subject.data.test.targets[rows]
        alone = attacked(Composite(read(policy)), model, x, y, Threat(eps=0.08), ctx.rng("chain"))
    assert found["chain_accuracy"].value == pytest.approx(alone.robust)
    assert found["chain_gradients"].value == pytest.approx(float(alone.tally.gradients.double().mean()))
    assert spent(alone) > found["chain_gradients"].value and found["length"].value == 3
    assert found["robust_accuracy"].value <= min(found[f"{n}_accuracy"].value for n in ("chain", "apart", "union"))
    assert found["clean_accuracy"].value > 0.75 and found.figures["policy"] == list(policy)
    assert found["search_accuracy"].count == 0


def test_the_search_keeps_to_its_budget_and_beats_its_first_generation() -> None:
    subject = trained()
    probe = CAA(
        eps=0.12, examples=20, search_examples=20, steps=16, budget=20, population=10, generations=1, restarts=1
    )
    found = probe.measure(subject, Context(seed=2))
    assert 0 < found["chain_most"].value <= 20 and found.figures["history"][-1] <= found.figures["history"][0]
    costs = [(row[0], row[1]) for row in found.figures["front"] if row[0] <= 1]
    assert costs == sorted(costs) and [c[1] for c in costs] == sorted((c[1] for c in costs), reverse=True)
    assert found["search_accuracy"].value == pytest.approx(costs[0][0])
    only = replace(probe, pool=("fog",), generations=0, population=2).measure(subject, Context(seed=2))
    assert all(word.startswith("fog") for word in only.figures["policy"]) and only["chain_gradients"].value == 0


def test_what_cannot_be_attacked_or_read_is_refused() -> None:
    subject = trained()
    with pytest.raises(ParamError, match="got pgd:2:5"):
        CAA(policy=("pgd:2:5",)).measure(subject, Context())
    with pytest.raises(ParamError, match="fogg"):
        CAA(pool=("fogg",)).measure(subject, Context())
    with pytest.raises(NotApplicable, match="range"):
        CAA().measure(replace(subject, bounds=None), Context())
    flat = replace(subject.data, test=subject.data.test.having(inputs=subject.data.test.inputs.flatten(1)))
    with pytest.raises(NotApplicable, match="images"):
        CAA(policy=("fog:1:1",)).measure(replace(subject, data=flat), Context())
