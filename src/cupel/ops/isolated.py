"""Run a function apart from this process, with a limit of time: a crash or an endless loop is then a result."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    Args:
        kind: `returned`, `raised`, `died` or `timeout`.
        value: what it returned; what it raised, as one line, otherwise.
        error: class of what it raised.
    """

    kind: str
    value: Any = None
    error: str = ""


def can_isolate() -> bool:
    """Whether this system copies a process, with all that it has loaded, in milliseconds."""
    return hasattr(os, "fork") and sys.platform.startswith("linux")


def isolated(function: Callable[[], Any], seconds: float) -> Outcome:
    """The outcome of `function()` in a copy of this process; what it returns is pickled.

    The limit is of processor time, so that a busy machine changes nothing; of wall time it is ten times as long. Where
    a process cannot be copied, it runs here, without a limit.
    """
    if not can_isolate():
        return attempted(function)
    ways = multiprocessing.get_context("fork")
    mine, theirs = ways.Pipe(duplex=False)
    process = ways.Process(target=_run, args=(function, theirs, seconds), daemon=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: there is one thread here
        process.start()
    theirs.close()
    try:
        if not mine.poll(10 * seconds):
            return Outcome("timeout", f"no end after {10 * seconds:g} s of waiting")
        try:
            found: Outcome = mine.recv()
        except EOFError:
            process.join(5)
            code = process.exitcode or 0
            if code == -getattr(signal, "SIGXCPU", 0):
                return Outcome("timeout", f"no end after {seconds:g} s of work")
            return Outcome("died", f"the process ended with {_signal(code)}")
        return found
    finally:
        mine.close()
        _end(process)


def _run(function: Callable[[], Any], pipe: Connection, seconds: float) -> None:
    import faulthandler
    import resource

    faulthandler.disable()  # a death is told by the parent
    most = max(1, math.ceil(seconds))  # a new process has used none
    resource.setrlimit(resource.RLIMIT_CPU, (most, most + 5))
    with suppress(OSError):
        os.setsid()  # so that what it starts can be ended with it
    torch.set_num_threads(1)  # threads of the parent are not here: a parallel kernel would wait for them
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        found = attempted(function)
    try:
        pipe.send(found)
    except Exception as error:
        pipe.send(Outcome("raised", f"its result cannot be sent: {error}", type(error).__name__))
    pipe.close()
    os._exit(0)  # no cleaning up of what belongs to the parent


def attempted(function: Callable[[], Any]) -> Outcome:
    """The outcome of `function()` in this process."""
    try:
        return Outcome("returned", function())
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0][:300]
        return Outcome("raised", f"{type(error).__name__}: {said}", type(error).__name__)


def _signal(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"
    except ValueError:
        return f"status {code}"


def _end(process: Any) -> None:
    process.join(0.2)
    if process.is_alive():
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join(5)
