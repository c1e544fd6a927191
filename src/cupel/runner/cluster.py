"""Jobs on a Ray cluster; Ray does the scheduling, cupel has none of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from cupel.core.errors import MissingExtra
from cupel.runner.pool import WorkerDied


class OnRay(Executor):
    """Sends jobs to the Ray cluster of this machine (or of `RAY_ADDRESS`), and starts one if there is none.

    A job whose worker is killed is tried once more; `retried` holds the futures of such jobs.
    """

    def __init__(self) -> None:
        try:
            import ray
        except ImportError:
            raise MissingExtra("ray", "ray") from None
        self.retried: list[Future[Any]] = []
        self._ray: Any = ray
        self._mine = not ray.is_initialized()
        if self._mine:
            self._join()
        self._do = self._ray.remote(_job).options(max_retries=0, num_cpus=1)

    def _join(self) -> None:
        try:
            self._ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
        except ConnectionError:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            self._ray.init(num_cpus=os.cpu_count(), log_to_driver=False, logging_level="ERROR", include_dashboard=False)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._send(future, fn, args, again=True)
        return future

    def _send(self, future: Future[Any], fn: Callable[..., Any], args: tuple[Any, ...], again: bool) -> None:
        def ended(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                future.set_result(done.result())
            elif isinstance(error, self._ray.exceptions.RayTaskError):
                future.set_exception(error.cause)
            elif again:
                self.retried.append(future)
                self._send(future, fn, args, again=False)
            else:
                future.set_exception(WorkerDied(f"the worker of this job died twice: {str(error).splitlines()[0]}"))

        self._do.remote(sys.path, fn, args).future().add_done_callback(ended)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if self._mine:
            self._ray.shutdown()


def _job(paths: list[str], fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The job, with the caller's import paths behind the worker's own."""
    sys.path += [p for p in paths if p not in sys.path]
    return fn(*args)
