"""Interrupted runs: killed at any moment, continued, and equal to a run that nobody touched."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cupel.core.errors import CupelError, RecipeError
from cupel.runner.recipe import read_recipe
from cupel.runner.run import run
from cupel.testing.folders import content

torch.set_num_threads(1)

RECIPE = """
workload: {digits-cnn: {width: 4, examples: 96}}
seeds: [0, 1]
given: {teacher: {workload: {digits-cnn: {width: 6, examples: 96}}, steps: [{fit: {epochs: 1}}]}}
variants:
  plain: [{fit: {epochs: 2}}]
  lean:
    - fit: {epochs: 2, techniques: [{pdp: {sparsity: 0.5}}, distill]}
    - apply: {int8-ptq: {examples: 32}}
  longer: [{fit: {epochs: 2}}, {fit: {epochs: 2, techniques: [{pdp: {sparsity: 0.5}}]}}]
probes: [accuracy, calibration, {membership: {}}]
gate: {lean: {accuracy: ">= 0.0"}}
"""


def recipe_in(folder: Path) -> Path:
    path = folder / "r.yaml"
    path.write_text(RECIPE)
    return path


def forked(recipe: Path, out: Path, resume: bool) -> int:
    """Start a run in a child of this process, which has everything loaded already; its process id."""
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            os.setsid()
            run(read_recipe(recipe), out=out, resume=resume)
            code = 0
        except CupelError:
            code = 2
        finally:
            os._exit(code)
    return pid


def begun(out: Path) -> bool:
    return (out / ".cupel" / "run.json").exists()


def test_killed_at_twenty_random_moments_and_resumed(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    began = time.perf_counter()
    run(read_recipe(recipe), out=tmp_path / "whole")
    whole = time.perf_counter() - began
    wanted = content(tmp_path / "whole")
    draw = random.Random(0)
    kills = rounds = 0
    while kills < 20:
        rounds += 1
        out = tmp_path / f"run-{rounds}"
        finished = False
        while not finished:
            pid = forked(recipe, out, begun(out))
            deadline = time.perf_counter() + draw.uniform(0, whole / 2)
            done = 0
            while done == 0 and (kills >= 20 or time.perf_counter() < deadline):
                done, status = os.waitpid(pid, os.WNOHANG)
                time.sleep(0.002)
            if done == 0:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                kills += 1
            tidied = (out / "scorecard.json").exists() and not begun(out)  # killed after its last deed
            finished = done != 0 or tidied
        if done == 0:  # the kill came after the scorecard: resuming has nothing to do but to tidy up
            with pytest.raises(RecipeError, match="nothing to do"):
                run(read_recipe(recipe), out=out, resume=True)
        else:
            assert os.waitstatus_to_exitcode(status) == 0
        assert content(out) == wanted
        assert not (out / ".cupel").exists() and not list(out.rglob("*.part"))


def test_finished_fits_and_probes_are_not_done_again(tmp_path: Path) -> None:
    recipe = read_recipe(recipe_in(tmp_path))
    out = tmp_path / "run"

    def stop_late(what: str, done: int, total: int) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, out=out, tell=stop_late)
    before = {p: p.stat().st_mtime_ns for p in (out / ".cupel").rglob("*") if p.parent.name in ("nodes", "probes")}
    assert len(before) >= 12
    times: list[tuple[str, float]] = []
    began = time.perf_counter()
    run(recipe, out=out, resume=True, tell=lambda what, done, total: times.append((what, time.perf_counter() - began)))
    assert sum("measured before" in what for what, _ in times) >= 4


def command(*words: str, **how: Any) -> subprocess.Popen[str]:
    code = "import sys; from cupel.cli import main; sys.argv = ['cupel', *sys.argv[1:]]; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how
    )


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_says_how_to_go_on(tmp_path: Path, stop: signal.Signals) -> None:
    recipe, out = recipe_in(tmp_path), tmp_path / "run"
    recipe.write_text(RECIPE.replace("epochs: 2", "epochs: 200"))
    process = command("run", str(recipe), "--out", str(out), "--jobs", "2", start_new_session=True)
    while not begun(out):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    time.sleep(1.0)
    os.killpg(process.pid, stop) if stop == signal.SIGINT else process.send_signal(stop)
    said, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.strip().endswith(f"stopped; continue with: cupel run --resume {out}"), errors
    assert "Traceback" not in errors + said
    with pytest.raises(ProcessLookupError):  # no worker is left behind
        for _ in range(50):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_workers_do_not_outlive_a_killed_run(tmp_path: Path) -> None:
    recipe, out = recipe_in(tmp_path), tmp_path / "run"
    recipe.write_text(RECIPE.replace("epochs: 2", "epochs: 200"))
    process = command("run", str(recipe), "--out", str(out), "--jobs", "2", start_new_session=True)
    while not begun(out):
        time.sleep(0.05)
    time.sleep(1.5)
    process.kill()
    process.communicate()
    with pytest.raises(ProcessLookupError):
        for _ in range(80):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    recipe, out = recipe_in(tmp_path), tmp_path / "run"
    pids = [forked(recipe, out, False) for _ in range(3)]
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids)
    assert codes == [0, 2, 2] and (out / "scorecard.json").exists()
    with pytest.raises(RecipeError, match="new or empty"):
        run(read_recipe(recipe), out=out)
    with pytest.raises(RecipeError, match="nothing to do"):
        run(read_recipe(recipe), out=out, resume=True)


def test_resuming_what_cannot_be_resumed(tmp_path: Path) -> None:
    recipe, out = recipe_in(tmp_path), tmp_path / "run"
    with pytest.raises(RecipeError, match="must have begun"):
        run(read_recipe(recipe), out=tmp_path / "nowhere", resume=True)

    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(read_recipe(recipe), out=out, tell=stop)
    with pytest.raises(RecipeError, match=f"cupel run --resume {out}"):
        run(read_recipe(recipe), out=out)
    recipe.write_text(RECIPE.replace("epochs: 2", "epochs: 3"))
    with pytest.raises(RecipeError, match="another recipe"):
        run(read_recipe(recipe), out=out, resume=True)
    facts = json.loads((out / ".cupel" / "run.json").read_text())
    (out / ".cupel" / "run.json").write_text(json.dumps(facts | {"torch": "1.0"}))
    recipe.write_text(RECIPE)
    with pytest.raises(RecipeError, match=r"torch 1\.0"):
        run(read_recipe(recipe), out=out, resume=True)
    (out / "file").write_text("")
    with pytest.raises(RecipeError, match="is a file"):
        run(read_recipe(recipe), out=out / "file")


def test_a_damaged_or_hostile_kept_file_is_done_again(tmp_path: Path) -> None:
    recipe, out = read_recipe(recipe_in(tmp_path)), tmp_path / "run"

    def stop_late(what: str, done: int, total: int) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, out=out, tell=stop_late)
    for i, path in enumerate(sorted((out / ".cupel").glob("*/*"))):
        data = path.read_bytes()
        path.write_bytes([data[: len(data) // 2], b"", b"\x80\x04cos\nsystem\n"][i % 3])
    run(recipe, out=out, resume=True)
    run(recipe, out=tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")


def in_small_place(tmp_path: Path, limit: int) -> tuple[int, str]:
    """A run in a child that may write no file beyond `limit` bytes: its exit code and message."""
    recipe, out, said = recipe_in(tmp_path), tmp_path / "run", tmp_path / "said"
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            said.write_text("")
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            run(read_recipe(recipe), out=out)
        except CupelError as error:
            said.write_text(str(error))
            code = error.exit_code
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, said.read_text()


def test_no_room_for_a_file(tmp_path: Path) -> None:
    code, said = in_small_place(tmp_path, 8000)
    assert code == 2 and "must have room" in said and "cupel run --resume" in said
    run(read_recipe(tmp_path / "r.yaml"), out=tmp_path / "run", resume=True)
    run(read_recipe(tmp_path / "r.yaml"), out=tmp_path / "whole")
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_a_full_disk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("a small file system of its own needs the right to mount one")
    try:
        recipe = read_recipe(recipe_in(tmp_path))
        with pytest.raises(CupelError, match=r"must have room; .*No space left"):
            run(recipe, out=small / "run")
        subprocess.run(["mount", "-o", "remount,size=20m", str(small)], check=True)
        run(recipe, out=small / "run", resume=True)
        run(recipe, out=tmp_path / "whole")
        assert content(small / "run") == content(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(closed)], capture_output=True
    )  # holds for root too
    try:
        if os.access(closed, os.W_OK):
            pytest.skip("this user may write anywhere, and may not mount")
        with pytest.raises(CupelError, match="must be writable"):
            run(read_recipe(recipe_in(tmp_path)), out=closed / "run")
    finally:
        subprocess.run(["umount", str(closed)], capture_output=True)
        shutil.rmtree(closed, ignore_errors=True)


def test_a_clock_that_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_recipe(recipe_in(tmp_path))
    real, jumps = time.time, iter(range(1, 10**9))
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(jumps) * 1e8)
    run(recipe, out=tmp_path / "jumping")
    monkeypatch.undo()
    run(recipe, out=tmp_path / "whole")
    assert content(tmp_path / "jumping") == content(tmp_path / "whole")
    assert json.loads((tmp_path / "jumping" / "scorecard.json").read_text())["seconds"] >= 0
