"""Arrays out of an `.npz` whose author is not trusted: every size is checked before a byte is unpacked."""

from __future__ import annotations

import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from cupel.core.errors import DataError
from cupel.intake.datasets.raw import count_of, must_fit, regular_file, shown

_MOST_ARRAYS = 1000
_BROKEN = (
    OSError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)


@dataclass(frozen=True)
class Stored:
    """One array of an npz by its header: nothing of it has been read."""

    key: str
    member: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    start: int  # bytes of header

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Npz:
    """An npz open for reading; `arrays` are its headers by key.

    Raises:
        DataError: it is no zip, is cut short, repeats a name, or holds an array that is not plain numbers or text,
            or whose header does not fit its bytes.
        MissingData: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        regular_file(path)
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except _BROKEN as error:
            raise DataError(
                f"{path} must be an npz archive; it cannot be opened: {error}. Write it again with numpy.savez."
            ) from None
        try:
            self.arrays = self._headers()
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> Npz:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def _headers(self) -> dict[str, Stored]:
        members = self._zip.infolist()
        if len(members) > _MOST_ARRAYS:
            raise DataError(
                f"{self.path} must hold at most {_MOST_ARRAYS:,} arrays; got {len(members):,}. Store x and y only."
            )
        found: dict[str, Stored] = {}
        for member in members:
            if not member.filename.endswith(".npy"):
                continue
            key = member.filename[: -len(".npy")]
            if key in found:
                raise DataError(f"{self.path} must hold each array once; {shown(key)} stands twice. Write it again.")
            found[key] = self._header(key, member)
        if not found:
            raise DataError(f"{self.path} must hold arrays; it holds none. Write it with numpy.savez(path, x=x, y=y).")
        return found

    def _header(self, key: str, member: zipfile.ZipInfo) -> Stored:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self._wrong(key, "be stored plainly or deflated, as numpy does", f"method {member.compress_type}")
        try:
            with self._zip.open(member) as stream:
                version = np.lib.format.read_magic(stream)
                if version not in ((1, 0), (2, 0), (3, 0)):
                    raise ValueError(f"npy version {version}")
                shape, fortran, dtype = _read_header(stream, version)
                start = stream.tell()
        except _BROKEN as error:
            raise self._wrong(
                key, "be a npy array", str(error).splitlines()[0][:120] if str(error) else "none"
            ) from None
        if dtype.hasobject:
            raise self._wrong(
                key, "hold numbers or text", "Python objects, which only pickle can read and may run code"
            )
        if dtype.kind not in "biufSU" or dtype.subdtype or dtype.itemsize == 0:
            raise self._wrong(key, "hold numbers or text", str(dtype)[:60])
        stored = Stored(key, member, tuple(int(n) for n in shape), dtype, bool(fortran), start)
        if any(n < 0 for n in stored.shape) or member.file_size - start != stored.size * dtype.itemsize:
            raise self._wrong(
                key,
                f"hold {member.file_size - start:,} bytes, as the archive says",
                f"a header of {dtype} {list(stored.shape)[:6]}, {stored.size * dtype.itemsize:,} bytes",
            )
        return stored

    def read(self, keys: Iterable[str]) -> dict[str, np.ndarray]:
        """The arrays under `keys`.

        Raises:
            DataError: they do not fit in memory, or are cut short or altered.
        """
        wanted = [self.arrays[key] for key in dict.fromkeys(keys)]
        total = sum(s.size * s.dtype.itemsize for s in wanted)
        must_fit(total, f"{count_of(len(wanted), 'array')} of {self.path}", "Store fewer examples, or smaller ones.")
        return {stored.key: self._array(stored) for stored in wanted}

    def _array(self, stored: Stored) -> np.ndarray:
        values = np.empty(stored.size, dtype=stored.dtype)
        room = values.view(np.uint8) if stored.size else np.empty(0, np.uint8)
        at = 0
        try:
            with self._zip.open(stored.member) as stream:
                stream.read(stored.start)
                while at < len(room):
                    got = stream.read(min(2**22, len(room) - at))
                    if not got:
                        raise EOFError(f"it ends after {at:,} of {len(room):,} bytes")
                    room[at : at + len(got)] = np.frombuffer(got, np.uint8)
                    at += len(got)
                if stream.read(1):
                    raise EOFError("it goes on after its end")
        except _BROKEN as error:
            raise self._wrong(stored.key, "be whole", str(error)[:120]) from None
        if not values.dtype.isnative:
            values = values.byteswap().view(values.dtype.newbyteorder("="))
        if values.dtype.kind == "U" and values.size and values.view(np.uint32).max() > 0x10FFFF:
            raise self._wrong(stored.key, "hold text", "numbers that are no characters")
        return values.reshape(stored.shape, order="F" if stored.fortran else "C")

    def _wrong(self, key: str, must: str, got: str) -> DataError:
        return DataError(f"array {shown(key)} of {self.path} must {must}; got {got}. Write it again with numpy.savez.")


def _read_header(stream: IO[bytes], version: tuple[int, int]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype. numpy reads the text of the header as a literal, in at most 10,000 characters."""
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd literals, and files of Python 2
            return reader(stream, max_header_size=10_000)
    except _BROKEN:
        raise
    except Exception as error:  # fed a text that is none, the parser raises whatever its parts do
        raise ValueError(f"a header that cannot be read ({type(error).__name__})") from None
