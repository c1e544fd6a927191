"""A finished run as TensorBoard event files or MLflow runs: training curves and final readings."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cupel.core.errors import MissingExtra, RecipeError, nearest

TRACKERS = ("tensorboard", "mlflow")  # names of the packages and of the extras that bring them
_BATCH = 500  # MLflow takes at most 1,000 metrics and 100 parameters at a time
_LONGEST = 5000  # characters of a parameter that MLflow keeps


def check_tracker(name: str) -> None:
    """Raise unless curves can be written to `name`; cheap enough to call before anything is trained.

    >>> check_tracker("wandb")
    Traceback (most recent call last):
    cupel.core.errors.RecipeError: `track` must be one of tensorboard, mlflow; got 'wandb'. Name one of them.
    """
    if name not in TRACKERS:
        told = f"`track` must be one of {', '.join(TRACKERS)}; got {name!r}.{nearest(name, TRACKERS)}"
        raise RecipeError(f"{told} Name one of them.")
    needed = [name, *(("sqlalchemy", "alembic") if name == "mlflow" and not _server() else ())]
    for package in needed:  # mlflow-skinny comes without a database, and without one it keeps nothing on this machine
        if find_spec(package) is None:
            raise MissingExtra(package, name)


def track(card: Mapping[str, Any], folder: Path, to: str) -> str:
    """Write curves and readings of every variant and seed; returns where they are.

    TensorBoard: `<folder>/tensorboard/<variant>-<seed>`. MLflow: one run for the scorecard, and under it one
    for every variant and seed, in the store that MLFLOW_TRACKING_URI names, or else in `<folder>/mlflow`.

    Args:
        card: a scorecard, as `cupel.run` returns it or as it is read back from its JSON.
        folder: the run folder.
        to: `tensorboard` or `mlflow`.
    """
    check_tracker(to)
    return _to_tensorboard(card, folder) if to == "tensorboard" else _to_mlflow(card, folder)


def curves_of(card: Mapping[str, Any], variant: str, seed: int) -> Iterator[tuple[str, float, int]]:
    """Name, value and step (the epoch) of every point: `fit/loss`, `fit/lr`."""
    for entry in card["variants"][variant]["curves"].get(str(seed), ()):
        for name in ("loss", "lr"):
            if entry.get(name) is not None:
                yield f"{entry.get('at') or entry.get('step', 'fit')}/{name}", float(entry[name]), int(entry["epoch"])


def readings_of(card: Mapping[str, Any], variant: str, seed: int) -> Iterator[tuple[str, float]]:
    """Name and value of every reading of one seed; where some seed lacks it, the mean of those that have it."""
    place, count = list(card["seeds"]).index(seed), len(card["seeds"])
    for probe, cell in card["variants"][variant]["probes"].items():
        for name, reading in cell["readings"].items():
            complete = len(reading["seeds"]) == count
            value = reading["seeds"][place] if complete else reading["value"]
            if value is not None:
                yield f"{probe}/{name}{'' if complete else ' over seeds'}", float(value)


def settings_of(card: Mapping[str, Any], variant: str, seed: int) -> dict[str, str]:
    """What makes this variant and seed: workload and steps, flat."""
    recipe = card["recipe"]
    found = {"variant": variant, "seed": str(seed)} | dict(_flat("workload", recipe["workload"]))
    for number, step in enumerate(recipe["variants"][variant], 1):
        found |= dict(_flat(f"step{number}", step))
    return found


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(f"{name}.{key}", part)
    elif isinstance(value, (list, tuple)) and any(isinstance(v, (Mapping, list)) for v in value):
        for number, part in enumerate(value, 1):
            yield from _flat(f"{name}.{number}", part)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, default=str)


def _to_tensorboard(card: Mapping[str, Any], folder: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages it imports, which no user of cupel can mend
        from torch.utils.tensorboard import SummaryWriter

    top = folder / "tensorboard"
    for variant in card["variants"]:
        for seed in card["seeds"]:
            writer = SummaryWriter(str(top / f"{variant}-{seed}"))
            try:
                for name, value, step in curves_of(card, variant, seed):
                    writer.add_scalar(name, value, step)
                for name, value in readings_of(card, variant, seed):
                    writer.add_scalar(name, value, 0)
            finally:
                writer.close()
    return str(top)


def _server() -> str:
    """Where MLflow's own setting says that runs go; empty if it says nothing."""
    return os.environ.get("MLFLOW_TRACKING_URI", "")


def _to_mlflow(card: Mapping[str, Any], folder: Path) -> str:
    # Read by MLflow when it is imported: cupel sends nothing anywhere unless it is asked to.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.tracking import MlflowClient

    with _quiet():
        here = (folder / "mlflow").resolve()
        where = _server() or f"sqlite:///{here}.db"
        client = MlflowClient(tracking_uri=where)
        workload = card["recipe"]["workload"]
        name = f"cupel {workload if isinstance(workload, str) else next(iter(workload))}"
        known = client.get_experiment_by_name(name)
        place = None if _server() else here.as_uri()
        experiment = known.experiment_id if known else client.create_experiment(name, artifact_location=place)
        top = client.create_run(experiment, run_name=folder.resolve().name).info.run_id
        client.log_dict(top, dict(card), "scorecard.json")
        for variant in card["variants"]:
            for seed in card["seeds"]:
                _mlflow_run(client, experiment, top, card, variant, seed)
        client.set_terminated(top)
    return where


@contextmanager
def _quiet() -> Iterator[None]:
    log = logging.getLogger("mlflow")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _mlflow_run(client: Any, experiment: str, above: str, card: Mapping[str, Any], variant: str, seed: int) -> None:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    run = client.create_run(experiment, tags={"mlflow.parentRunId": above}, run_name=f"{variant}-{seed}").info.run_id
    points = [Metric(n, v, now, step) for n, v, step in curves_of(card, variant, seed)]
    points += [Metric(n, v, now, 0) for n, v in readings_of(card, variant, seed)]
    settings = [Param(k, v[:_LONGEST]) for k, v in settings_of(card, variant, seed).items()]
    for low in range(0, len(settings), 100):
        client.log_batch(run, params=settings[low : low + 100])
    for low in range(0, len(points), _BATCH):
        client.log_batch(run, metrics=points[low : low + _BATCH])
    client.set_terminated(run)
