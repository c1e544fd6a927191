"""A network's state on disk: one safetensors file, every tensor in its smallest exact form.

Each tensor is written dense, or as a bit mask with its non-zero values where that takes fewer bytes.
Quantised tensors of torch are written as their integers, scales and zero points. A module that holds
its weights in fewer bits says so with two functions of its own:

    packed_state() -> dict[str, Tensor]           what to store in place of its own parameters and buffers
    load_packed_state(dict[str, Tensor]) -> None  the way back

The header's `cupel` entry says how each tensor is put together again. Nothing is pickled.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from cupel.core.errors import CupelError
from cupel.storage.files import replace_file

FORMAT = "1"
_NARROWER = {torch.float64: (torch.float32,), torch.int64: (torch.int8, torch.int16, torch.int32)}


@dataclass
class _Writer:
    """Tensors of the file under construction, and how to read those that are not plain."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    forms: dict[str, dict[str, Any]] = field(default_factory=dict)
    seen: dict[tuple[object, ...], str] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        if value.is_quantized:
            self._add_quantized(name, value)
            return
        if value.layout != torch.strided:
            raise CupelError(
                f"{name} must be a dense tensor to be stored; its layout is {value.layout}. "
                "Keep its indices and values as two buffers."
            )
        key = (value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and self.seen.setdefault(key, name) != name:
            self.forms[name] = {"same": self.seen[key]}  # tied weights are written once
            return
        self.put(name, value.detach().cpu())

    def put(self, name: str, dense: Tensor) -> None:
        """Dense, or mask and values: whichever makes the smaller file, its lines in the header counted."""
        flat = dense.contiguous().reshape(-1)
        width = flat.element_size()
        held = flat.view(torch.uint8).view(-1, width).ne(0).any(1)
        minus = torch.signbit(flat) & (flat == 0) if flat.is_floating_point() else ~held & held
        held &= ~minus  # pruning by a product leaves minus zeros: one bit each keeps them exact
        form = {"mask": list(dense.shape), "type": _type_name(dense), "minus": bool(minus.any())}
        parts = {"mask": _bits(held), "held": flat[held]} | ({"minus": _bits(minus[~held])} if form["minus"] else {})
        header = sum(75 + len(name) for _ in parts) - 75 + len(json.dumps({name: form}))
        if header + sum(p.numel() * p.element_size() for p in parts.values()) >= flat.numel() * width:
            self.tensors[name] = dense.contiguous().clone()
            return
        self.forms[name] = form
        self.tensors |= {f"{name}::{part}": value for part, value in parts.items()}

    def _add_quantized(self, name: str, value: Tensor) -> None:
        form: dict[str, Any] = {"type": _type_name(value)}
        if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            form |= {"scale": value.q_scale(), "zero": value.q_zero_point()}
        else:
            form["axis"] = value.q_per_channel_axis()
            self.put(name + "::scales", _narrow(value.q_per_channel_scales()))
            self.put(name + "::zeros", _narrow(value.q_per_channel_zero_points()))
        self.forms[name] = form
        self.put(name + "::ints", value.detach().int_repr().cpu())


def _type_name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _bits(flags: Tensor) -> Tensor:
    """Booleans `[N]` as bits, `[ceil(N / 8)]` uint8."""
    return torch.from_numpy(np.packbits(flags.numpy()))


def _flags(bits: Tensor, count: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool))


def _narrow(value: Tensor) -> Tensor:
    """The narrowest type that holds every value of `value` exactly."""
    for dtype in _NARROWER.get(value.dtype, ()):
        if torch.equal(value.to(dtype).to(value.dtype), value):
            return value.to(dtype)
    return value


