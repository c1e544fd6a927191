"""Networks of a run as files: the weights in a safetensors file, the architecture as JSON beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cupel.core.errors import CupelError, RecipeError, nearest
from cupel.storage.blueprint import built, drawn
from cupel.storage.cards import write_json
from cupel.storage.files import replace_file
from cupel.storage.state import hidden_names, load_into, load_state, packed, save_model, unpacked


def save_network(model: nn.Module, folder: Path, stem: str, facts: Mapping[str, Any]) -> None:
    """Write `<stem>.safetensors` (what one deploys) and `<stem>.json` (how to build the network, and its origin).

    Tensors outside the network's state, where it has any, go into `<stem>.rest.safetensors`.
    """
    save_model(model, folder / f"{stem}.safetensors")
    told: dict[str, Any] = {**facts, "printed": str(model).splitlines()}
    try:
        plain, tensors = drawn(model)
    except CupelError as reason:
        write_json(folder / f"{stem}.json", told | {"network": None, "why": str(reason)})
        return
    state = {_place(t): name for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    hidden = hidden_names(model)
    places: dict[str, Any] = {}
    for number, tensor in tensors.items():
        name = state.get(_place(tensor))
        if name in hidden:  # their module makes them again from what it packed
            places[number] = [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        elif name is not None:
            places[number] = name
    rest = {number: tensor for number, tensor in tensors.items() if number not in places}
    if rest:
        replace_file(folder / f"{stem}.rest.safetensors", packed(rest))
    write_json(folder / f"{stem}.json", told | {"network": plain, "tensors": places, "rest": bool(rest)})


def _place(tensor: Tensor) -> tuple[object, ...]:
    address = tensor.data_ptr() if tensor.numel() and not tensor.is_quantized else id(tensor)
    return address, tuple(tensor.shape), tensor.dtype


def load_network(folder: Path, stem: str, packages: frozenset[str] = frozenset()) -> nn.Module:
    """The network that `save_network` wrote, in evaluation mode.

    Args:
        packages: of the user's, whose classes the network may be made of.

    Raises:
        CupelError: it is not there, cannot be built from files, or is damaged.
    """
    spec = _spec(folder, stem)
    if spec.get("network") is None:
        raise CupelError(
            f"a network must have a plain form to be built from files; {stem} has none: {spec.get('why', 'not told')}. "
            "Run its recipe again from Python and use the network there."
        )
    path = folder / f"{stem}.safetensors"
    state, size = load_state(path), path.stat().st_size
    tensors = unpacked(folder / f"{stem}.rest.safetensors")[0] if spec.get("rest") else {}
    try:
        for number, place in spec["tensors"].items():
            tensors[number] = state[place].clone() if isinstance(place, str) else _empty(place[0], place[1], size)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CupelError(f"{folder / stem}.json must fit its weights; it does not: {error}. Run it again.") from None
    made = built(spec["network"], tensors, packages)
    if not isinstance(made, nn.Module):
        raise CupelError(f"{folder / stem}.json must describe a network; it does not. Run the recipe again.")
    return load_into(made, path).eval()


def _empty(shape: list[int], dtype: str, size: int) -> Tensor:
    if math.prod(shape) > 64 * size:  # a bit a value is the least that anything packs into
        raise ValueError(f"{shape} values cannot come from a file of {size} bytes")
    kind = getattr(torch, dtype)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"{dtype} is no type of a tensor")
    return torch.zeros(shape, dtype=kind)


def _spec(folder: Path, stem: str) -> dict[str, Any]:
    path = folder / f"{stem}.json"
    there = sorted(p.name.removesuffix(".json") for p in folder.glob("*.json"))
    if stem not in there:
        raise RecipeError(
            f"a network must be one of the run's; got {stem!r}.{nearest(stem, there)} {folder} holds "
            f"{', '.join(there[:8]) or 'none'}{' and more' if len(there) > 8 else ''}."
        )
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CupelError(f"{path} must be JSON; reading it failed: {error}. Run the recipe again.") from None
    if not isinstance(spec, dict):
        raise CupelError(f"{path} must describe a network; it does not. Run the recipe again.")
    return spec
