"""Zip archives of tensors, opened without trusting a word of them.

Archives of torch store every entry as it is, so an entry that is compressed, twice there, or larger than the
file that holds it marks a file that torch did not write. Tensors come out only as bytes with a checked shape;
pickles go through torch's weights-only reader and nothing else.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from typing import IO, Any

import torch
from torch import Tensor

from cupel.core.errors import CupelError

MAX_ENTRIES = 200_000
MAX_JSON = 1 << 28  # bytes of one JSON entry
MAX_SPREAD = 1 << 24  # elements that a tensor may have beyond those in its storage, by strides of zero
DTYPES: Mapping[int, torch.dtype] = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
}


class Archive:
    """The entries of a zip file under its one root folder, each read only when it is asked for."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.name = name
        try:
            self._zip = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, OSError, ValueError, OverflowError, UnicodeError, NotImplementedError) as error:
            raise CupelError(
                f"{name} must be a whole zip archive; reading it failed: {error}. Take another copy of the file."
            ) from None
        size = file.seek(0, io.SEEK_END)
        found = self._zip.infolist()
        names = [info.filename for info in found]
        _must(0 < len(found) <= MAX_ENTRIES, name, f"hold 1 to {MAX_ENTRIES} entries; it holds {len(found)}")
        twice = next((n for n, many in Counter(names).items() if many > 1), None)
        _must(twice is None, name, f"name every entry once; {twice!r} is there twice")
        for info in found:
            plain = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
            _must(plain and not info.flag_bits & 1, name, f"store its entries uncompressed; {info.filename!r} is not")
            _must(_safe_name(info.filename), name, f"name its entries plainly; got {info.filename[:80]!r}")
        total = sum(info.file_size for info in found)
        _must(total <= size, name, f"be at least as large as its entries; they claim {total} bytes of {size}")
        roots = {n.partition("/")[0] for n in names}
        self.root = roots.pop() if len(roots) == 1 else ""
        self.names = [n.removeprefix(f"{self.root}/") for n in names] if self.root else names

    def __contains__(self, entry: str) -> bool:
        return entry in self.names

    def read(self, entry: str) -> bytes:
        if entry not in self.names:
            raise CupelError(f"{self.name} must hold {entry}; it does not. Write the file again, or take another copy.")
        try:
            return self._zip.read(f"{self.root}/{entry}" if self.root else entry)
        except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
            raise CupelError(
                f"{self.name} must be whole; its entry {entry} cannot be read: {error}. Take another copy of the file."
            ) from None

    def json(self, entry: str) -> Any:
        data = self.read(entry)
        _must(len(data) <= MAX_JSON, self.name, f"keep {entry} under {MAX_JSON} bytes; it has {len(data)}")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CupelError(f"{self.name} must hold JSON in {entry}; reading it failed: {error}.") from None


def _must(holds: bool, name: str, what: str) -> None:
    if not holds:
        raise CupelError(f"{name} must {what}. torch writes no such file: take another copy from its source.")


def _safe_name(name: str) -> bool:
    parts = name.split("/")
    return len(name) <= 512 and "\\" not in name and "\0" not in name and ".." not in parts and parts[0] != ""


