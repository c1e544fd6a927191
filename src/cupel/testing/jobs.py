"""Jobs and probes for tests: some work, others crash, hoard memory or divide by zero on purpose."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from cupel.core.context import Context
from cupel.core.scorecard import Readings
from cupel.core.types import Subject


def square(number: int) -> int:
    return number * number


def die(by: int) -> None:
    """End this process by a signal, as a crash or the kernel would."""
    os.kill(os.getpid(), by)


def hold(mebibytes: int, seconds: float, note: str) -> int:
    """Hold so much memory for a while; writes a word into `note` at each beginning."""
    with open(note, "a", encoding="utf-8") as file:
        file.write("begun ")
    block = bytearray(mebibytes * 2**20)
    block[::4096] = b"x" * len(block[::4096])  # only touched pages count
    time.sleep(seconds)
    return mebibytes


@dataclass(frozen=True)
class Deadly:
    """A probe whose process is killed.

    Args:
        once: path of a file; when given, only the first measurement dies, and makes it.
    """

    once: str = ""

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        if not self.once or not Path(self.once).exists():
            if self.once:
                Path(self.once).touch()
            die(9)
        return Readings.of(survived=(1.0, "count", "higher"))


@dataclass(frozen=True)
class Broken:
    """A probe with a mistake in it."""

    def measure(self, subject: Subject, ctx: Context) -> Readings:
        return Readings.of(never=(1 / (len(subject.data.test) - len(subject.data.test)), "count", "higher"))


def work(seconds: float) -> int:
    """Keep one core busy for a while; returns how often it went round."""
    end, turns = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        turns += 1
    return turns
