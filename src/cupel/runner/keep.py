"""A run folder while its run is under way: the lock, what is finished, and how far it is.

Everything that a killed run would need again lies in `.cupel` inside the folder, and goes when the
scorecard is written. Networks are kept as plain data (`storage.blueprint`), never pickled; one that has no
plain form is made again on resuming, from the last step that has.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cupel.core.errors import CupelError, RecipeError
from cupel.storage.files import explained, replace_file

HIDDEN = ".cupel"
_FRAME = (HIDDEN, "models", "artefacts")


@dataclass
class Keeper:
    """The hidden part of one run folder, locked by this process."""

    folder: Path
    resumed: bool = False

    @property
    def hidden(self) -> Path:
        return self.folder / HIDDEN

    def keep_node(self, key: str, data: bytes) -> None:
        """Write a finished node, as `plain_node` made it."""
        replace_file(self.hidden / "nodes" / f"{key}.safetensors", data)

    def kept_node(self, key: str, packages: frozenset[str]) -> tuple[Any, list[dict[str, Any]]] | None:
        """Network, shelf and log of a finished node, or None. A damaged file is absent: the work is done again."""
        from cupel.storage.blueprint import built
        from cupel.storage.state import unpacked

        path = self.hidden / "nodes" / f"{key}.safetensors"
        if not path.exists():
            return None
        try:
            tensors, extra = unpacked(path)
            return built(extra["value"], tensors, packages), extra["curve"]
        except (CupelError, KeyError):
            return None

    def keep_probe(self, name: str, found: Mapping[str, Any]) -> None:
        replace_file(self.hidden / "probes" / f"{name}.json", json.dumps(found))

    def kept_probe(self, name: str) -> dict[str, Any] | None:
        path = self.hidden / "probes" / f"{name}.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found

    def tell(self, what: str, done: int, total: int) -> None:
        """Say how far the run is, for whoever looks into the folder."""
        path = self.hidden / "progress.json"
        told = {"done": done, "total": total, "what": what, "started": self._started(), "pid": os.getpid()}
        replace_file(path, json.dumps(told))

    def _started(self) -> str:
        return str(json.loads((self.hidden / "run.json").read_text(encoding="utf-8"))["started"])

    def failure(self, name: str, trace: str) -> str:
        """Save a traceback; returns its path within the folder."""
        (self.folder / "failures").mkdir(exist_ok=True)
        replace_file(self.folder / "failures" / f"{name}.txt", trace)
        return f"failures/{name}.txt"

    def finish(self) -> None:
        """The scorecard is written: nothing will be resumed."""
        for name in ("nodes", "probes"):
            shutil.rmtree(self.hidden / name, ignore_errors=True)
        (self.hidden / "run.json").unlink(missing_ok=True)  # a kill before this leaves a run to resume, its work done
        shutil.rmtree(self.hidden, ignore_errors=True)


def plain_node(parts: object, curve: list[dict[str, Any]]) -> bytes:
    """A finished node as the bytes of a safetensors file; empty where a network has no plain form."""
    from cupel.storage.blueprint import drawn
    from cupel.storage.state import packed

    try:
        plain, tensors = drawn(parts)
        return packed(tensors, {"value": plain, "curve": curve})
    except CupelError:
        return b""


@contextmanager
def kept(folder: Path, recipe: Mapping[str, Any], device: str, resume: bool) -> Iterator[Keeper]:
    """A locked run folder: a new one, or with `resume` one that was left unfinished.

    Raises:
        RecipeError: it holds files, is in use, belongs to another recipe, or cannot be resumed.
        FolderError: it cannot be written, or the disk is full.
    """
    advice = f"continue with: cupel run --resume {folder}"
    with explained(folder, advice if resume else f"run the recipe again, or {advice}"):
        if resume:
            _check_resumable(folder)
        else:
            _make(folder)
        with _locked(folder):
            facts, path = _facts(recipe, device), folder / HIDDEN / "run.json"
            if resume:
                _check_same(path, facts)
                for half in folder.rglob("*.part"):  # what a killed process was writing
                    half.unlink(missing_ok=True)
            else:
                _check_new(folder)  # once more: another run may have been quicker
                text = yaml.safe_dump(_listed(recipe), sort_keys=False, allow_unicode=True)
                replace_file(folder / "recipe.yaml", text)
                started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                replace_file(path, json.dumps(facts | {"started": started}, default=str))
            yield Keeper(folder, resume)


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _listed(v) for k, v in value.items()}
    return [_listed(v) for v in value] if isinstance(value, (list, tuple)) else value


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise RecipeError(f"the run folder must be a folder; {folder} is a file. Give another --out.") from None
    _check_new(folder)
    for name in (*_FRAME, f"{HIDDEN}/nodes", f"{HIDDEN}/probes"):
        (folder / name).mkdir(exist_ok=True)


def _check_new(folder: Path) -> None:
    """Empty, or with the bare frame that a run leaves which is killed before it begins."""
    if (folder / HIDDEN / "run.json").exists():
        raise RecipeError(
            f"the run folder must be new or empty; {folder} holds an unfinished run. "
            f"Continue it with: cupel run --resume {folder}"
        )
    if any(p.name not in (*_FRAME, "recipe.yaml") and not p.name.endswith(".part") for p in folder.iterdir()) or (
        (folder / "recipe.yaml").exists() and not (folder / HIDDEN).exists()
    ):
        raise RecipeError(f"the run folder must be new or empty; {folder} holds files. Give another --out.")


def _check_resumable(folder: Path) -> None:
    if (folder / HIDDEN / "run.json").exists() and (folder / "recipe.yaml").exists():
        return
    if (folder / "scorecard.json").exists():
        shutil.rmtree(folder / HIDDEN, ignore_errors=True)  # the rest of a run that was killed after its last deed
        raise RecipeError(f"a run to resume must be unfinished; {folder} has its scorecard. There is nothing to do.")
    raise RecipeError(f"a run to resume must have begun; {folder} holds none. Start it with `cupel run`.")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system drops it when this process ends, however it ends."""
    with open(folder / HIDDEN / "lock", "w", encoding="utf-8") as lock:
        for again in range(5, -1, -1):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not again:
                    raise RecipeError(
                        f"a run folder must belong to one run; another process is at work in {folder}. Wait for it."
                    ) from None
                time.sleep(0.02)  # whoever looks whether a run is alive holds the lock for an instant
        yield


def _facts(recipe: Mapping[str, Any], device: str) -> dict[str, Any]:
    from importlib.metadata import version

    from cupel import __version__

    return {"recipe": recipe, "device": device, "cupel": __version__, "torch": version("torch")}


def _check_same(path: Path, facts: Mapping[str, Any]) -> None:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        before = {}
    now = json.loads(json.dumps(facts, default=str))
    for key, value in now.items():
        if before.get(key) != value:
            told = "another recipe" if key == "recipe" else f"{key} {before.get(key)}, now it is {value}"
            raise RecipeError(
                f"a run must be resumed as it began, so that its numbers can be compared; {path.parent.parent} began "
                f"with {told}. Run the recipe into a new folder."
            )
