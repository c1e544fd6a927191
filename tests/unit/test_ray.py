"""The same jobs on a Ray cluster of two nodes on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cupel.core.errors import RecipeError
from cupel.runner.cluster import OnRay
from cupel.runner.pool import WorkerDied
from cupel.runner.recipe import recipe_of
from cupel.runner.run import run
from cupel.testing.folders import content
from cupel.testing.jobs import die, square

ray = pytest.importorskip("ray", reason="Ray is not installed")
SMALL = {"digits-cnn": {"width": 4, "examples": 96}}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    room = {"object_store_memory": 100 * 2**20, "num_cpus": 1}
    cluster = Cluster(initialize_head=True, head_node_args=room)
    cluster.add_node(**room)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def small(**more: Any) -> Any:
    return recipe_of(
        workload=SMALL,
        seeds=[0, 1],
        variants={
            "plain": [{"fit": {"epochs": 1}}],
            "lean": [{"fit": {"epochs": 1, "techniques": [{"pdp": {"sparsity": 0.5}}]}}],
        },
        probes=["accuracy", "calibration", *more.pop("probes", ())],
        **more,
    )


def test_the_cluster_has_two_nodes(cluster: Any) -> None:
    assert sum(n["Alive"] for n in ray.nodes()) == 2


def test_same_scorecard_as_here(cluster: Any, tmp_path: Path) -> None:
    run(small(), out=tmp_path / "here")
    run(small(), out=tmp_path / "ray", on="ray")
    assert content(tmp_path / "here") == content(tmp_path / "ray")


def test_a_killed_worker_is_tried_once_more_and_reported(cluster: Any, tmp_path: Path) -> None:
    deadly = {"cupel.testing.jobs:Deadly": {"once": str(tmp_path / "died")}}
    card = run(small(probes=[deadly]), out=tmp_path / "run", on="ray")
    assert not any(v["failures"] for v in card["variants"].values())
    told = [i for v in card["variants"].values() for i in v["incidents"]]
    assert len(told) == 1 and "was done again" in told[0]


def test_a_job_that_always_dies_is_given_up(cluster: Any) -> None:
    pool = OnRay()
    job = pool.submit(die, 9)
    with pytest.raises(WorkerDied, match="died twice"):
        job.result(timeout=60)
    assert pool.retried == [job] and pool.submit(square, 3).result(timeout=60) == 9
    with pytest.raises(TypeError):
        pool.submit(square, "x").result(timeout=60)


def test_unknown_place_is_refused() -> None:
    with pytest.raises(RecipeError, match="must be local or ray"):
        run(small(), on="moon")
