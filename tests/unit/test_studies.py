"""What is kept of a run, what is drawn from it, and what method pages say."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cupel.runner.run import run
from cupel.storage.cards import read_scorecard
from cupel.testing.further import further
from cupel.testing.scatter import front, scatter
from cupel.testing.studies import digest, pictures, study_page, techniques_of, trust_lines


def cell(values: list[float], unit: str = "share", better: str = "higher") -> dict[str, Any]:
    mean = sum(values) / len(values)
    return {"value": mean, "low": mean - 0.01, "high": mean + 0.01, "unit": unit, "better": better,
            "count": 100, "seeds": values}  # fmt: skip


def probes(accuracy: list[float], size: float, auc: float, robust: float) -> dict[str, Any]:
    return {
        "accuracy": {"readings": {"accuracy": cell(accuracy)}},
        "cost": {"readings": {"size_bytes": cell([size] * 3, "bytes", "lower")}},
        "membership": {"readings": {"membership_auc": cell([auc - 0.001, auc, auc + 0.001], "share", "lower")}},
        "evasion": {"readings": {"robust_accuracy": cell([robust] * 3)}},
    }


@pytest.fixture
def card() -> dict[str, Any]:
    found = {
        "plain": probes([0.90, 0.91, 0.92], 1000, 0.60, 0.5),
        "lean": probes([0.87, 0.88, 0.89], 250, 0.55, 0.4),
        "both": probes([0.90, 0.93, 0.90], 240, 0.60, 0.3),
    }
    variants = {
        "plain": ["fit"],
        "lean": [{"fit": {"techniques": [{"pdp": {"sparsity": 0.8}}]}}],
        "both": [{"fit": {"techniques": ["tscnc", "magnitude-prune"]}}, {"apply": {"int8-ptq": {}}}],
    }
    return {
        "recipe": {"workload": "digits-cnn", "variants": variants, "probes": list(found["plain"])},
        "seeds": [0, 1, 2],
        "date": "2026-01-02T03:04",
        "variants": {n: {"probes": p, "failures": []} for n, p in found.items()},
    }


def test_a_digest_holds_gaps_seed_by_seed(card: dict[str, Any]) -> None:
    study = digest(card)
    assert study["base"] == "plain" and study["variants"]["both"]["techniques"] == [
        "tscnc",
        "magnitude-prune",
        "int8-ptq",
    ]
    row = study["variants"]["lean"]["rows"]["accuracy/accuracy"]
    assert row["gap"] == pytest.approx(-0.03) and row["beyond"] == "worse"
    assert row["gap_high"] - row["gap_low"] < 1e-9  # the same gap with every seed
    unsure = study["variants"]["both"]["rows"]["accuracy/accuracy"]
    assert unsure["beyond"] == "" and unsure["gap_low"] < 0 < unsure["gap_high"]
    assert study["variants"]["lean"]["rows"]["membership/membership_auc"]["beyond"] == "better"
    assert "gap" not in study["variants"]["plain"]["rows"]["accuracy/accuracy"]
    assert techniques_of(["fit", {"given": "x"}, {"fit": {"epochs": 2}}]) == []


def test_pages_tell_the_gaps_and_the_worst_first(card: dict[str, Any]) -> None:
    study = digest(card)
    page = study_page("small", study)
    assert "| lean | **-.030 (-.030 to -.030)** | worse |" in page
    part = page[page.index("## Robust accuracy") :]
    assert part.index("| both |") < part.index("| lean |")
    told = list(trust_lines("pdp", {"small": study}))
    assert len(told) == 1 and "`lean` at 0.25 of the bytes" in told[0] and "membership AUC **-.050" in told[0]
    assert "(with `int8-ptq`, `tscnc`)" in next(trust_lines("magnitude-prune", {"small": study}))
    assert not list(trust_lines("gsm", {"small": study}))


def test_the_front_and_its_picture(card: dict[str, Any]) -> None:
    study = digest(card)
    small = {
        n: (v["rows"]["cost/size_bytes"], v["rows"]["evasion/robust_accuracy"]) for n, v in study["variants"].items()
    }
    assert sorted(front(small)) == ["both", "lean", "plain"]
    small["worse"] = (cell([500.0], "bytes", "lower"), cell([0.35]))
    assert "worse" not in front(small)
    root = ET.fromstring(scatter(small, "bytes", "robust", log=True))
    ns = "{http://www.w3.org/2000/svg}"
    at = {c.get("cx"): c.get("cy") for c in root.iter(f"{ns}circle")}
    assert len(at) == 4 and len([c for c in root.iter(f"{ns}circle") if c.get("class") == "on"]) == 3
    xs = [float(c.get("cx", "0")) for c in root.iter(f"{ns}circle")]
    assert max(xs) == xs[0]  # plain has the most bytes, so it stands farthest right
    ys = sorted(float(t.get("y", "0")) for t in root.iter(f"{ns}text") if t.text in small)
    assert all(b - a >= 15 for a, b in pairwise(ys))
    assert set(pictures("small", study)) == {"small-robustness.svg", "small-leakage.svg"}


def test_what_masks_its_gradients_is_crossed_out(card: dict[str, Any]) -> None:
    card["variants"]["both"]["probes"]["evasion"]["readings"] |= {
        "masking_signs": cell([1.0] * 3, "signs", "lower"),
        "robust_accuracy": cell([0.99] * 3),
    }
    drawn = pictures("small", digest(card))
    assert drawn["small-robustness.svg"].count('class="doubted"') == 1
    root = ET.fromstring(drawn["small-robustness.svg"])
    marks = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(marks) == 2 and all(m.get("class") == "on" for m in marks)
    assert 'class="doubted"' not in drawn["small-leakage.svg"]


def test_one_more_probe_on_a_finished_run_reads_what_the_run_would_have_read(tmp_path: Path) -> None:
    small, one = {"digits-cnn": {"width": 4, "examples": 96}}, {"fit": {"epochs": 1}}
    parts: dict[str, Any] = {
        "workload": small,
        "given": {"teacher": {"workload": small, "steps": [one]}},
        "variants": {
            "plain": [one],
            "int8": [one, {"apply": "int8-ptq"}],
            "lean": [{"fit": {"epochs": 1, "techniques": [{"pdp": {"sparsity": 0.5}}]}}],
        },
        "seeds": [0, 1],
    }
    whole = run(**parts, probes=["accuracy", {"irs": {"samples": 50, "examples": 8}}, "fidelity"])
    run(**parts, probes=["accuracy", "fidelity"], out=tmp_path / "run")
    told = further(tmp_path / "run", {"irs": {"samples": 50, "examples": 8}})
    assert told == read_scorecard(tmp_path / "run") and "irs" in (tmp_path / "run" / "scorecard.html").read_text()
    for variant, key in (("plain", "teacher"), ("int8", "original"), ("lean", "teacher")):
        expected, found = (c["variants"][variant]["probes"]["irs"] for c in (whole, told))
        assert found["readings"] == expected["readings"] and f"'{key}'" in str(found["notes"])
