"""`cupel ui` without a browser: what it shows, and what it must never give away."""

from __future__ import annotations

import asyncio
import base64
import fcntl
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from typer.testing import CliRunner

from cupel.cli import app as command_line
from cupel.core.errors import CupelError, MissingExtra
from cupel.core.scorecard import Reading, over_seeds
from cupel.storage.cards import write_json
from cupel.ui import comparing, folders
from cupel.ui.app import make_app
from cupel.ui.serve import bound, serve

testclient = pytest.importorskip("starlette.testclient", reason="tests of the page need starlette and httpx")

PORT = 8771
HERE = f"127.0.0.1:{PORT}"
SECRET = "the secret outside"
ALERT = "<script>alert(1)</script>"


def card(accuracy: tuple[float, ...] = (0.9, 0.92), seeds: tuple[int, ...] = (0, 1), **more: Any) -> dict[str, Any]:
    """A small finished scorecard with two variants."""

    def variant(shift: float) -> dict[str, Any]:
        found = {
            "accuracy": over_seeds([Reading(a + shift, "share", "higher", 50, a - 0.01, a + 0.01) for a in accuracy]),
            "size_bytes": over_seeds([Reading(1000 + 500 * shift, "bytes", "lower") for _ in accuracy]),
        }
        probe = {"readings": found, "notes": [], "figures": {}, "seconds": 0.1, "forks": 0}
        return {"probes": {"accuracy": probe}, "curves": {}, "artefacts": [], "notes": {}, "failures": []}

    variants = {"plain": ["fit"], "lean": ["fit"]}
    return {
        "format": 1, "recipe": {"workload": "digits-cnn", "variants": variants, "probes": ["accuracy"]},
        "seeds": list(seeds), "baseline": "plain", "variants": {"plain": variant(0.0), "lean": variant(-0.1)},
        "versions": {"cupel": "0"}, "claims": {"accuracy": "held"}, "date": "2026-11-21T16:00:00+00:00",
        "machine": {"system": "s", "processor": "p", "cores": 2, "device": "cpu"}, "seconds": 1.0,
        "gate": [{"variant": "lean", "reading": "accuracy", "rule": ">= 0.5", "passed": True, "why": "",
                  "value": 0.8, "limit": 0.5}],
    } | more  # fmt: skip


def finished(folder: Path, content: Any = None) -> Path:
    """A run folder as `cupel run` leaves it."""
    (folder / "models").mkdir(parents=True)
    (folder / "artefacts").mkdir()
    write_json(folder / "scorecard.json", card() if content is None else content)
    (folder / "recipe.yaml").write_text("workload: digits-cnn\n")
    (folder / "scorecard.html").write_text(ALERT)
    (folder / "models" / "plain-0.safetensors").write_bytes(b"weights" * 9)
    return folder


