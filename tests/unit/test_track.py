"""Curves and readings written for TensorBoard and MLflow, read back with their own readers."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from cupel.core.errors import RecipeError
from cupel.runner.track import check_tracker, curves_of, find_spec, readings_of, track

READING = {"unit": "share", "better": "higher", "count": 10, "low": 0.0, "high": 1.0}


def _curve(losses: list[float], at: str = "fit") -> list[dict[str, Any]]:
    return [
        {"at": at, "kind": "epoch", "epoch": n, "loss": x, "lr": 0.1 / n, "seconds": 0.1}
        for n, x in enumerate(losses, 1)
    ]


CARD: dict[str, Any] = {
    "format": 1,
    "recipe": {
        "workload": {"digits-cnn": {"width": 4}},
        "seeds": [3, 5],
        "variants": {
            "plain": ["fit"],
            "lean": [
                {"fit": {"epochs": 2, "techniques": [{"pdp": {"sparsity": 0.5}}]}},
                {"apply": {"dqa": {"bits": 4}}},
            ],
        },
        "probes": ["accuracy"],
    },
    "seeds": [3, 5],
    "variants": {
        "plain": {
            "probes": {"accuracy": {"readings": {"accuracy": READING | {"value": 0.85, "seeds": [0.8, 0.9]}}}},
            "curves": {"3": _curve([2.0, 1.0, 0.5]), "5": _curve([2.1, 1.1, 0.6])},
        },
        "lean": {
            "probes": {
                "accuracy": {
                    "readings": {
                        "accuracy": READING | {"value": 0.7, "seeds": [0.7]},  # one of the two seeds failed
                        "worst_class_accuracy": READING | {"value": None, "seeds": [None, None]},
                    }
                }
            },
            "curves": {"3": _curve([1.5, 1.25]) + _curve([0.75], "fit-2"), "5": []},
        },
    },
}


def wanted(variant: str, seed: int) -> dict[str, dict[int, float]]:
    """Every name, step and value that must be there."""
    found: dict[str, dict[int, float]] = {}
    for name, value, step in curves_of(CARD, variant, seed):
        found.setdefault(name, {})[step] = value
    return found | {name: {0: value} for name, value in readings_of(CARD, variant, seed)}


def test_what_is_written_is_what_the_scorecard_holds() -> None:
    assert wanted("plain", 5) == {
        "fit/loss": {1: 2.1, 2: 1.1, 3: 0.6},
        "fit/lr": {1: 0.1, 2: 0.05, 3: pytest.approx(0.1 / 3)},
        "accuracy/accuracy": {0: 0.9},
    }
    lean = wanted("lean", 3)
    assert lean["fit/loss"] == {1: 1.5, 2: 1.25} and lean["fit-2/loss"] == {1: 0.75}
    assert lean["accuracy/accuracy over seeds"] == {0: 0.7}
    assert not any("worst" in name for name in lean)


@pytest.mark.skipif(not find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_reads_back_every_point(tmp_path: Path) -> None:
    assert track(CARD, tmp_path, "tensorboard") == str(tmp_path / "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for variant in ("plain", "lean"):
        for seed in (3, 5):
            events = EventAccumulator(str(tmp_path / "tensorboard" / f"{variant}-{seed}"))
            events.Reload()
            found = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
            want = wanted(variant, seed)
            assert found.keys() == want.keys()
            for tag, steps in want.items():
                assert found[tag] == pytest.approx(steps, rel=1e-6)


@pytest.mark.skipif(not (find_spec("mlflow") and find_spec("alembic")), reason="mlflow is not installed whole")
def test_mlflow_reads_back_every_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "a run"
    folder.mkdir()
    where = track(CARD, folder, "mlflow")
    again = copy.deepcopy(CARD)
    again["variants"].pop("lean")
    assert track(again, folder, "mlflow") == where  # a second time goes beside the first
    assert capfd.readouterr() == ("", "")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=where)
    experiment = client.get_experiment_by_name("cupel digits-cnn")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(r.info.run_name for r in runs) == sorted(
        ["a run", "a run", "plain-3", "plain-5", "plain-3", "plain-5", "lean-3", "lean-5"]
    )
    assert {r.info.status for r in runs} == {"FINISHED"}
    tops = [r for r in runs if r.info.run_name == "a run"]
    cards = [json.loads(Path(client.download_artifacts(r.info.run_id, "scorecard.json")).read_text()) for r in tops]
    assert CARD in cards and again in cards
    first = next(r for r, card in zip(tops, cards, strict=True) if card == CARD).info.run_id
    for run in (r for r in runs if r.data.tags.get("mlflow.parentRunId") == first):
        variant, seed = run.data.params["variant"], int(run.data.params["seed"])
        for name, steps in wanted(variant, seed).items():
            got = {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)}
            assert got == pytest.approx(steps)
        assert run.data.metrics.keys() == wanted(variant, seed).keys()
        assert run.data.params["workload.digits-cnn.width"] == "4"
        if variant == "lean":
            assert run.data.params["step1.fit.techniques.1.pdp.sparsity"] == "0.5"
            assert run.data.params["step2.apply.dqa.bits"] == "4"


def test_an_unknown_tracker_and_an_absent_package_are_told_at_once() -> None:
    with pytest.raises(RecipeError, match=r"got 'tensorbord'\. Did you mean 'tensorboard'\?"):
        check_tracker("tensorbord")
    code = """
        import sys
        sys.modules["tensorboard"] = sys.modules["mlflow"] = None
        from cupel.core.errors import MissingExtra
        from cupel.runner.track import check_tracker
        for name in ("tensorboard", "mlflow"):
            try:
                check_tracker(name)
            except MissingExtra as error:
                assert f"cupel[{name}]" in str(error)
            else:
                raise SystemExit(name)
        assert "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
