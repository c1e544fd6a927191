"""A network that the user's own Python makes, with weights from a file that cannot run anything."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cupel.core.errors import CupelError
from cupel.intake.networks.archive import weights_only
from cupel.intake.places import imported
from cupel.storage.state import load_into

PLACE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\Z", re.ASCII)
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights")


def read_factory(place: str, weights: str = "") -> tuple[nn.Module, list[str]]:
    """Import `package.module:name`, which gives a network or is one, and fill it from `weights`.

    Importing runs the user's code, and that is the first note. Weights are safetensors (also cupel's own), or a
    file of torch.save read with `weights_only=True`.

    Raises:
        CupelError: importing or calling fails, what comes is no network, or the weights do not fit it.
    """
    module, _, name = place.partition(":")
    notes = [f"imported {module}, which runs its code"]
    value = imported(place, module, name)
    if not isinstance(value, nn.Module):
        if not callable(value):
            raise CupelError(
                f"{place} must be a network or a function that makes one; got a {type(value).__name__}. "
                "Name a torch.nn.Module, or a function without arguments that returns one."
            )
        value = _called(place, value)
        notes.append(f"called {place}()")
    if not isinstance(value, nn.Module):
        raise CupelError(
            f"{place} must give a torch.nn.Module; it gave a {type(value).__name__}. Return the network itself."
        )
    if weights:
        notes += fill(value, Path(weights))
    else:
        notes.append("no weights file was given: the network has the weights that its code gives it")
    return value, notes


def _called(place: str, value: Any) -> Any:
    try:
        wanted = [
            p.name
            for p in inspect.signature(value).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
    except (TypeError, ValueError):
        wanted = []
    if wanted:
        raise CupelError(
            f"{place} must need no arguments; it asks for {', '.join(wanted)}. Write a function that fills them in, "
            "and name that."
        )
    try:
        return value()
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise CupelError(
            f"{place} must make a network; calling it raised {type(error).__name__}: {error}. Run it on its own first."
        ) from None


def fill(model: nn.Module, path: Path) -> list[str]:
    """Put the tensors of a weights file into `model`, in place; notes on what had to be done.

    Raises:
        CupelError: the file is not whole, is not plain weights, or does not fit the network.
    """
    if not path.is_file():
        raise CupelError(f"a weights file must exist; {path} is none. Check the path.")
    if path.suffix == ".safetensors":
        state, own = _safetensors(path)
        if own:
            _own(model, path)
            return [f"weights from {path.name}, a file of cupel"]
    else:
        state = _pickled(path)
    notes: list[str] = []
    tensors = _unwrapped(state, path, notes)
    tensors = _unprefixed(tensors, model, notes)
    _check(model, tensors, path)
    try:
        model.load_state_dict(dict(tensors), strict=True)
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CupelError(
            f"{path} must fit the network; it does not: {str(error)[:300]}. Build the network it was saved from."
        ) from None
    return [f"weights from {path.name}: {len(tensors)} tensors", *notes]


def _safetensors(path: Path) -> tuple[dict[str, Tensor], bool]:
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("cupel"):
                return {}, True
            return {name: file.get_tensor(name) for name in file.keys()}, False  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CupelError(
            f"{path} must be a whole safetensors file; reading it failed: {str(error)[:200]}. Take another copy."
        ) from None


def _own(model: nn.Module, path: Path) -> None:
    """`storage.state.load_into`, which trusts the header that it wrote itself; here the file may be anyone's."""
    try:
        _check_masks(path)
        load_into(model, path)
    except CupelError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError, SafetensorError) as error:
        raise CupelError(
            f"{path} must hold the state of this network, as cupel writes it; its header does not add up "
            f"({type(error).__name__}: {str(error)[:160]}). Take another copy."
        ) from None


def _check_masks(path: Path) -> None:
    """Refuse a mask with fewer bits than the tensor it is said to make: memory is taken for what the header says."""
    with safe_open(path, framework="pt") as file:
        for name, form in json.loads(file.metadata()["cupel"])["forms"].items():
            if "mask" in form and math.prod(form["mask"]) > 8 * math.prod(file.get_slice(f"{name}::mask").get_shape()):
                raise CupelError(f"{path}: the mask of {name[:80]} must cover it; it does not. Take another copy.")


def _pickled(path: Path) -> Any:
    with path.open("rb") as file:
        data = file.read()
    if not data:
        raise CupelError(f"{path} must hold weights; it is empty. Take another copy.")
    return weights_only(data, str(path))


def _unwrapped(state: Any, path: Path, notes: list[str]) -> dict[str, Tensor]:
    """The mapping of names to tensors inside what a training script saved."""
    for _ in range(3):
        if not isinstance(state, Mapping):
            break
        inner = next((k for k in _WRAPPERS if isinstance(state.get(k), Mapping)), None)
        if inner is None:
            break
        others = [str(k) for k in state if k != inner]
        left = f"; left out {', '.join(others[:5])}" if others else ""
        notes.append(f"the weights lie under {inner!r} in the file{left}")
        state = state[inner]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        kind = next((type(v).__name__ for v in state.values() if not isinstance(v, Tensor)), "nothing") if isinstance(
            state, Mapping) else type(state).__name__  # fmt: skip
        raise CupelError(
            f"{path} must hold a state_dict, names with tensors; it holds {kind}. "
            "Save it with torch.save(model.state_dict(), path)."
        )
    return {str(k): v for k, v in state.items()}


def _unprefixed(state: dict[str, Tensor], model: nn.Module, notes: list[str]) -> dict[str, Tensor]:
    """Names without what DataParallel, torch.compile or Lightning put before all of them."""
    wanted = set(model.state_dict())
    for prefix in ("module.", "_orig_mod.", "model.", "module._orig_mod.", "net."):
        if state and all(k.startswith(prefix) for k in state) and not all(k.startswith(prefix) for k in wanted):
            notes.append(f"names lost their prefix {prefix!r}")
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _check(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """One message that names the first few differences."""
    own = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    missing = [k for k in own if k not in state]
    extra = [k for k in state if k not in model.state_dict()]
    shapes = [
        f"{k} is {list(state[k].shape)} there and {list(own[k].shape)} here"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    found = [f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" for names, what in (
        (missing, "missing"), (extra, "unknown"), (shapes, "of another shape")) if names]  # fmt: skip
    if found:
        raise CupelError(
            f"{path} must hold the weights of this network; {'; '.join(found)}. "
            "Build the network that the weights were saved from."
        )
