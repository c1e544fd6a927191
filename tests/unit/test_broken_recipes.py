"""Wrong recipes: exit 2, file and line, what is wrong, what to do; no traceback, nothing left behind."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cupel.cli import app

GOOD = "workload: {digits-cnn: {width: 4, examples: 64}}\n"

# name -> (text, a word the message must hold, line or None where a file has no lines)
BROKEN: dict[str, tuple[str, str, int | None]] = {
    "typo in a key": (GOOD + "varants: {plain: [fit]}\n", "Did you mean 'variants'", 2),
    "typo in a method": (GOOD + "steps:\n  - fit:\n      techniques: [pdpp]\n", "Did you mean 'pdp'", 4),
    "typo in a parameter": (GOOD + "steps:\n  - fit:\n      techniques:\n        - pdp: {sparsty: 0.5}\n", "Did you mean 'sparsity'", 5),
    "typo in a budget": (GOOD + "steps:\n  - fit: {epoch: 3}\n", "Did you mean 'epochs'", 3),
    "typo in a value": (GOOD + "steps:\n  - fit:\n      techniques: [{pdp: {form: chanel}}]\n", "Did you mean 'channel'", 4),
    "wrong type": (GOOD + "steps:\n  - fit: {epochs: many}\n", "int", 3),
    "negative share": (GOOD + "steps:\n  - fit:\n      techniques: [{pdp: {sparsity: -0.1}}]\n", "in [0, 1)", 4),
    "unknown workload": ("workload: digits-cn\nsteps: [fit]\n", "Did you mean 'digits-cnn'", 1),
    "uncovered need": ("workload: movielens-kgat\nsteps:\n  - fit:\n      techniques: [adversarial-training]\n", "must have", 4),
    "clashing hooks": (GOOD + "steps:\n  - fit:\n      techniques: [cupel_test_pieces:MakeA, cupel_test_pieces:MakeB]\n", "at most one", 3),
    "gate on a missing reading": (GOOD + "steps: [fit]\nprobes: [accuracy]\ngate: {acuracy: '>= 0.5'}\n", "Did you mean 'accuracy'", 4),
    "gate that cannot be read": (GOOD + "steps: [fit]\ngate: {accuracy: 'about 0.9'}\n", 'Write ">= 0.9"', 3),
    "missing artefact": (GOOD + "steps:\n  - fit:\n      techniques: [distill]\n", "given", 4),
    "cyclic given": (GOOD + "steps: [fit]\ngiven: &g\n  teacher: {workload: digits-cnn, given: *g}\n", "contain itself", 3),
    "YAML bomb": (
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{k}: &{k} [{', '.join(['*' + p] * 10)}]\n" for p, k in zip("abcdefg", "bcdefgh", strict=True)),
        "anchors", 1),
    "tabs": (GOOD + "steps:\n\t- fit\n", "spaces", 3),
    "empty file": ("", "empty", 1),
    "duplicate keys": (GOOD + "steps: [fit]\nsteps: [fit]\n", "stands twice", 3),
    "unknown seed type": (GOOD + "steps: [fit]\nseeds: [0, one]\n", "whole number", 3),
    "python that raises": ("workload: cupel_test_raises:Thing\nsteps: [fit]\n", "raised RuntimeError", 1),
    "python that is absent": ("workload: no_such_module:Thing\nsteps: [fit]\n", "ModuleNotFoundError", 1),
    "python tag": (GOOD + "steps: [fit]\nseeds: !!python/object/apply:os.system ['true']\n", "tag", 3),
    "step that is none": (GOOD + "steps: [train]\n", "`fit` or `apply`", 2),
    "procedure inside a fit": (GOOD + "steps:\n  - fit:\n      techniques: [gb-cnn]\n", "apply: gb-cnn", 4),
    "hook applied": (GOOD + "steps:\n  - fit\n  - apply: pdp\n", "acts during training", 4),
    "fit after int8": (GOOD + "steps:\n  - fit\n  - apply: int8-ptq\n  - fit\n", "ends training", 5),
    "two writers of one artefact": (GOOD + "steps:\n  - fit:\n      techniques: [pdp]\n  - fit:\n      techniques: [magnitude-prune]\n", "written once", 6),
    "infinite number": (GOOD + "steps:\n  - fit: {lr: .inf}\n", "finite", 3),
}  # fmt: skip

PIECES = """
from dataclasses import dataclass
from cupel.core.protocols import Hook
from cupel.core.slots import phase

class _Make(Hook):
    @phase("make")
    def grads(self, grads, at):
        return grads

@dataclass(frozen=True)
class MakeA:
    def hook(self, ctx):
        return _Make()

@dataclass(frozen=True)
class MakeB:
    def hook(self, ctx):
        return _Make()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cupel_test_pieces.py").write_text(PIECES)
    (tmp_path / "cupel_test_raises.py").write_text("raise RuntimeError('broken on purpose')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refuse(arguments: list[str]) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.output.startswith("error: ")
    return result.output


@pytest.mark.parametrize("name", BROKEN)
def test_is_refused(name: str, here: Path) -> None:
    text, word, line = BROKEN[name]
    (here / "bad.yaml").write_text(text)
    said = refuse(["run", "bad.yaml", "--out", "out"])
    assert word in said
    assert re.search(rf"bad\.yaml:{line}: ", said), said
    assert said.rstrip().endswith((".", "]", "`", '"', "'")), "the message must end with what to do"
    assert not (here / "out").exists()


def test_directory(here: Path) -> None:
    assert "directory" in refuse(["run", str(here), "--out", "out"])


def test_huge_file(here: Path) -> None:
    (here / "big.yaml").write_bytes(b"# padding\n" * 5_000_000)
    assert "bytes" in refuse(["run", "big.yaml", "--out", "out"])


def test_not_utf8(here: Path) -> None:
    (here / "bad.yaml").write_bytes(b"workload: digits-cnn\nsteps: [fit]\n# caf\xe9\n")
    assert "bad.yaml:3: a recipe must be UTF-8" in refuse(["run", "bad.yaml", "--out", "out"])


def test_absent_file_names_its_neighbour(here: Path) -> None:
    (here / "demo.yaml").write_text(GOOD)
    assert "Did you mean 'demo.yaml'" in refuse(["run", "dmo.yaml", "--out", "out"])


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads every file")
def test_unreadable_file(here: Path) -> None:
    (here / "bad.yaml").write_text(GOOD)
    (here / "bad.yaml").chmod(0)
    assert "readable" in refuse(["run", "bad.yaml", "--out", "out"])


def test_given_files_in_a_circle(here: Path) -> None:
    (here / "a.yaml").write_text(GOOD + "steps: [fit]\ngiven: {teacher: b.yaml}\n")
    (here / "b.yaml").write_text(GOOD + "steps: [fit]\ngiven: {teacher: a.yaml}\n")
    assert "a.yaml -> b.yaml -> a.yaml" in refuse(["run", "a.yaml", "--out", "out"])


def test_full_folder(here: Path) -> None:
    (here / "good.yaml").write_text(GOOD + "steps: [fit]\n")
    (here / "out").mkdir()
    (here / "out" / "mine.txt").write_text("keep")
    assert "new or empty" in refuse(["run", "good.yaml", "--out", "out"])
    assert [p.name for p in (here / "out").iterdir()] == ["mine.txt"]