def unfinished(folder: Path, **told: Any) -> Path:
    (folder / ".cupel").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("workload:\n  ucr-cnn:\n    dataset: x\n")
    (folder / ".cupel" / "lock").touch()
    (folder / ".cupel" / "run.json").write_text("{}")
    (folder / ".cupel" / "progress.json").write_text(
        json.dumps({"done": 3, "total": 12, "what": "lean, seed 1", "started": "2026-11-21T10:00:00", "pid": 1} | told)
    )
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Two finished runs, one under way, one stopped, and a secret beside them."""
    (tmp_path / "secret.txt").write_text(SECRET)
    runs = tmp_path / "runs"
    finished(runs / "a")
    finished(runs / "b", card((0.8, 0.82), gate=[]))
    unfinished(runs / "stopped")
    with open(unfinished(runs / "running") / ".cupel" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield runs


def client(root: Path) -> Any:
    return testclient.TestClient(make_app(root, PORT), base_url=f"http://{HERE}")


def raw(root: Path, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    """Status and body of `whole`."""
    got = whole(root, path, method, **headers)
    return got["status"], got["body"]


def whole(root: Path, path: str, method: str = "GET", **headers: str) -> dict[str, Any]:
    """Asks as uvicorn would hand it on, without a client that tidies the address first."""
    got: dict[str, Any] = {"body": b"", "headers": {}}

    asked: list[dict[str, Any]] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not asked:
            await asyncio.Event().wait()  # the browser stays
        return asked.pop()

    async def send(message: Any) -> None:
        got["status"] = message.get("status", got.get("status"))
        got["body"] += message.get("body", b"")
        got["headers"] |= {k.decode(): v.decode() for k, v in message.get("headers", ())}

    told = {"host": HERE} | headers
    scope = {
        "type": "http", "method": method, "path": unquote(path), "raw_path": path.encode(), "query_string": b"",
        "headers": [(k.encode(), v.encode()) for k, v in told.items()], "scheme": "http", "http_version": "1.1",
        "server": ("127.0.0.1", PORT), "client": ("127.0.0.1", 1), "root_path": "",
    }  # fmt: skip
    asyncio.run(make_app(root, PORT)(scope, receive, send))
    return got


def test_the_list_names_every_run_and_its_state(root: Path) -> None:
    text = client(root).get("/").text
    rows = dict(re.findall(r'<tr data-run="(\w+)"[^>]*>(.*?)</tr>', text))
    assert set(rows) == {"a", "b", "running", "stopped"}
    assert "<strong>finished</strong>" in rows["a"] and ">pass<" in rows["a"] and "plain, lean" in rows["a"]
    assert "no gate" in rows["b"]
    assert "<strong>running</strong>" in rows["running"] and "3 of 12" in rows["running"]
    assert "ucr-cnn" in rows["running"]
    assert "<strong>stopped</strong>" in rows["stopped"] and " disabled" in rows["stopped"]


def test_one_run_folder_is_served_as_well(root: Path) -> None:
    asked = client(root / "a")
    assert 'data-run="a"' in asked.get("/").text
    assert asked.get("/run/a").status_code == 200 and asked.get("/run/b").status_code == 404


def test_a_stopped_run_tells_how_to_go_on(root: Path) -> None:
    page = unescape(client(root).get("/run/stopped").text)
    assert f"cupel run --resume {root / 'stopped'}" in page and '<div id="resume">' in page
    assert '<div id="resume" hidden>' in client(root).get("/run/running").text
    (root / "stopped/.cupel/run.json").unlink()
    page = client(root).get("/run/stopped").text
    assert "--resume" not in page and "run its recipe again" in page


def test_progress_follows_the_file_and_the_lock(root: Path) -> None:
    asked = client(root)
    assert asked.get("/run/running/progress").json() == {
        "state": "running", "done": 3, "total": 12, "count": "3 of 12 jobs done", "what": "lean, seed 1"}  # fmt: skip
    (root / "running/.cupel/progress.json").write_text(json.dumps({"done": 4, "total": 12, "what": ALERT}))
    assert asked.get("/run/running/progress").json()["done"] == 4
    assert ALERT not in asked.get("/run/running").text
    assert asked.get("/run/stopped/progress").json()["state"] == "stopped"
    write_json(root / "stopped" / "scorecard.json", card())
    assert asked.get("/run/stopped/progress").json()["state"] == "finished"


@pytest.mark.parametrize("told", ["", "[]", '{"done": "x", "total": NaN}', '{"done": 1e999, "total": -1}', "[" * 9999])
def test_a_damaged_progress_file_counts_as_none(root: Path, told: str) -> None:
    (root / "running/.cupel/progress.json").write_text(told)
    assert client(root).get("/run/running/progress").json()["total"] == 0
    assert client(root).get("/run/running").status_code == 200


def test_asking_for_the_state_takes_no_lock(root: Path) -> None:
    assert folders.state_of(root / "stopped") == "stopped"
    with open(root / "stopped/.cupel/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("path", [
    "/run/a/file/../../../secret.txt", "/run/a/file/%2e%2e/%2e%2e/secret.txt", "/run/a/file/..%2f..%2fsecret.txt",
    "/run/a/file/%252e%252e/secret.txt", "/run/a/file//etc/passwd", "/run/a/file/%2fetc%2fpasswd", "/run/../secret.txt",
    "/run/..", "/run/%2e%2e", "/run/%2e", "/run/..%2f", "/run/a/file/models", "/run/a/file/models/", "/run/a/file/",
    "/run/a/file/models/../../b/recipe.yaml", "/run/a/file/recipe.yaml%00.txt", "/run/a%00/file/recipe.yaml",
    "/run/a/file/..\\..\\secret.txt", "/run/a/file/models/.\u0000", "/run/a/file/recipe.yaml/", "/run//file/secret.txt",
    "/run/running/file/.cupel/progress.json", "/static/../app.py", "/static/app.py", "/static/%2e%2e/app.py", "/runs",
    "/run/a/file/%ff%fe", "/run/a/file/" + "x" * 5000, "/run/a/file/%ed%a0%80",
])  # fmt: skip
def test_nothing_outside_the_listing_is_served(root: Path, path: str) -> None:
    status, body = raw(root, path)
    assert status == 404
    assert SECRET.encode() not in body and b"root:" not in body and b"def " not in body


def test_links_are_neither_listed_nor_followed(root: Path) -> None:
    run = root / "a"
    (run / "out.txt").symlink_to(root.parent / "secret.txt")
    (run / "artefacts" / "away").symlink_to(root.parent)
    (root / "linked").symlink_to(root.parent / "elsewhere")
    finished(root.parent / "elsewhere")
    os.mkfifo(run / "pipe")
    assert set(folders.files_of(run)) == {"recipe.yaml", "scorecard.html", "scorecard.json",
                                          "models/plain-0.safetensors"}  # fmt: skip
    assert "linked" not in folders.runs_in(root)
    for path in ("/run/a/file/out.txt", "/run/a/file/artefacts/away/secret.txt", "/run/a/file/pipe", "/run/linked"):
        status, body = raw(root, path)
        assert status == 404 and SECRET.encode() not in body
    (run / "scorecard.json").unlink()
    (run / "scorecard.json").symlink_to(root / "b" / "scorecard.json")
    assert folders.state_of(run) == "stopped"


@pytest.mark.parametrize("name", ["out.txt", "artefacts/away/secret.txt", "pipe", "../b/recipe.yaml", "models", "a\0b"])
def test_opening_refuses_what_a_race_slipped_into_the_listing(root: Path, name: str) -> None:
    run = root / "a"
    (run / "out.txt").symlink_to(root.parent / "secret.txt")
    (run / "artefacts" / "away").symlink_to(root.parent)
    os.mkfifo(run / "pipe")
    with pytest.raises(OSError):
        folders.open_within(run, name)


def test_a_run_folder_swapped_for_a_link_is_refused(root: Path) -> None:
    (root / "a").rename(root.parent / "moved")
    (root / "a").symlink_to(root.parent / "moved")
    with pytest.raises(OSError):
        folders.open_within(root / "a", "recipe.yaml")


def test_every_listed_file_downloads_whole_and_as_a_file(root: Path) -> None:
    odd = ["a b#c?d%41é&<b>'\".bin", "100%.txt", "..hidden-not.txt"[1:], "back\\slash", "plus+semi;colon.json"]
    for name in odd:
        (root / "a" / "artefacts" / name).write_bytes(name.encode() * 3)
    (root / "a" / "artefacts" / "line\nbreak").write_text("x")
    page = client(root).get("/run/a").text
    links = [unescape(h) for h in re.findall(r'<a download href="([^"]+)"', page)]
    assert len(links) == 4 + len(odd) - 1  # the hidden one and the unsayable one are left out
    for link in links:
        answer, head = whole(root, link), whole(root, link, "HEAD")
        name = unquote(link.split("/file/")[1])
        assert answer["body"] == (root / "a" / name).read_bytes(), name
        assert answer["headers"]["content-disposition"].startswith("attachment; filename*=UTF-8''")
        assert answer["headers"]["content-type"] == "application/octet-stream"
        assert "sandbox" in answer["headers"]["content-security-policy"]
        assert head["body"] == b"" and head["headers"]["content-length"] == str(len(answer["body"]))


def test_a_run_name_with_odd_characters_works(root: Path) -> None:
    name = '50% <b>"q"</b> é#?&\''
    (root / "a").rename(root / name.replace("/", "-"))
    text = client(root).get("/").text
    assert '<b>"' not in text
    link = next(unescape(h) for h in re.findall(r'href="(/run/[^"]+)"', text) if "50" in h)
    assert urlsplit(link).path == link and link.count("/") == 2  # nothing in it ends the path
    files = re.findall(r'<a download href="([^"]+)"', raw(root, link)[1].decode())
    assert len(files) == 4
    for file in files:
        assert raw(root, unescape(file))[0] == 200


@pytest.mark.parametrize("host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1", f"127.0.0.1:{PORT + 1}",
                                  f"127.0.0.1.evil.example:{PORT}", "", f"[::1]:{PORT}",
                                  f"localhost:{PORT}@evil"])  # fmt: skip
def test_other_hosts_are_refused(root: Path, host: str) -> None:
    status, body = raw(root, "/", host=host)
    assert status == 421 and b"run" not in body.replace(b"running", b"")


def test_own_names_are_answered_and_two_hosts_are_not(root: Path) -> None:
    assert raw(root, "/", host=f"LOCALHOST:{PORT}")[0] == 200
    assert raw(root, "/", HOST=HERE)[0] == 421  # a second Host header


@pytest.mark.parametrize(("headers", "status"), [
    ({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403), ({"origin": f"https://{HERE}"}, 403),
    ({"origin": f"http://127.0.0.1:{PORT + 1}"}, 403), ({"origin": f"http://{HERE}"}, 200),
    ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
    ({"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}, 403),
    ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
    ({"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, 200),
])  # fmt: skip
def test_other_origins_are_refused(root: Path, headers: dict[str, str], status: int) -> None:
    assert raw(root, "/rows", **headers)[0] == status


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get"])
def test_only_reading_is_answered(root: Path, method: str) -> None:
    for path in ("/", "/static/ui.js", "/nothing"):
        assert raw(root, path, method)[0] == 405


@pytest.mark.parametrize("path", ["/", "/rows", "/run/a", "/run/stopped", "/run/none", "/compare?run=a&run=b",
                                  "/compare", "/static/ui.js", "/nothing", "/run/running/progress"])  # fmt: skip
def test_every_answer_carries_its_policy(root: Path, path: str) -> None:
    answer = client(root).get(path)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "base-uri 'none'" in policy and "frame-ancestors 'none'" in policy
    scripts = re.search(r"script-src ([^;]*)", policy)
    assert scripts is None or not {"'self'", "'unsafe-inline'", "'unsafe-eval'", "*"} & set(scripts[1].split())
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in answer.headers


def test_nonces_are_fresh_and_on_every_script(root: Path) -> None:
    first, second = (client(root).get("/compare?run=a&run=b") for _ in range(2))
    nonces = [re.search(r"'nonce-([^']+)'", a.headers["content-security-policy"]) for a in (first, second)]
    assert nonces[0] and nonces[1] and nonces[0][1] != nonces[1][1]
    live = re.findall(r"<script(?! type=\"application/json\")([^>]*)>", first.text)
    assert live and all(f'nonce="{nonces[0][1]}"' in tag for tag in live)


def test_the_scorecard_is_drawn_afresh_and_runs_only_our_scripts(root: Path) -> None:
    answer = client(root).get("/run/a")
    assert ALERT not in answer.text  # what stands in the folder's scorecard.html
    scripts = re.findall(r"<script(?! type=\"application/json\")[^>]*>(.*?)</script>", answer.text, re.DOTALL)
    assert scripts
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in answer.headers["content-security-policy"], script[:80]
    assert "All runs" in answer.text and "ui-strip" in answer.text


def changed(change: Callable[[dict[str, Any]], object]) -> str:
    content = card()
    change(content)
    return json.dumps(content)


def cell(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["variants"]["plain"]["probes"]["accuracy"]["readings"]["accuracy"]
    return found


def many(content: dict[str, Any]) -> None:
    readings = content["variants"]["plain"]["probes"]["accuracy"]["readings"]
    readings |= {f"r{i}": cell(content) for i in range(100_000)}


BROKEN = {
    "empty": "", "no JSON": "{", "binary": "\x00\xff", "a list": "[]", "null": "null", "other format": '{"format": 2}',
    "deep": "[" * 100_000, "NaN": changed(lambda c: None).replace("0.91", "NaN", 1),
    "infinite": changed(lambda c: cell(c).update(value=123456)).replace("123456", "1e999"),
    "a huge whole number": changed(lambda c: cell(c).update(value=10**400)),
    "no variants": changed(lambda c: c.update(variants={})),
    "variants a list": changed(lambda c: c.update(variants=[1])),
    "value a word": changed(lambda c: cell(c).update(value="high")),
    "value true": changed(lambda c: cell(c).update(value=True)),
    "unit a number": changed(lambda c: cell(c).update(unit=5)),
    "half an interval": changed(lambda c: cell(c).update(low=None)),
    "seeds of a cell missing": changed(lambda c: cell(c).pop("seeds")),
    "other probes": changed(lambda c: c["variants"]["lean"].update(probes={})),
    "strange variants": changed(lambda c: c["recipe"].update(variants={"x": []})),
    "no workload": changed(lambda c: c["recipe"].update(workload={})),
    "probe a number": changed(lambda c: c["recipe"].update(probes=[3])),
    "gate a word": changed(lambda c: c.update(gate="yes")),
    "gate of words": changed(lambda c: c.update(gate=["yes"])),
    "claims a list": changed(lambda c: c.update(claims=[])),
    "machine missing": changed(lambda c: c.pop("machine")),
    "notes of numbers": changed(lambda c: c["variants"]["plain"]["probes"]["accuracy"].update(notes=[1])),
    "100,000 readings": changed(many),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_scorecard_is_one_plain_line_and_the_rest_goes_on(root: Path, kind: str) -> None:
    (root / "a" / "scorecard.json").write_text(BROKEN[kind], encoding="latin-1")
    asked = client(root)
    rows = dict(re.findall(r'<tr data-run="(\w+)"[^>]*>(.*?)</tr>', asked.get("/").text))
    line = re.search(r'class="wrong">([^<]+)<', rows["a"])
    assert line and "\n" not in line[1] and len(line[1]) < 300 and "unreadable" in rows["a"]
    assert "<strong>finished</strong>" in rows["b"]
    answer = asked.get("/run/a")
    assert answer.status_code == 200 and line[1] in answer.text and "recipe.yaml" in answer.text
    both = asked.get("/compare?run=a&run=b&run=b")
    assert both.status_code == 400 and line[1] in both.text


def test_a_huge_scorecard_is_not_read(root: Path) -> None:
    with open(root / "a" / "scorecard.json", "r+b") as file:
        file.truncate(2**40)
    began = time.perf_counter()
    assert "it is larger" in client(root).get("/").text
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("figures", [[], "x", {"confusion": "x"}, {"confusion": [["<"]], "roc": 7, "layers": [1]},
                                     {"adversarial": [{"clean": None}], "reliability": []}])  # fmt: skip
def test_figures_of_any_shape_do_no_harm(root: Path, figures: Any) -> None:
    content = card()
    content["variants"]["plain"]["probes"]["accuracy"]["figures"] = figures
    content["variants"]["plain"]["curves"] = figures
    write_json(root / "a" / "scorecard.json", content)
    assert client(root).get("/run/a").status_code == 200
    assert client(root).get("/compare?run=a&run=b").status_code == 200


def test_html_in_any_name_stays_text(root: Path) -> None:
    bad = ALERT + "\"'"
    content = json.loads(json.dumps(card()).replace('"plain"', json.dumps(bad)).replace('"accuracy"', json.dumps(bad)))
    content["recipe"]["workload"] = {bad: {}}
    content["versions"] = {bad: bad}
    content["claims"] = {bad: bad}
    content["gate"][0] |= {"rule": bad, "why": bad, "variant": bad}
    content["date"] = bad
    for variant in content["variants"].values():
        variant["failures"] = [bad]
        variant["probes"][bad]["notes"] = [bad]
        variant["probes"][bad]["readings"][bad] |= {"unit": bad, "better": bad}
        variant["probes"][bad] |= {"figures": {bad: bad}}
    for name in "ab":
        (root / name / "scorecard.json").write_text(json.dumps(content))
    asked = client(root)
    for path in ("/", "/run/a", "/compare?run=a&run=b", "/compare?run=a&run=b&base=0.0"):
        answer = asked.get(path)
        assert answer.status_code == 200 and "alert(1)" in answer.text
        outside = re.sub(r"<script[^>]*>.*?</script>", "", answer.text, flags=re.DOTALL)
        assert "<script>" not in outside and "alert(1)</script>" not in answer.text


def test_half_a_character_is_no_crash(root: Path) -> None:
    content = json.dumps(card()).replace("digits-cnn", "\\ud800 digits").replace("plain", "\\udfff plain")
    (root / "a" / "scorecard.json").write_text(content)
    for path in ("/", "/run/a", "/compare?run=a&run=b"):
        assert client(root).get(path).status_code == 200


def test_a_run_that_disappears_is_told_as_gone(root: Path) -> None:
    asked = client(root)
    assert asked.get("/run/stopped").status_code == 200
    (root / "stopped").rename(root.parent / "elsewhere")
    (root / "a" / "scorecard.json").unlink()
    assert asked.get("/run/stopped/progress").json() == {"state": "gone"}
    assert asked.get("/run/stopped").status_code == 404
    assert asked.get("/run/stopped/file/recipe.yaml").status_code == 404
    assert 'data-run="stopped"' not in asked.get("/rows").text
    assert "is not there any more" in asked.get("/compare?run=a&run=b").text
    for path in root.iterdir():
        path.rename(root.parent / ("x" + path.name))
    root.rmdir()
    assert asked.get("/").status_code == 200


def test_a_changed_scorecard_is_read_again(root: Path) -> None:
    asked = client(root)
    assert asked.get("/rows").text.count("no gate") == 1
    write_json(root / "a" / "scorecard.json", card(gate=[]))
    assert asked.get("/rows").text.count("no gate") == 2


def test_comparison_shows_readings_differences_and_cautions(root: Path) -> None:
    other = card((0.7, 0.72), seeds=(5, 6))
    other["recipe"] |= {"workload": "ucr-cnn", "probes": [{"accuracy": {"k": 1}}]}
    finished(root / "c", other)
    text = client(root).get("/compare?run=a&run=b&run=c").text
    row = next(r for r in re.findall(r"<tr data-search.*?</tr>", text) if ">accuracy<" in r and ">plain<" in r)
    cells = [re.sub(r"<[^>]+>", "", c) for c in re.findall(r"<td[^>]*>(.*?)</td>", row)]
    assert cells[1].startswith(".910") and cells[2].startswith(".810") and cells[3].startswith(".710")
    assert "−.100 [−.100, −.100]" in cells[2] and "worse" in cells[2]  # paired: each seed fell by a tenth
    assert "−.200" in cells[3] and "−.200 [−.200" not in cells[3]  # other seeds: their spread counts
    assert "different workloads (digits-cnn, ucr-cnn" in text and "c measured accuracy with other parameters" in text
    assert "c has other seeds than a" in text


def test_any_variant_may_be_what_the_rest_is_held_against(root: Path) -> None:
    asked = client(root)
    text = asked.get("/compare?run=a&run=b&base=1.1").text  # b's second variant, lean
    assert '<option value="1.1" selected>b: lean</option>' in text
    row = next(r for r in re.findall(r"<tr data-search.*?</tr>", text) if ">accuracy<" in r and ">plain<" in r)
    assert "+.200" in row and "+.100" in row
    for strange in ("", "9", "0.9", "-1", "x", "1.x", "9" * 5000, "²"):
        text = asked.get("/compare", params={"run": ["a", "b"], "base": strange}).text
        assert re.search(r'<option value="[01]" selected>', text), strange


def test_points_hold_every_variant_of_every_run(root: Path) -> None:
    text = client(root).get("/compare?run=a&run=b").text
    found = re.search(r'<script type="application/json" id="points">(.*?)</script>', text)
    assert found
    data = json.loads(found[1])
    assert [p["name"] for p in data["points"]] == ["1 plain", "1 lean", "2 plain", "2 lean"]
    assert data["runs"] == ["a", "b"] and [a["reading"] for a in data["axes"]] == ["accuracy", "size_bytes"]
    assert data["points"][3]["cells"]["0"][0] == pytest.approx(0.71)


def test_a_comparison_needs_two_runs_and_not_too_many_readings(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = client(root)
    for query in ("", "?run=a", "?run=a&run=a", "?run=a&run=none", "?run=a&run=stopped"):
        assert asked.get(f"/compare{query}").status_code == 400
    monkeypatch.setattr(comparing, "MOST_CELLS", 8)  # four in each run
    assert asked.get("/compare?run=a&run=b").status_code == 200
    monkeypatch.setattr(comparing, "MOST_CELLS", 7)
    assert "Choose fewer" in asked.get("/compare?run=a&run=b").text


def test_an_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    assert "cupel run --out" in client(tmp_path).get("/").text


def test_a_taken_port_and_a_missing_folder_end_with_2(root: Path) -> None:
    with bound(0) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(command_line, ["ui", str(root), "--port", str(port)])
        assert done.exit_code == 2 and f"got {port}: another program listens there" in done.output
        assert "--port 0" in done.output
    done = CliRunner().invoke(command_line, ["ui", str(root / "none")])
    assert done.exit_code == 2 and "RUNS must be" in done.output
    with pytest.raises(CupelError, match="which is a file"):
        serve(root / "a" / "recipe.yaml", 0, print)


@pytest.mark.parametrize("package", ["starlette.applications", "uvicorn"])
def test_without_the_extra_it_says_which(root: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"cupel\[ui\]"):
        serve(root, 0, print)


def test_other_commands_load_nothing_of_it() -> None:
    code = (
        "import sys, cupel.cli as c\n"
        "sys.argv = ['cupel', 'list']\n"
        "try:\n    c.main()\nexcept SystemExit:\n    pass\n"
        "assert not {'starlette', 'uvicorn', 'cupel.ui.app', 'cupel.ui.serve'} & set(sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_the_real_server_answers_here_only_and_stops_cleanly(root: Path) -> None:
    code = (
        "import sys, threading, cupel.cli as c\n"
        "sys.argv = ['cupel', 'ui', sys.argv[1], '--port', '0']\n"
        "try:\n    c.main()\n"
        "finally:\n    print('torch' in sys.modules, flush=True)\n"
    )
    server = subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        port = int(server.stdout.readline().split(":")[2].split("/")[0])
        for target, host, expected in (
            ("/run/a", f"127.0.0.1:{port}", b"200"), ("/", "evil.example", b"421"),
            ("/run/a/file/../../../secret.txt", f"127.0.0.1:{port}", b"404"),
            ("/run/a/file/%2e%2e%2f%2e%2e%2fsecret.txt", f"127.0.0.1:{port}", b"404"),
            (f"http://evil.example:{port}/", f"127.0.0.1:{port}", b"404"),
        ):  # fmt: skip
            with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
                line.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                with line.makefile("rb") as answer:
                    got = answer.read()
            assert got.split()[1] == expected and SECRET.encode() not in got
        with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=2):
            pass
    finally:
        server.send_signal(signal.SIGINT)
        rest = server.communicate(timeout=15)[0]
    assert server.returncode == 130 and "False" in rest
