"""What a job costs beyond its work: 32 small jobs on one and two workers, local and on Ray.

Prints seconds in all and milliseconds a job over doing the same in this process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor

from cupel.runner.cluster import OnRay
from cupel.runner.pool import Here, Workers
from cupel.testing.jobs import square, work

JOBS = 32


def timed(pool: Executor, seconds: float) -> float:
    """Seconds for all jobs on a pool that is warm."""
    [f.result() for f in [pool.submit(square, n) for n in range(8)]]
    began = time.perf_counter()
    [f.result() for f in [pool.submit(work, seconds) for _ in range(JOBS)]]
    return time.perf_counter() - began


def ray_of(workers: int) -> Executor:
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    return OnRay()


def main() -> None:
    places: dict[str, tuple[int, Callable[[], Executor]]] = {
        "this process": (1, Here),
        "1 worker": (1, lambda: Workers(1)),
        "2 workers": (2, lambda: Workers(2)),
        "Ray, 1 worker": (1, lambda: ray_of(1)),
        "Ray, 2 workers": (2, lambda: ray_of(2)),
    }
    for seconds in (0.0, 0.1):
        base = 0.0
        for name, (workers, make) in places.items():
            pool = make()
            taken = timed(pool, seconds)
            pool.shutdown()
            if "Ray" in name:
                import ray

                ray.shutdown()
            base = base or taken
            over = (taken - base / workers) / JOBS * 1000
            print(f"{JOBS} jobs of {seconds:.1f} s, {name:14}: {taken:6.2f} s, {over:6.1f} ms a job over its work")


if __name__ == "__main__":
    main()
