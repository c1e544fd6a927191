"""Two ways to run the workers of a pipeline, with the same numbers: in turn in this process, or in one process each."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import queue
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor, nn

from cupel.core.budget import Budget
from cupel.core.errors import ContractError, CupelError
from cupel.core.types import Batch, Task
from cupel.ops.stage_worker import COORDINATOR, Key, Post, StageWorker

Place = tuple[int, int]  # stage, replica
PATIENCE_S = 1.0  # between looks at whether the workers still live


@dataclass(frozen=True)
class End:
    """What a worker hands in when it is done: its weights, bytes sent by kind, most versions held, longest delay."""

    state: dict[str, Tensor]
    sent: dict[str, int]
    peak: int
    delay: int


def end_of(worker: StageWorker) -> End:
    state = {name: value.detach().clone() for name, value in worker.module.state_dict().items()}
    return End(state, worker.sent, worker.peak, max(worker.delays, default=0))


def feeds(t: int, batch: Batch, replicas: Sequence[int]) -> list[tuple[Place, Key, Any]]:
    """What mini-batch `t` brings to the first and to the last stage."""
    last = len(replicas) - 1
    return [
        ((0, t % replicas[0]), ("input", t), batch.inputs),
        ((last, t % replicas[last]), ("targets", t), (batch.targets, batch.index)),
    ]


def in_turns(
    posts: Mapping[Place, Post], parts: Sequence[nn.Module], task: Task, budget: Budget, stream: Iterator[Batch]
) -> tuple[list[float], dict[Place, End]]:
    """Run all workers in this process, each as far as its messages allow; a new mini-batch when all wait.

    Raises:
        ContractError: all wait and the stream is over (a defect of the schedule).
    """
    inbox: dict[Place, dict[Key, Any]] = {place: {} for place in (*posts, COORDINATOR)}

    def send(target: Place, key: Key, value: Any) -> None:
        inbox[target][key] = value

    workers = {
        place: StageWorker(post, copy.deepcopy(parts[place[0]]), task, budget, send) for place, post in posts.items()
    }
    running: dict[Place, tuple[Generator[Key, Any, None], Key]] = {}
    for place, worker in workers.items():
        work = worker.work()
        key = next(work, None)
        if key is not None:
            running[place] = work, key
    admitted = 0
    while running:
        if not any(_advance(running, place, inbox[place]) for place in list(running)):
            batch = next(stream, None)
            if batch is None:
                raise ContractError("the schedule must keep moving; it stands still. Report these stages.")
            for target, key, value in feeds(admitted, batch, next(iter(posts.values())).replicas):
                send(target, key, value)
            admitted += 1
    losses = inbox[COORDINATOR]
    return [losses["loss", t] for t in range(admitted)], {place: end_of(w) for place, w in workers.items()}


def _advance(running: dict[Place, tuple[Generator[Key, Any, None], Key]], place: Place, inbox: dict[Key, Any]) -> bool:
    """Let one worker go on until it needs a message that has not come."""
    work, key = running[place]
    moved = False
    while key in inbox:
        moved = True
        try:
            key = work.send(inbox.pop(key))
        except StopIteration:
            del running[place]
            return True
    running[place] = work, key
    return moved


def in_processes(
    posts: Mapping[Place, Post], parts: Sequence[nn.Module], task: Task, budget: Budget, stream: Iterator[Batch]
) -> tuple[list[float], dict[Place, End]]:
    """Run every worker in a process of its own; messages travel through pipes of this machine.

    Raises:
        CupelError: a worker failed; the message holds its traceback.
    """
    context = _starter()
    boxes = {place: context.Queue() for place in (*posts, COORDINATOR)}
    children = []
    try:
        for place, post in posts.items():
            # Packed to bytes here: handed over as tensors, the weights would be shared memory of both processes.
            job = pickle.dumps((post, parts[place[0]], task, budget))
            child = context.Process(target=_serve, args=(place, job, boxes), daemon=True)
            child.start()
            children.append(child)
        return _coordinate(posts, boxes, children, stream)
    finally:
        for child in children:
            child.join(timeout=PATIENCE_S)
            if child.is_alive():
                child.terminate()
                child.join()
        for box in boxes.values():
            box.close()
            box.cancel_join_thread()


def _starter() -> Any:
    """Fresh processes: a fork of this one would copy torch's threads in an unknown state.

    Where the system can, they are forked from a clean server that has imported torch once, with the part that
    torch.optim asks for at its first step.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    return context


def _coordinate(
    posts: Mapping[Place, Post], boxes: Mapping[Place, Any], children: Sequence[BaseProcess], stream: Iterator[Batch]
) -> tuple[list[float], dict[Place, End]]:
    """Feed mini-batches, a few ahead of the last loss, and collect losses and ends."""
    replicas = next(iter(posts.values())).replicas
    window = 2 * sum(replicas) + replicas[0]
    losses: dict[int, float] = {}
    ends: dict[Place, End] = {}
    admitted, batch = 0, next(stream, None)
    while len(ends) < len(posts):
        while batch is not None and admitted < len(losses) + window:
            for target, key, value in feeds(admitted, batch, replicas):
                boxes[target].put(pickle.dumps((key, value)))
            admitted, batch = admitted + 1, next(stream, None)
        key, value = _receive(boxes[COORDINATOR], children)
        if key[0] == "loss":
            losses[key[1]] = value
        elif key[0] == "end":
            ends[key[1]] = value
        else:
            raise CupelError(
                f"every worker must finish; worker {key[1]} failed:\n{value}\nLook at the last line above."
            )
    return [losses[t] for t in range(admitted)], ends


def _receive(box: Any, children: Sequence[BaseProcess]) -> tuple[Key, Any]:
    while True:
        try:
            found: tuple[Key, Any] = pickle.loads(box.get(timeout=PATIENCE_S))
            return found
        except queue.Empty:
            dead = [child.exitcode for child in children if child.exitcode not in (None, 0)]
            if dead:
                raise CupelError(
                    f"every worker must finish; one ended with code {dead[0]}. Look at what it wrote above."
                ) from None


def _serve(place: Place, job: bytes, boxes: Mapping[Place, Any]) -> None:
    """The life of a worker's process."""
    torch.set_num_threads(1)

    def send(target: Place, key: Key, value: Any) -> None:
        boxes[target].put(pickle.dumps((key, value)))

    try:
        post, part, task, budget = pickle.loads(job)
        worker = StageWorker(post, part, task, budget, send)
        _drive(worker.work(), lambda: pickle.loads(boxes[place].get()))
        send(COORDINATOR, ("end", place), end_of(worker))
    except Exception:
        send(COORDINATOR, ("failed", place), traceback.format_exc())


def _drive(work: Generator[Key, Any, None], receive: Callable[[], tuple[Key, Any]]) -> None:
    early: dict[Key, Any] = {}
    key = next(work, None)
    while key is not None:
        while key not in early:
            came, value = receive()
            early[came] = value
        try:
            key = work.send(early.pop(key))
        except StopIteration:
            return