def weights_only(data: bytes, name: str) -> Any:
    """What a file of `torch.save` holds, read with `weights_only=True`; nothing in it can run.

    Raises:
        CupelError: cut short, not written by torch.save, or with other things in it than tensors and plain values.
    """
    if data[:2] == b"PK":
        Archive(io.BytesIO(data), name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickle protocols; what cannot be read is told below
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        said = str(error)
        named = re.search(r"GLOBAL ([A-Za-z_][\w.]*)", said)
        kind = named[1] if named else "other objects"
        if "GLOBAL" in said or "nsupported" in said:
            raise CupelError(
                f"{name} must hold tensors alone; it is a pickle with more in it ({kind}), which could run code. "
                "Save the weights with torch.save(model.state_dict(), path) or as safetensors."
            ) from None
        raise CupelError(f"{name} must be a whole file of torch.save; reading it failed: {said[:200]}.") from None
    except Exception as error:  # torch's reader meets hostile bytes here: any failure means the same to the user
        raise CupelError(
            f"{name} must be a whole file of torch.save; reading it failed: {type(error).__name__}: {str(error)[:200]}."
            " Take another copy, or save the state_dict as safetensors."
        ) from None


def number(value: Any, what: str) -> int:
    """A whole number from JSON, plain or as torch writes it: `{"as_int": 3}`."""
    if isinstance(value, dict) and set(value) == {"as_int"}:
        value = value["as_int"]
    if type(value) is not int or abs(value) >= 1 << 63:
        raise CupelError(f"{what} must be a whole number of 64 bits; got {str(value)[:60]}. Take another copy.")
    return value


def tensor_from(data: bytes, meta: Mapping[str, Any], what: str) -> Tensor:
    """A view of `data` with the type, shape and strides that `meta` declares, after checking that it lies inside.

    Shapes: as declared; strides are not negative.
    """
    dtype = DTYPES.get(meta.get("dtype", 0))
    if dtype is None or meta.get("layout", 7) != 7:
        raise CupelError(f"{what} must be a dense tensor of a plain type; got type {meta.get('dtype')}. Convert it.")
    sizes, strides = ([number(n, what) for n in meta[key]] for key in ("sizes", "strides"))
    offset, width = number(meta.get("storage_offset", 0), what), dtype.itemsize
    count = math.prod(sizes)
    good = len(sizes) == len(strides) <= 64 and min([*sizes, *strides, offset]) >= 0 and len(data) % width == 0
    reach = offset + 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=False)) if count else 0
    if not good or reach * width > len(data) or count > len(data) // width + MAX_SPREAD:
        raise CupelError(
            f"{what} must fit its storage of {len(data)} bytes; it declares shape {sizes} and strides {strides} at "
            f"{offset}, of {dtype}. The file is damaged or forged: take another copy."
        )
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.as_strided(sizes, strides, offset) if count else torch.empty(sizes, dtype=dtype)


def payloads(archive: Archive, folder: str, kind: str) -> dict[str, tuple[Tensor, Mapping[str, Any]]]:
    """The tensors of a program by name, with what the file says of each; one object where two names are one tensor."""
    legacy, listing = f"data/{folder}/model.pt", f"data/{folder}/model_{folder}_config.json"
    if legacy in archive:
        held = weights_only(archive.read(legacy), f"{archive.name}:{legacy}")
        return {str(k): (plain_tensor(t, f"{kind} {k} of {archive.name}"), {}) for k, t in dict(held).items()}
    tables = archive.json(listing)["config"]
    found: dict[str, tuple[Tensor, Mapping[str, Any]]] = {}
    tied: dict[tuple[object, ...], Tensor] = {}
    read = _once(archive, f"data/{folder}/")
    for name, entry in tables.items():
        what, path = f"{kind} {str(name)[:80]} of {archive.name}", str(entry["path_name"])
        if not path.startswith(("weight_", "constant_", "tensor_")):
            raise CupelError(
                f"{what} must be a tensor; it is an object that only code can read ({path[:60]}). "
                "Export a network whose constants are tensors."
            )
        meta = entry.get("tensor_meta") or {}
        key = (path, json.dumps([meta.get(k) for k in ("dtype", "sizes", "strides", "storage_offset")]))
        if key not in tied:
            data = read(path)
            tied[key] = (
                plain_tensor(weights_only(data, what), what)
                if entry.get("use_pickle")
                else tensor_from(data, meta, what).clone()
            )
        found[str(name)] = (tied[key], meta)
    return found


def _once(archive: Archive, folder: str) -> Callable[[str], bytes]:
    kept: dict[str, bytes] = {}

    def read(path: str) -> bytes:
        if path not in kept:
            kept.clear()
            kept[path] = archive.read(folder + path)
        return kept[path]

    return read


def plain_tensor(value: Any, what: str) -> Tensor:
    """`value`, if it is a dense tensor of torch's own kind; it lies on the CPU."""
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_quantized:
        raise CupelError(f"{what} must be a dense tensor; got a {type(value).__name__}. Export it as a plain tensor.")
    found: Tensor = value.detach()
    return found
