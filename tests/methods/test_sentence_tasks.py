"""sentence-tasks: files read by hand, a forward in NumPy, sentences kept in one part, batches of one task."""

from __future__ import annotations

import csv
import gzip
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cupel.core.context import Context
from cupel.core.errors import ContractError, MissingData, ParamError
from cupel.core.fit import fit
from cupel.core.steps import build
from cupel.data.sentences import SETS, apart, key_of, read_sentences, vocabulary_of
from cupel.nets.multi_task import OTHER, MeanPool, MultiTaskText
from cupel.ops.task_rows import TaskExamples, tasks_of
from cupel.workloads.language.sentence_tasks import SentenceTasks

torch.set_num_threads(1)
Row = tuple[str, object, str]


def write(folder: Path, name: str, rows: list[Row], label: str = "label") -> Path:
    path = folder / "sentence-cls" / f"{name}.csv.gz"
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        made = csv.writer(file)
        made.writerow(["split", label, "text"])
        made.writerows(rows)
    return path


def reviews(count: int, who: str) -> list[tuple[int, str]]:
    """Sentences that are told by one word; every one is different."""
    return [(k % 2, f"{who}{k} was {'good' if k % 2 else 'poor'} , indeed .") for k in range(count)]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sst2 with parts of its own; mr that holds all of its sentences in another tokenisation; trec; cr."""
    monkeypatch.setenv("CUPEL_DATA", str(tmp_path))
    parts = ["train"] * 70 + ["dev"] * 10 + ["test"] * 20
    films = reviews(100, "film")
    write(tmp_path, "sst2", [(p, y, t) for p, (y, t) in zip(parts, films, strict=True)])
    again = [(y, t.replace(" ,", ",").replace(" .", ".").capitalize()) for y, t in films]
    write(tmp_path, "mr", [("all", y, t) for y, t in [*again, *reviews(100, "show")]])
    kinds = SETS["trec"]
    asked = [(kinds[k % 6], f"What {kinds[k % 6].lower()} is number {k} ?") for k in range(120)]
    rows = [("test" if k >= 100 else "train", kind, text) for k, (kind, text) in enumerate(asked)]
    write(tmp_path, "trec", [*rows, ("train", "NUM", asked[110][1])], "coarse")  # a test sentence once more
    write(tmp_path, "cr", [("all", y, t) for y, t in reviews(50, "phone")])
    return tmp_path


def texts(library: Path, name: str) -> list[str]:
    path = library / "sentence-cls" / f"{name}.csv.gz"
    return [row.text for row in read_sentences(path, SETS[name])]


def test_every_row_has_its_own_words_class_and_part(library: Path) -> None:
    workload = SentenceTasks(tasks=("trec", "sst2"), words=5, vocabulary=4000)
    data = build(workload, Context()).data
    lines = texts(library, "trec") + texts(library, "sst2")
    seen = [lines[k] for k in data.train.index.tolist()]
    known = vocabulary_of(seen, 5, 4000)
    names = {number: gram for gram, number in known.items()}
    for split in (data.train, data.valid, data.test):
        for x, y, k in zip(split.inputs.tolist(), split.targets.tolist(), split.index.tolist(), strict=True):
            said = lines[k].lower().replace("?", " ?").split()[:5]
            grams = said + [f"{a} {b}" for a, b in pairwise(said)]
            wanted = [g for g in grams if g in known]
            assert [names[t] for t in x[1:] if t] == wanted and x[1 + len(wanted) :] == [0] * (9 - len(wanted))
            assert x[0] == (k >= 121)  # 121 questions come first
            task, label = workload.classes[y].split("/")
            expected = said[1].upper() if task == "trec" else "positive" if "good" in said else "negative"
            assert label == expected and task == ("sst2" if x[0] else "trec")
    assert sorted(k for k in data.test.index.tolist() if k >= 121) == [121 + k for k in range(80, 100)]
    assert len([k for k in data.valid.index if k >= 121]) == 10
    assert [len(s) for s in (data.train, data.valid, data.test)] == [90 + 70, 10 + 10, 20 + 20]  # one question left out


def test_the_vocabulary_is_the_most_frequent_of_the_training_part(library: Path) -> None:
    assert vocabulary_of(["b a b", "c a b"], 3, 5) == {"b": 1, "a": 2, "a b": 3, "b a": 4}
    assert vocabulary_of(["b a b", "c a b"], 2, 9) == {"a": 1, "b": 2, "b a": 3, "c": 4, "c a": 5}
    assert vocabulary_of(["c b", "a"], 2, 9) == {"a": 1, "b": 2, "c": 3, "c b": 4}
    data = build(SentenceTasks(tasks=("sst2",), vocabulary=4000), Context()).data
    numbers = {int(t) for t in data.train.inputs[:, 1:].flatten()}
    assert {int(t) for t in data.test.inputs[:, 1:].flatten()} < numbers  # film80 and its like have no number
    assert numbers == set(range(max(numbers) + 1)) and max(numbers) < 4000


@pytest.mark.parametrize("seed", [0, 3])
def test_a_sentence_of_two_tasks_is_in_one_part(library: Path, seed: int) -> None:
    data = build(SentenceTasks(tasks=("mr", "trec", "sst2"), data_seed=seed), Context()).data
    lines = texts(library, "mr") + texts(library, "trec") + texts(library, "sst2")
    keys = [{key_of(lines[k]) for k in s.index.tolist()} for s in (data.train, data.valid, data.test)]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    films = [k for k in data.test.index.tolist() if k < 100]
    assert sorted(films) == list(range(80, 100))  # mr follows the parts of sst2, whatever the order of tasks
    alone = [sum(100 <= k < 200 for k in s.index.tolist()) for s in (data.train, data.valid, data.test)]
    assert alone == [70, 10, 20]


def test_what_is_tested_or_validated_anywhere_is_left_out_elsewhere() -> None:
    keys = [["a", "b", "c", "a"], ["a", "c", "b", "d"]]
    parts = [["test", "valid", "train", "train"], ["train", "valid", "train", "train"]]
    assert apart(keys, parts) == [[True, True, False, False], [False, True, False, True]]
    assert apart([["a", "a"]], [["valid", "test"]]) == [[False, True]]


def test_the_forward_equals_numpy_and_other_tasks_have_no_chance() -> None:
    torch.manual_seed(0)
    net = MultiTaskText(20, 4, 6, [2, 3, 2], 0.5).eval()
    x = torch.tensor([[1, 3, 0, 7, 0], [0, 5, 5, 9, 1], [2, 0, 0, 0, 0]])
    own = {n: p.detach().double().numpy() for n, p in net.named_parameters()}
    out = net(x).detach()
    for row, (task, start, stop) in enumerate([(1, 2, 5), (0, 0, 2), (2, 5, 7)]):
        said = [t for t in x[row, 1:].tolist() if t]
        mean = np.mean([own["embed.weight"][t] for t in said], axis=0) if said else np.zeros(4)
        h = np.maximum(0, own["hidden.0.weight"] @ mean + own["hidden.0.bias"])
        z = own[f"head.tasks.{task}.weight"] @ h + own[f"head.tasks.{task}.bias"]
        assert np.allclose(out[row, start:stop].numpy(), z, atol=1e-6)
        others = [k for k in range(7) if not start <= k < stop]
        assert out[row, others].eq(OTHER).all() and out[row].softmax(0)[others].eq(0).all()
    assert own["embed.weight"][0].any() == False and np.abs(own["embed.weight"]).max() < 1.5  # noqa: E712
    assert 0.1 < own["embed.weight"][1:].std() < 0.5  # a quarter of a normal draw


def test_padding_does_not_count_whatever_its_vector_is() -> None:
    vectors = torch.tensor([[[1.0], [9.0], [3.0]], [[9.0], [9.0], [9.0]]])
    assert MeanPool()(vectors, torch.tensor([[4, 0, 2], [0, 0, 0]])).tolist() == [[2.0], [0.0]]


def test_a_batch_moves_the_shared_part_and_the_head_of_its_task_alone() -> None:
    net = MultiTaskText(20, 4, 6, [2, 3], 0.0)
    x = torch.cat([torch.ones(5, 1).long(), torch.randint(1, 20, (5, 4))], 1)
    F.cross_entropy(net(x), torch.tensor([2, 3, 4, 2, 3])).backward()
    moved = {n for n, p in net.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {n for n in moved if n.startswith("head")} == {"head.tasks.1.weight", "head.tasks.1.bias"}
    assert {"embed.weight", "hidden.0.weight"} <= moved


def rows(counts: tuple[int, ...]) -> TaskExamples:
    tasks = torch.cat([torch.full((n,), k) for k, n in enumerate(counts)])
    order = torch.arange(len(tasks))
    return TaskExamples(order[:, None], tasks, order + 100, tasks, tuple(f"task{k}" for k in range(len(counts))))


@pytest.mark.parametrize("counts", [(10, 7, 4), (5, 1, 9), (9, 13), (3,)])
def test_shuffled_batches_are_of_one_task_and_hold_every_row_once(counts: tuple[int, ...]) -> None:
    data = rows(counts)
    for seed in range(4):
        made = list(data.batches(4, torch.Generator().manual_seed(seed)))
        assert all(len(b.targets.unique()) == 1 for b in made)
        assert sorted(torch.cat([b.index for b in made]).tolist()) == [100 + k for k in range(sum(counts))]
        assert all(len(b) <= 5 and (len(b) > 1 or 1 in counts) for b in made)
        assert len(made) == sum(1 for _ in data.batches(4))  # a fit counts its steps without a draw
    orders = {tuple(b.targets[0].item() for b in data.batches(4, torch.Generator().manual_seed(s))) for s in range(9)}
    assert len(orders) > 1 or len(counts) == 1
    plain = torch.cat([b.index for b in data.batches(4)])
    assert plain.tolist() == [100 + k for k in range(sum(counts))]


def test_rows_taken_keep_their_task_and_their_order() -> None:
    data = rows((10, 7)).take(torch.tensor([12, 3, 16]))
    assert data.tasks.tolist() == tasks_of(data.having(targets=data.targets))[0].tolist() == [1, 0, 1]
    assert torch.cat([b.index for b in data.batches(2)]).tolist() == [112, 103, 116]
    assert tasks_of(data)[1] == ("task0", "task1")
    with pytest.raises(ContractError, match="one task"):
        TaskExamples(data.inputs, data.targets, data.index, data.tasks[:2], data.names)


def test_words_that_tell_the_class_are_learned_by_all_heads(library: Path) -> None:
    subject = build(SentenceTasks(tasks=("trec", "mr", "cr"), vocabulary=400, dim=8, hidden=16), Context(seed=1))
    budget = subject.budget.__class__(epochs=8, batch_size=16, optimizer="adam", lr=2e-2)
    trained = subject.with_model(fit(subject.model, subject.data, subject.task, budget=budget))
    right = trained.outputs().argmax(1) == subject.data.test.targets
    assert [float(right[subject.data.test.inputs[:, 0] == k].float().mean()) > 0.95 for k in range(3)] == [True] * 3


def test_the_cap_counts_rows_of_each_task(library: Path) -> None:
    data = build(SentenceTasks(tasks=("mr", "cr"), examples=6), Context()).data
    assert torch.bincount(data.train.inputs[:, 0]).tolist() == torch.bincount(data.test.inputs[:, 0]).tolist() == [6, 6]


def test_bad_names_and_broken_files_say_why(library: Path) -> None:
    with pytest.raises(ParamError, match="got 'sst3'"):
        build(SentenceTasks(tasks=("sst3",)), Context())
    for tasks in ((), ("cr", "cr")):
        with pytest.raises(ParamError, match="different names"):
            build(SentenceTasks(tasks=tasks), Context())
    with pytest.raises(MissingData, match=r"sentence-cls/subj.csv.gz must be in"):
        build(SentenceTasks(tasks=("subj",)), Context())
    for bad in ([("all", 2, "x")], [("all", "one", "x")], [("some", 1, "x")], []):
        path = write(library, "mpqa", bad)
        with pytest.raises(MissingData, match="must"):
            read_sentences.__wrapped__(path, SETS["mpqa"])
    path.write_bytes(b"no gzip")
    with pytest.raises(MissingData, match=r"must be a \.csv\.gz"):
        read_sentences.__wrapped__(path, SETS["mpqa"])
