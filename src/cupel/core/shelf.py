"""The shelf: artefacts that one method makes and another uses, under typed keys.

A key is written once. Every entry remembers who made it and for which data: a teacher trained on
other data is refused, because it would cost accuracy without any error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar, cast

from torch import Tensor, nn

from cupel.core.errors import ContractError, MissingArtefact

T = TypeVar("T")


@dataclass(frozen=True)
class Key(Generic[T]):
    """Name and type of an artefact."""

    name: str
    kind: type


TEACHER: Key[nn.Module] = Key("teacher", nn.Module)
ORIGINAL: Key[nn.Module] = Key("original", nn.Module)  # the network before it was changed
PARTNER: Key[nn.Module] = Key("partner", nn.Module)  # a teacher that was trained beside the student
MASKS: Key[Mapping[str, Tensor]] = Key("masks", Mapping)  # parameter name -> 0/1 mask of its shape
BITS: Key[Mapping[str, float]] = Key("bits", Mapping)  # layer name -> effective bits per value
FILTERS: Key[Tensor] = Key("filters", Tensor)  # class-wise convolution kernels, [K, k, k]
SOFT_TARGETS: Key[Mapping[str, Tensor]] = Key("soft_targets", Mapping)  # "index" [M] of examples, "shares" [M, K]
FORGETTING: Key[Mapping[str, float]] = Key("forgetting", Mapping)  # how a class was forgotten: rates and sizes
LEXICON: Key[object] = Key("lexicon", object)  # how texts become inputs: an ops.lexicon.Lexicon
SCENE: Key[object] = Key("scene", object)  # how poses become inputs: an ops.poses.Scene
CRITICALITY: Key[Mapping[str, float]] = Key("criticality", Mapping)  # weight -> rise of a loss under its worst change
SENSORS: Key[Mapping[str, tuple[int, ...]]] = Key("sensors", Mapping)  # sensor -> its channels of the input


@dataclass(frozen=True)
class Entry:
    value: object
    maker: str
    fingerprint: str


@dataclass
class Shelf:
    """Artefacts of one run of one recipe.

    Args:
        fingerprint: of the data this shelf belongs to.
        reads, writes: names that the present user may touch; `None` means all.
        maker: who is credited with what is put.
    """

    fingerprint: str = ""
    entries: dict[str, Entry] = field(default_factory=dict)
    reads: frozenset[str] | None = None
    writes: frozenset[str] | None = None
    maker: str = "user"

    def seen_by(self, maker: str, reads: tuple[str, ...], writes: tuple[str, ...]) -> Shelf:
        """The same shelf, limited to what a card declares."""
        return Shelf(self.fingerprint, self.entries, frozenset(reads), frozenset(writes), maker)

    def copy(self) -> Shelf:
        """A shelf that starts with the same entries; later ones are its own."""
        return Shelf(self.fingerprint, dict(self.entries), self.reads, self.writes, self.maker)

    def put(self, key: Key[T], value: T, fingerprint: str | None = None) -> None:
        """Put an artefact; a key holds one for good."""
        if self.writes is not None and key.name not in self.writes:
            raise ContractError(
                f"{self.maker} must declare what it writes; it put {key.name!r}. Add it to `writes` on its card."
            )
        if not isinstance(value, key.kind):
            raise ContractError(
                f"artefact {key.name!r} must be a {key.kind.__name__}; {self.maker} put a {type(value).__name__}. "
                "Put the declared type, or declare another key."
            )
        if key.name in self.entries:
            raise ContractError(
                f"artefact {key.name!r} must be written once; {self.entries[key.name].maker} wrote it before "
                f"{self.maker}. Put the two methods in different variants."
            )
        self.entries[key.name] = Entry(value, self.maker, self.fingerprint if fingerprint is None else fingerprint)

    def get(self, key: Key[T]) -> T:
        """The artefact under `key`, made for the same data."""
        if self.reads is not None and key.name not in self.reads:
            raise ContractError(
                f"{self.maker} must declare what it reads; it asked for {key.name!r}. Add it to `reads` on its card."
            )
        entry = self.entries.get(key.name)
        if entry is None:
            raise MissingArtefact(
                f"{self.maker} must find {key.name!r} on the shelf; it holds {sorted(self.entries) or 'nothing'}. "
                f"Make it in the recipe's `given:`, or run the method that writes it first."
            )
        if entry.fingerprint != self.fingerprint:
            raise MissingArtefact(
                f"{key.name!r} must come from the same data; {entry.maker} made it for data {entry.fingerprint}, this "
                f"workload's are {self.fingerprint}. Give both workloads the same data and data_seed."
            )
        return cast(T, entry.value)

    def __contains__(self, key: Key[T]) -> bool:
        return key.name in self.entries
