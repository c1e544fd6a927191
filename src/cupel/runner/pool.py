"""Where jobs run on one machine: in this process, or in worker processes.

Both are `concurrent.futures` executors. A worker process that dies takes only its own job with it, and
workers together stay below a limit of memory.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from cupel.core.errors import CupelError

WORKER_BYTES = 600 * 2**20  # what a worker holds before its job: Python and torch
RESERVE = 0.1  # share of the memory that is left to everything else


class WorkerDied(CupelError):
    """The process of a job ended before its job did."""


class Here(Executor):
    """Runs a job at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass
class _Job:
    future: Future[Any]
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    alone: bool = False  # it was stopped once to save memory
    stopped: bool = False


@dataclass(eq=False)
class _Worker:
    """One process behind its own executor."""

    pool: ProcessPoolExecutor
    process: Any = None

    def send(self, job: _Job) -> Future[Any]:
        done = self.pool.submit(job.fn, *job.args)
        if self.process is None:
            self.process = next(iter(self.pool._processes.values()))
        return done

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()

    def held(self) -> int:
        """Bytes of memory that the process holds."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except (OSError, ValueError, IndexError, AttributeError):
            return 0  # it ended meanwhile, or this system has no /proc
        return pages * os.sysconf("SC_PAGE_SIZE")


class Workers(Executor):
    """Worker processes, each with its own pipe: what kills one of them fails one job.

    Args:
        count: most workers at a time.
        memory: bytes that all workers together may hold; by default what the machine, or the container,
            has free now, less a reserve. When they come near it, the youngest job is stopped and runs
            again later, alone. A job that is alone and still passes the limit fails.
    """

    def __init__(self, count: int, memory: int | None = None) -> None:
        self.memory = memory or int(free_memory() * (1 - RESERVE))
        self.count = max(1, min(count, self.memory // WORKER_BYTES))
        self._lock = threading.RLock()
        self._queue: list[_Job] = []
        self._idle: list[_Worker] = []
        self._busy: dict[_Worker, _Job] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        job = _Job(Future(), fn, args)
        with self._lock:
            self._queue.append(job)
            self._feed()
        return job.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._closed.set()
        with self._lock:
            workers = [*self._idle, *self._busy]
        for worker in workers:
            if cancel_futures:
                worker.kill()
            worker.pool.shutdown(wait=wait and not cancel_futures, cancel_futures=True)

    def _feed(self) -> None:
        """Give waiting jobs to free workers. A job that must be alone waits until all others are done."""
        while self._queue and len(self._busy) < self.count and not self._closed.is_set():
            if any(job.alone for job in self._busy.values()) or (self._queue[0].alone and self._busy):
                return
            job = self._queue.pop(0)
            worker = self._idle.pop() if self._idle else _Worker(_one_process())
            self._busy[worker] = job
            worker.send(job).add_done_callback(partial(self._ended, worker))

    def _ended(self, worker: _Worker, done: Future[Any]) -> None:
        error = WorkerDied("the run was stopped") if done.cancelled() else done.exception()
        with self._lock:
            job = self._busy.pop(worker)
            if isinstance(error, BrokenProcessPool):
                worker.pool.shutdown(wait=False)
                again = job.stopped and not job.alone and not self._closed.is_set()
                if again:
                    job.alone, job.stopped = True, False
                    self._queue.append(job)
                error = None if again else WorkerDied(self._why(worker, job))
            else:
                again = False
                self._idle.append(worker)
            self._feed()
        if error is not None:
            job.future.set_exception(error)
        elif not again:
            job.future.set_result(done.result())

    def _why(self, worker: _Worker, job: _Job) -> str:
        if job.stopped:
            return (
                f"a job must fit into {self.memory / 2**30:.1f} GiB of memory; it passed that alone and was stopped. "
                "Use a smaller batch or network, or a machine with more memory."
            )
        worker.process.join(5)
        code = worker.process.exitcode or 0
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        often = " The kernel does that when memory runs out: try a smaller --jobs." if code == -signal.SIGKILL else ""
        return f"the process of this job ended {how}.{often}"

    def _watch(self) -> None:
        while not self._closed.wait(0.25):
            with self._lock:
                if sum(w.held() for w in (*self._idle, *self._busy)) <= self.memory or not self._busy:
                    continue
                if self._idle:
                    worker = self._idle.pop()
                else:
                    worker = list(self._busy)[-1]  # the youngest has the least to lose
                    self._busy[worker].stopped = True
                worker.kill()


def _one_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_at_home)


def _at_home() -> None:
    """A worker leaves Ctrl-C to its parent, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def free_memory() -> int:
    """Bytes of memory free for new work: of the machine, or of the container if that is less."""
    free = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
        cgroup = Path("/sys/fs/cgroup")
        top = (cgroup / "memory.max").read_text().strip()
        if top != "max":
            free.append(int(top) - int((cgroup / "memory.current").read_text()))
    except (OSError, ValueError, StopIteration):
        pass
    if free:
        return max(0, min(free))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if sys.platform != "win32" else 8 * 2**30
