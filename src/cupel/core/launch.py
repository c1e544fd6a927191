"""Starts the processes that share a fit, listens to them, and ends them."""

from __future__ import annotations

import atexit
import logging
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from importlib.util import find_spec
from multiprocessing import current_process, get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from cupel.core.errors import ContractError, CupelError, MissingExtra, PlanError
from cupel.core.spread import World

PATIENCE = 600.0  # seconds a process waits for the others before it gives up
_LATE = (
    "every process of a fit must make the same calls; number {} waited {:g} s for another. "
    "Look for a technique that calls the network, or takes long, in one process only."
)
Report = Callable[[Mapping[str, object]], None]


def joined(kind: str, patience: float = PATIENCE) -> World:
    """This process's place in the world that its environment describes in the words of `torchrun`."""
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
        from lightning_fabric.strategies.ddp import DDPStrategy
    except ImportError:
        raise MissingExtra("lightning-fabric", "fabric") from None
    size = int(os.environ["WORLD_SIZE"])
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment(), timeout=timedelta(seconds=patience))
    fabric = Fabric(accelerator=kind, strategy=strategy, devices=here, num_nodes=size // here)
    if not torch.distributed.is_initialized():
        atexit.register(_leave)
    log = logging.getLogger("lightning_fabric")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        fabric.launch()
    finally:
        log.setLevel(level)
    return World(fabric.global_rank, fabric.world_size, fabric.device)


def _leave() -> None:
    """Close the group before the interpreter ends: its threads, left running, would abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launched(
    function: Callable[..., Any], args: tuple[Any, ...], size: int, kind: str, report: Report | None = None
) -> Any:
    """`function(world, report, *args)` in `size` new processes; what the first of them returns."""
    if find_spec("lightning_fabric") is None:
        raise MissingExtra("lightning-fabric", "fabric")
    if current_process().daemon:
        raise PlanError(
            f"devices must be 1 in a daemon process, which may start no others; got {size}. "
            "Call cupel from a plain process, or run it under torchrun."
        )
    if kind == "cuda" and torch.cuda.device_count() < size:
        raise PlanError(f"devices must be at most {torch.cuda.device_count()} on this machine; got {size}. Lower it.")
    try:
        work = pickle.dumps((function, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ContractError(
            f"what trains on several devices must travel between processes; pickling it failed: {error}. "
            "Define its classes at module level, without closures."
        ) from None
    # The parent keeps the meeting point on a port of its own choosing: no other job can take it in between.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    start = get_context("spawn")
    lines: list[Connection] = []
    crew: list[Any] = []
    try:
        for rank in range(size):
            ours, theirs = start.Pipe()
            told = (theirs, rank, size, store.port, kind, PATIENCE, torch.get_num_threads(), work, report is not None)
            crew.append(start.Process(target=_work, args=told, daemon=True))
            crew[-1].start()
            theirs.close()
            lines.append(ours)
        return _listen(lines, crew, report)
    finally:
        for line in lines:
            line.close()
        for process in crew:
            if process.pid is not None:  # Ctrl-C may come while one is being started
                process.terminate()
                process.join()


def _listen(lines: Sequence[Connection], crew: Sequence[Any], report: Report | None) -> Any:
    """Until every process is done, or one of them fails."""
    open_, answer, up = list(lines), None, 0
    while open_:
        for line in wait(list(open_)):
            assert isinstance(line, Connection)
            try:
                kind, what = line.recv()
            except EOFError:
                _ended(crew[lines.index(line)], lines.index(line))
            if kind == "up":
                up += 1
                for each in lines if up == len(lines) else ():
                    each.send("go")
            elif kind == "log" and report is not None:
                report(what)
            elif kind == "failed":
                # Others fail when one of them vanishes, and may say so before its line is seen to be dead.
                if not issubclass(what[0], CupelError) and wait([p.sentinel for p in crew], timeout=2):
                    rank = next(n for n, p in enumerate(crew) if p.exitcode is not None)
                    _ended(crew[rank], rank)
                raise _revived(*what)
            elif kind == "done":
                answer = pickle.loads(what) if line is lines[0] else answer
                open_.remove(line)
    return answer


def _ended(process: Any, rank: int) -> None:
    process.join(5)
    raise CupelError(
        f"every process of a fit must report; number {rank} ended with exit code {process.exitcode} before it did. "
        'Look for a lack of memory (-9), or guard a script\'s calls with `if __name__ == "__main__":`.'
    )


def _revived(kind: type[BaseException], text: str, rank: int, trace: str) -> BaseException:
    """The error of another process: its type and words, and where it happened as a note."""
    kind = kind if issubclass(kind, Exception) else CupelError
    error = kind.__new__(kind)
    error.args = (text,)
    error.add_note(f"in process {rank} of the fit:\n{trace}")
    return error


def _follow() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(
    line: Connection, rank: int, size: int, port: int, kind: str, patience: float, threads: int, work: bytes, logs: bool
) -> None:
    """The life of one process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us, or takes us with it when it is killed
    threading.Thread(target=_follow, daemon=True).start()
    torch.set_num_threads(threads)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": "0"}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}

    def report(event: Mapping[str, object]) -> None:
        if rank == 0:
            line.send(("log", dict(event)))

    try:
        function, args = pickle.loads(work)
        import lightning_fabric  # noqa: F401  # it takes its time; nobody's patience runs before all have it

        line.send(("up", rank))
        line.recv()
        answer = function(joined(kind, patience), report if logs else None, *args)
        line.send(("done", pickle.dumps(answer) if rank == 0 else b""))
    except BaseException as error:
        late = isinstance(error, RuntimeError) and "imed out" in str(error)  # gloo has no type of its own for it
        words = (ContractError, _LATE.format(rank, patience)) if late else (type(error), str(error))
        line.send(("failed", (*words, rank, traceback.format_exc())))
    try:
        line.recv()  # Stay: a process that leaves first fails the others before its own words are heard.
    except EOFError:
        torch.distributed.destroy_process_group()
