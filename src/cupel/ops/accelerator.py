"""How long, how much energy, traffic and memory a described accelerator needs for the products of a network.

A model of an accelerator is a function `(Product, Device) -> Estimate`; an engine has one for its design and one for
each rival, and quotes cycles only beside a functional twin whose numbers equal the dense product's. The figures of a
device stand in one file each, `devices/<name>.toml`, with where they come from.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cupel.ops.products import Product

FOLDER = Path(__file__).parent / "devices"


@dataclass(frozen=True)
class Device:
    """A described accelerator.

    Args:
        name: of its file.
        source: of the figures.
        hertz: clock.
        figures: everything else a model of it reads, by name: rows and columns of an array, bytes a cycle, energies.
    """

    name: str
    source: str
    hertz: float
    figures: Mapping[str, float]

    def __getitem__(self, figure: str) -> float:
        return self.figures[figure]


@dataclass(frozen=True)
class Estimate:
    """What one product, or a network of them, costs on a device.

    Args:
        cycles: until the result is written.
        joules: of arithmetic and traffic, without the device's idle power; NaN where no figure is known.
        traffic_bytes: moved to and from the outer memory.
        memory_bytes: held in the inner memory at once, at most.
        macs: multiply-adds that are carried out, those on stored zeros included.
    """

    cycles: int = 0
    joules: float = 0.0
    traffic_bytes: int = 0
    memory_bytes: int = 0
    macs: int = 0

    def __add__(self, other: Estimate) -> Estimate:
        """One after the other: memory is the larger, the rest adds up."""
        return Estimate(
            self.cycles + other.cycles,
            self.joules + other.joules,
            self.traffic_bytes + other.traffic_bytes,
            max(self.memory_bytes, other.memory_bytes),
            self.macs + other.macs,
        )

    def seconds(self, device: Device) -> float:
        """Time at the device's clock."""
        return self.cycles / device.hertz


Model = Callable[[Product, Device], Estimate]


def device(name: str) -> Device:
    """The described device `name`.

    Raises:
        ValueError: no such device.

    >>> device("missing")
    Traceback (most recent call last):
    ...
    ValueError: device must be one of ...
    """
    path = FOLDER / f"{name}.toml"
    if path not in set(FOLDER.glob("*.toml")):
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.toml")))
        raise ValueError(f"device must be one of {known}; got {name!r}. Pick one, or describe yours in a `Device`.")
    found = tomllib.loads(path.read_text())
    return Device(name, found["source"], float(found["hertz"]), found["figures"])


def total(products: Iterable[Product], model: Model, on: Device) -> Estimate:
    """All products, one after the other."""
    found = Estimate()
    for product in products:
        found = found + model(product, on)
    return found