def _walk(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors in one entry of a state: torch's quantised linear layers keep theirs in a tuple."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            yield from _walk(f"{name}.{i}", part)
    elif value is not None and not isinstance(value, (torch.dtype, bool, int, float, str)):
        raise CupelError(
            f"the state of a network must be tensors to be stored; {name} is a {type(value).__name__}. "
            "Give its module a `packed_state`."
        )


def _packing(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that declare a packed state, by prefix (`""` or `"path."`)."""
    found = {}
    for path, module in model.named_modules():
        if callable(getattr(module, "packed_state", None)):
            found[f"{path}." if path else ""] = module
    return found


def _own_names(prefix: str, module: nn.Module) -> set[str]:
    return {prefix + leaf for leaf in (*module._parameters, *module._buffers)}


def hidden_names(model: nn.Module) -> set[str]:
    """Parameters and buffers that are not stored as they are, because their module packs them."""
    return set().union(*(_own_names(p, m) for p, m in _packing(model).items()))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """What a file of `model` holds, by name: parameters, buffers, and packed states where declared."""
    packing, hidden = _packing(model), hidden_names(model)
    found: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if key not in hidden:
            found |= dict(_walk(key, value))
    for prefix, module in packing.items():
        packed: Mapping[str, Tensor] = module.packed_state()  # type: ignore[operator]
        found |= {prefix + leaf: value for leaf, value in packed.items()}
    return found


def packed(tensors: Mapping[str, Tensor], extra: Mapping[str, object] | None = None) -> bytes:
    """A safetensors file of `tensors`, each in its smallest exact form; `extra` is plain and goes into the header."""
    writer = _Writer()
    for name, value in tensors.items():  # all are alive: tied weights are known by their address
        writer.add(name, value)
    told = {"format": FORMAT, "forms": writer.forms} | ({"extra": extra} if extra else {})
    return to_bytes(writer.tensors, {"cupel": json.dumps(told, separators=(",", ":"))})


def size_of(model: nn.Module) -> int:
    """Bytes that `save_model` would write."""
    return len(packed(state_of(model)))


def save_model(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write the state of `model` to `path`, whole or not at all; returns the bytes written."""
    data = packed(state_of(model))
    replace_file(path, data)
    return len(data)


def load_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file written by `save_model`, each bit for bit as it was.

    Tensors in torch's quantised types come back in those types; a packed state comes back as packed.

    Raises:
        CupelError: the file is absent, cut short, or not one of cupel's.
    """
    return unpacked(path)[0]


def unpacked(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the `extra` of a file that `packed` made.

    Raises:
        CupelError: the file is absent, cut short, or not one of cupel's.
    """
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get("cupel", "{}"))
            raw = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise CupelError(
            f"{path} must be a whole safetensors file; reading it failed: {error}. "
            "Write it again with `save_model`, or take another copy."
        ) from None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise CupelError(
            f"{path} must be a model file of cupel, format {FORMAT}; its header says otherwise. "
            "Write it with `save_model`, or read it with safetensors."
        )
    try:
        forms: dict[str, dict[str, Any]] = told["forms"]
        found = {name: value for name, value in raw.items() if "::" not in name}
        for name, form in forms.items():
            if "::" not in name and "same" not in form:
                found[name] = _rebuilt(name, forms, raw)
        found |= {name: found[form["same"]] for name, form in forms.items() if "same" in form}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise CupelError(
            f"{path} must describe the tensors it holds; its header does not fit them ({type(error).__name__}: "
            f"{error}). Take another copy."
        ) from None
    return found, told.get("extra") or {}


def _rebuilt(name: str, forms: Mapping[str, Mapping[str, Any]], raw: Mapping[str, Tensor]) -> Tensor:
    form = forms.get(name)
    if form is None:
        return raw[name]
    dtype = getattr(torch, form["type"])
    if "mask" in form:
        bits = raw[name + "::mask"]
        if math.prod(form["mask"]) > 8 * bits.numel():  # a header must not ask for more memory than the file backs
            raise ValueError(f"{name} claims {form['mask']} values in {bits.numel()} bytes of mask")
        dense = torch.zeros(form["mask"], dtype=dtype)
        held = _flags(bits, dense.numel())
        dense.view(-1)[held] = raw[name + "::held"]
        if form["minus"]:
            zeros = (~held).nonzero().flatten()
            dense.view(-1)[zeros[_flags(raw[name + "::minus"], len(zeros))]] = -0.0
        return dense
    ints = _rebuilt(name + "::ints", forms, raw)
    if "axis" not in form:
        return torch._make_per_tensor_quantized_tensor(ints, form["scale"], form["zero"])
    scales, zeros = (_rebuilt(name + part, forms, raw) for part in ("::scales", "::zeros"))
    return torch._make_per_channel_quantized_tensor(ints, scales.double(), zeros.long(), form["axis"])


def load_into(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Fill `model`, of the same architecture as the one saved, from `path`, and return it.

    Raises:
        CupelError: the file does not fit, or cannot be read.
    """
    return fill(model, load_state(path), str(path))


def fill(model: nn.Module, stored: Mapping[str, Tensor], source: str = "the state") -> nn.Module:
    """Put tensors by name, as `state_of` and `load_state` give them, into `model`, and return it.

    Raises:
        CupelError: they are not the state of this network; `source` names them in the message.
    """
    packing, hidden = _packing(model), hidden_names(model)
    state = model.state_dict()  # filled in place: its metadata tells torch's modules their version
    try:
        for key, value in list(state.items()):
            if key in hidden:
                del state[key]
            else:
                state[key] = _like(key, value, stored)
        model.load_state_dict(state, strict=not hidden)
        for prefix, module in packing.items():
            own = {name[len(prefix) :]: stored[name] for name in stored if name.rpartition(".")[0] == prefix[:-1]}
            module.load_packed_state({k: v for k, v in own.items() if prefix + k not in state})  # type: ignore[operator]
    except (KeyError, RuntimeError) as error:
        raise CupelError(
            f"{source} must hold the state of this network; it does not: {error}. Build the network it was saved from."
        ) from None
    return model


def _like(key: str, value: object, stored: Mapping[str, Tensor]) -> object:
    """The stored counterpart of one entry of a state."""
    if isinstance(value, Tensor):
        return stored[key]
    if isinstance(value, (tuple, list)):
        return tuple(_like(f"{key}.{i}", part, stored) for i, part in enumerate(value))
    return value
