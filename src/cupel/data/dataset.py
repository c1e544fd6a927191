"""The entry of one named data set: literal facts, read from source text without importing anything heavy."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from cupel.core.errors import ContractError

Kind = Literal["images", "series", "features", "graph", "interactions", "texts"]


@dataclass(frozen=True)
class File:
    """One file as its publisher offers it.

    Args:
        path: where it belongs, below the data folder.
        urls: mirrors, tried in this order; `{member}` stands for the member of a collection.
        bytes: its exact size; 0 where nobody published it.
        sha256, md5: checksums as published or computed on the real file; empty where unknown.
        unpacks: the folder or file, below the data folder, that the archive holds once it is unpacked;
            empty for a file that is read as it is. An archive goes when it has been unpacked.
        unpacked_bytes: at most this many bytes come out of the archive.
    """

    path: str
    urls: tuple[str, ...]
    bytes: int = 0
    sha256: str = ""
    md5: str = ""
    unpacks: str = ""
    unpacked_bytes: int = 0

    @property
    def wanted(self) -> str:
        """What must be on the machine for this file to count as here."""
        return self.unpacks or self.path


@dataclass(frozen=True)
class DataSet:
    """What is known about a data set before any of it is read.

    Args:
        name: what users type; the file stem with dashes.
        title: one line.
        kind: what one example is; graphs, interactions and texts are no rows of numbers and have readers of their own.
        licence: as the publisher states it, or that none is stated.
        source: who made it, where it is described.
        folder: its folder below the data folder.
        examples, classes: how many (0 where it differs between the members of a collection).
        files: what `fetch` brings; empty for a set that comes with a package or that nobody offers in a safe format.
        also: groups of files that hold the same data in another format; a group counts when it is complete.
        members: names of a collection's members; a user then types `name/member`.
        extra: the optional dependency that reading needs.
        remark: one sentence that users must know, such as what is missing.
    """

    name: str
    title: str
    kind: Kind
    licence: str
    source: str
    folder: str
    examples: int
    classes: int
    files: tuple[File, ...] = ()
    also: tuple[tuple[str, ...], ...] = ()
    members: tuple[str, ...] = ()
    extra: str = ""
    remark: str = ""

    @property
    def bytes(self) -> int:
        """What a fetch moves; 0 when the size of a file is unknown."""
        return sum(f.bytes for f in self.files) if all(f.bytes for f in self.files) else 0

    def of(self, member: str) -> DataSet:
        """The entry of one member of a collection: `{member}` filled in."""
        files = tuple(
            replace(f, **{k: getattr(f, k).replace("{member}", member) for k in ("path", "unpacks")})
            for f in (replace(f, urls=tuple(u.replace("{member}", member) for u in f.urls)) for f in self.files)
        )
        also = tuple(tuple(p.replace("{member}", member) for p in group) for group in self.also)
        return replace(self, name=f"{self.name}/{member}", files=files, also=also, members=())


@lru_cache(maxsize=128)
def entry_in(path: Path) -> DataSet:
    """The literal `SET = DataSet(...)` of a file, without importing it.

    Raises:
        ContractError: it has none, or one that computes something.
    """
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SET":
            try:
                found = _literal(node.value)
            except (ValueError, TypeError) as error:
                raise ContractError(f"SET of {path} must be literal; got {error}. Write plain values.") from None
            if isinstance(found, DataSet) and found.name == path.stem.replace("_", "-"):
                return found
    raise ContractError(
        f"{path} must hold a literal `SET = DataSet(...)` named like the file; it has none. Add it below the imports."
    )


def _literal(node: ast.expr) -> Any:
    """A plain value, or `DataSet(...)` and `File(...)` of plain values."""
    if isinstance(node, ast.Call):
        kinds = {"DataSet": DataSet, "File": File}
        named = ast.unparse(node.func)
        if named not in kinds:
            raise ValueError(f"a call of {named}")
        values = {str(k.arg): _literal(k.value) for k in node.keywords}
        return kinds[named](*(_literal(a) for a in node.args), **values)
    if isinstance(node, ast.Tuple):
        return tuple(_literal(e) for e in node.elts)
    return ast.literal_eval(node)
