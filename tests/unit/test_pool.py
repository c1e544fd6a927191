"""Workers: one that dies fails its own job, and together they keep to a limit of memory."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from cupel.runner.pool import WORKER_BYTES, WorkerDied, Workers, free_memory
from cupel.runner.recipe import recipe_of
from cupel.runner.run import exit_code, run
from cupel.testing.jobs import die, hold, square

SMALL = {"digits-cnn": {"width": 4, "examples": 96}}


def test_a_death_fails_one_job() -> None:
    pool = Workers(2)
    good = [pool.submit(square, n) for n in range(4)]
    killed, left = pool.submit(die, signal.SIGKILL), pool.submit(die, signal.SIGSEGV)
    more = [pool.submit(square, n) for n in range(4, 8)]
    assert [f.result(timeout=60) for f in good + more] == [n * n for n in range(8)]
    with pytest.raises(WorkerDied, match=r"SIGKILL.*smaller --jobs"):
        killed.result(timeout=60)
    with pytest.raises(WorkerDied, match="SIGSEGV"):
        left.result(timeout=60)
    pool.shutdown()


def test_errors_of_jobs_come_back() -> None:
    pool = Workers(1)
    with pytest.raises(TypeError):
        pool.submit(square, "x").result(timeout=60)
    assert pool.submit(square, 3).result(timeout=60) == 9
    pool.shutdown()


def test_fewer_workers_where_memory_is_short() -> None:
    assert Workers(8, memory=2 * WORKER_BYTES).count == 2
    assert Workers(8, memory=1).count == 1
    assert 0 < free_memory() < 2**50


def test_jobs_that_are_too_big_together_run_one_after_another(tmp_path: Path) -> None:
    pool = Workers(2, memory=1400 * 2**20)
    jobs = [pool.submit(hold, 800, 1.5, str(tmp_path / str(n))) for n in range(2)]
    assert [job.result(timeout=60) for job in jobs] == [800, 800]
    begun = sum(len(p.read_text().split()) for p in tmp_path.iterdir())
    assert begun == 3  # one of them was stopped, and began again when the other was done
    with pytest.raises(WorkerDied, match=r"must fit into 1\.4 GiB"):
        pool.submit(hold, 2500, 2.0, str(tmp_path / "big")).result(timeout=60)
    assert pool.submit(square, 2).result(timeout=60) == 4
    pool.shutdown()


def test_a_probe_that_kills_its_worker_costs_itself_only(tmp_path: Path) -> None:
    parts: dict[str, Any] = {
        "workload": SMALL,
        "variants": {"plain": [{"fit": {"epochs": 1}}], "none": [{"fit": {"epochs": 0}}]},
        "probes": ["accuracy", "cupel.testing.jobs:Deadly", "calibration"],
    }
    card = run(recipe_of(**parts), out=tmp_path / "run", jobs=2)
    for variant in card["variants"].values():
        assert variant["probes"]["accuracy"]["readings"] and variant["probes"]["calibration"]["readings"]
        assert len(variant["failures"]) == 1 and "SIGKILL" in variant["failures"][0]
        assert "Deadly" in variant["failures"][0]
    assert exit_code(card) == 1
    assert not (tmp_path / "run" / ".cupel").exists()


def test_a_defect_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    parts: dict[str, Any] = {
        "workload": SMALL,
        "variants": {"plain": [{"fit": {"epochs": 1}}]},
        "probes": ["cupel.testing.jobs:Broken", "accuracy"],
    }
    card = run(recipe_of(**parts), out=tmp_path / "run")
    assert card["variants"]["plain"]["probes"]["accuracy"]["readings"]
    assert "ZeroDivisionError" in card["variants"]["plain"]["failures"][0]
    trace = next((tmp_path / "run" / "failures").iterdir()).read_text()
    assert "ZeroDivisionError" in trace and "jobs.py" in trace
    assert exit_code(card) == 3
    with pytest.raises(Exception, match="ZeroDivisionError"):
        run(recipe_of(**parts))


def test_a_pool_that_is_closed_in_a_hurry_ends_its_workers() -> None:
    pool = Workers(1)
    job = pool.submit(os.getpid)
    pid = job.result(timeout=60)
    pool.submit(time.sleep, 60)
    pool.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.05)
