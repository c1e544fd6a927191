"""`cupel ui` in a real browser: every control is used, and the pages stay usable by keyboard and on a phone."""

from __future__ import annotations

import fcntl
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cupel.core.scorecard import Reading, over_seeds
from cupel.storage.cards import write_json

uvicorn = pytest.importorskip("uvicorn", reason="browser tests of the page need the extra ui")
expect = pytest.importorskip("playwright.sync_api", reason="browser tests need the package playwright").expect

WEIGHTS = bytes(range(256)) * 40
HOSTILE = "<img src=x onerror=alert(1)>"


def card(accuracy: float, workload: str, date: str, seeds: tuple[int, ...] = (0, 1), passed: bool = True) -> Any:
    """A finished scorecard with two variants and five readings."""

    def variant(lean: bool) -> dict[str, Any]:
        each = [accuracy - 0.1 * lean + 0.01 * i for i in range(len(seeds))]
        found = {
            "accuracy": over_seeds([Reading(a, "share", "higher", 50, a - 0.005, a + 0.005) for a in each]),
            "worst_class_accuracy": over_seeds([Reading(a / 2, "share", "higher", 50, a / 2 - 0.2, a / 2 + 0.2)
                                                for a in each]),
        }  # fmt: skip
        cost = {
            "size_bytes": over_seeds([Reading(500.0 if lean else 64_000.0, "bytes", "lower") for _ in seeds]),
            "latency_1_ms": over_seeds([Reading(2.0 + a, "ms", "lower") for a in each]),
            "offset": over_seeds([Reading(-1.0, "1", "none") for _ in seeds]),
        }
        probes = {p: {"readings": r, "notes": [], "figures": {}, "seconds": 0.1, "forks": 0}
                  for p, r in (("accuracy", found), ("cost", cost))}  # fmt: skip
        return {"probes": probes, "curves": {}, "artefacts": [], "notes": {}, "failures": []}

    return {
        "format": 1, "recipe": {"workload": workload, "variants": {"plain": ["fit"], "lean": ["fit"]},
                                "probes": ["accuracy", "cost"], "seeds": list(seeds)},
        "seeds": list(seeds), "baseline": "plain", "variants": {"plain": variant(False), "lean": variant(True)},
        "versions": {"cupel": "0"}, "claims": {"accuracy": "held"}, "date": date, "seconds": 1.0,
        "machine": {"system": "s", "processor": "p", "cores": 2, "device": "cpu"},
        "gate": [{"variant": "lean", "reading": "accuracy", "rule": ">= 0.5", "passed": passed, "why": "",
                  "value": 0.8, "limit": 0.5}],
    }  # fmt: skip


def finished(folder: Path, content: Any) -> None:
    (folder / "models").mkdir(parents=True, exist_ok=True)
    (folder / "models" / "plain-0.safetensors").write_bytes(WEIGHTS)
    write_json(folder / "scorecard.json", content)


@dataclass
class Site:
    """A served folder of runs; `lock` is held for the run under way."""

    root: Path
    address: str
    lock: Any

    def tell(self, done: int, what: str) -> None:
        path = self.root / "now" / ".cupel" / "progress.json"
        path.with_suffix(".part").write_text(
            json.dumps({"done": done, "total": 12, "what": what, "started": "2026-11-21T16:00:00+00:00", "pid": 1})
        )
        path.with_suffix(".part").replace(path)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    from cupel.ui.app import make_app
    from cupel.ui.serve import bound

    root = tmp_path / "runs"
    finished(root / "alpha", card(0.9, "digits-cnn", "2026-11-19T10:00:00+00:00"))
    finished(root / "beta", card(0.7, "digits-cnn", "2026-11-20T10:00:00+00:00"))
    finished(root / "gamma 100%", card(0.8, "ucr-cnn", "2026-11-18T10:00:00+00:00", (0, 1, 2), passed=False))
    finished(root / HOSTILE.replace("/", ""), card(0.6, HOSTILE, "2026-11-17T10:00:00+00:00"))
    (root / "broken").mkdir()
    (root / "broken" / "scorecard.json").write_text("{")
    (root / "now" / ".cupel").mkdir(parents=True)
    (root / "now" / ".cupel" / "run.json").write_text("{}")
    (root / "now" / "recipe.yaml").write_text("workload: digits-vit\n")
    with bound(0) as listening, open(root / "now" / ".cupel" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        port = listening.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(make_app(root, port), log_level="error", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        made = Site(root, f"http://127.0.0.1:{port}", lock)
        made.tell(3, "lean, seed 1")
        yield made
        server.should_exit = True
        thread.join(10)


def names(page: Any) -> list[str]:
    """The runs that are shown, from the top."""
    return list(page.locator("#rows tr:visible").evaluate_all("rows => rows.map(r => r.dataset.run)"))


def sorted_by(page: Any, column: str) -> list[str]:
    page.locator(f"th[data-key={column}] button").click()
    return names(page)


def narrow(page: Any) -> None:
    """No sideways scrolling of the page at the width of a small phone."""
    page.set_viewport_size({"width": 360, "height": 800})
    page.wait_for_timeout(150)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, page.url
    page.set_viewport_size({"width": 1280, "height": 900})


def test_search_sort_and_choose(page: Any, site: Site) -> None:
    page.goto(site.address)
    hostile = HOSTILE.replace("/", "")
    assert names(page) == ["now", "beta", "alpha", "gamma 100%", hostile, "broken"]  # newest first
    assert sorted_by(page, "run") == [hostile, "alpha", "beta", "broken", "gamma 100%", "now"]
    assert page.locator("th[data-key=run]").get_attribute("aria-sort") == "ascending"
    assert sorted_by(page, "run") == ["now", "gamma 100%", "broken", "beta", "alpha", hostile]
    assert page.locator("th[data-key=run]").get_attribute("aria-sort") == "descending"
    assert sorted_by(page, "date")[:4] == [hostile, "gamma 100%", "alpha", "beta"]
    by_workload = sorted_by(page, "workload")
    assert set(by_workload[1:3]) == {"alpha", "beta"} and by_workload[3:] == ["now", "gamma 100%", "broken"]
    page.locator("th[data-key=seeds] button").click()
    assert sorted_by(page, "seeds")[0] == "gamma 100%"
    assert sorted_by(page, "gate")[0] == "gamma 100%"
    assert sorted_by(page, "state")[-1] == "broken"
    by_variants = sorted_by(page, "variants")
    assert by_variants[0] == "now" and by_variants[-1] == "broken"  # none yet, and not known
    page.get_by_label("Search").fill("digits lean")
    assert set(names(page)) == {"alpha", "beta"}
    page.get_by_label("Search").fill("nothing like it")
    expect(page.locator("#none")).to_be_visible()
    page.get_by_label("Search").fill("")
    assert len(names(page)) == 6
    expect(page.locator("tr[data-run=broken] .wrong")).to_contain_text("must be JSON")
    compare = page.get_by_role("button", name="Compare chosen runs")
    expect(compare).to_be_disabled()
    page.get_by_label("choose alpha").check()
    expect(compare).to_be_disabled()
    page.get_by_label("choose beta").check()
    expect(page.locator("#chosen")).to_have_text("2 chosen")
    narrow(page)
    compare.click()
    expect(page.locator("h1")).to_have_text("Comparison")


def test_the_list_follows_runs_and_keeps_what_was_chosen(page: Any, site: Site) -> None:
    page.goto(site.address)
    expect(page.locator("tr[data-run=now] .state")).to_contain_text("running")
    page.get_by_label("choose alpha").check()
    page.get_by_label("Search").fill("a")
    page.get_by_label("choose beta").focus()
    site.tell(9, "lean, seed 2")
    finished(site.root / "delta", card(0.5, "digits-cnn", "2026-11-21T17:00:00+00:00"))
    expect(page.locator("tr[data-run=delta]")).to_be_visible(timeout=8000)
    expect(page.locator("tr[data-run=now] .state")).to_contain_text("9 of 12")
    expect(page.get_by_label("choose alpha")).to_be_checked()
    expect(page.get_by_label("choose beta")).to_be_focused()
    page.get_by_label("Search").fill("delta")
    assert names(page) == ["delta"]


def test_by_keyboard_alone(page: Any, site: Site) -> None:
    page.goto(site.address)
    for _ in range(3):  # theme, search, and past the disabled button the scrolling region
        page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator("th[data-key=run]").get_attribute("aria-sort") == "ascending"
    page.get_by_label("Search").focus()
    page.keyboard.type("digits-cnn")
    assert set(names(page)) == {"alpha", "beta"}
    page.get_by_label("choose alpha").focus()
    page.keyboard.press("Space")
    page.keyboard.press("Tab")  # alpha's link
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.get_by_label("Search").focus()
    page.keyboard.press("Enter")  # must not leave the page, though two runs are chosen
    page.wait_for_timeout(300)
    expect(page.locator("h1")).to_have_text("Runs")
    page.get_by_role("button", name="Compare chosen runs").focus()
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("Comparison")


def test_compare_and_plot(page: Any, site: Site) -> None:
    page.goto(f"{site.address}/compare?run=alpha&run=beta&run=gamma%20100%25")
    expect(page.locator(".cautions")).to_contain_text("different workloads")
    row = page.locator("table.against tr", has_text="worst class accuracy").locator("visible=true")
    assert row.count() == 2
    cell = page.locator("tr[data-search^='accuracy accuracy '][data-search$=' plain'] td").nth(2)
    expect(cell).to_contain_text("−.200 [−.200, −.200]")
    expect(cell).to_contain_text("▼")
    page.get_by_label("Search").fill("size plain")
    expect(page.locator("#shown")).to_have_text("1 of 10 rows")
    expect(page.locator("tr.probe", has_text="accuracy").first).to_be_hidden()
    page.get_by_label("Search").fill("")
    page.get_by_label("only differences beyond").check()
    expect(page.locator("#shown")).to_have_text("4 of 10 rows")  # timings are not compared
    page.get_by_label("only differences beyond").uncheck()
    page.get_by_label("Search").fill("nothing like it")
    expect(page.locator("#none")).to_be_visible()
    page.get_by_label("Difference from").select_option(label="beta: lean")
    expect(page).to_have_url(f"{site.address}/compare?run=alpha&run=beta&run=gamma+100%25&base=1.1")
    plain = page.locator("tr[data-search^='accuracy accuracy '][data-search$=' plain'] td")
    expect(plain.nth(1)).to_contain_text("+.300")

    dots = page.locator("#pareto svg g[aria-label=dot] path, #pareto svg g[aria-label=dot] circle")
    expect(dots).to_have_count(6)
    expect(page.locator("#key li")).to_have_text(["1 alpha", "2 beta", "3 gamma 100%"])
    assert len(set(dots.evaluate_all("all => all.map(d => d.getAttribute('stroke'))"))) == 3  # a colour a run
    assert page.get_by_label("log across").is_checked()  # 500 to 64,000 bytes
    page.get_by_role("combobox", name="up").select_option(label="cost: latency, batch of 1 (ms)")
    expect(page.locator("#pareto svg")).to_contain_text("latency, batch of 1 (ms)")
    page.get_by_label("log up").check()
    page.get_by_role("combobox", name="across").select_option(label="cost: offset")
    expect(page.get_by_label("log across")).to_be_disabled()
    expect(page.locator("#pareto")).to_contain_text("No Pareto front")
    page.get_by_text("Numbers of this plot").click()
    expect(page.locator("#pareto table tbody tr")).to_have_count(6)
    narrow(page)
    page.get_by_role("link", name="beta").click()
    expect(page.locator("h1")).to_have_text("Scorecard")


def test_a_scorecard_and_its_downloads(page: Any, site: Site) -> None:
    page.goto(site.address)
    page.get_by_role("link", name="gamma 100%").click()
    expect(page.locator("h1")).to_have_text("Scorecard")
    expect(page.locator("#pareto svg").first).to_be_attached()
    page.get_by_text("Files (2)").click()
    with page.expect_download() as got:
        page.get_by_role("link", name="models/plain-0.safetensors").click()
    assert got.value.suggested_filename == "plain-0.safetensors"
    assert Path(got.value.path()).read_bytes() == WEIGHTS
    narrow(page)
    page.get_by_role("link", name="All runs").click()
    expect(page.locator("h1")).to_have_text("Runs")


def test_live_progress_until_the_scorecard(page: Any, site: Site) -> None:
    page.goto(f"{site.address}/run/now")
    expect(page.locator("#count")).to_have_text("3 of 12 jobs done")
    expect(page.locator("#resume")).to_be_hidden()
    site.tell(7, HOSTILE)
    expect(page.locator("#count")).to_have_text("7 of 12 jobs done")
    expect(page.locator("#what")).to_have_text(HOSTILE)
    assert page.locator(".far progress").evaluate("bar => bar.value") == 7
    fcntl.flock(site.lock, fcntl.LOCK_UN)
    expect(page.locator("#state")).to_have_text("stopped")
    expect(page.locator("#resume")).to_be_visible()
    expect(page.locator("#resume")).to_contain_text(f"cupel run --resume {site.root / 'now'}")
    narrow(page)
    fcntl.flock(site.lock, fcntl.LOCK_EX)
    expect(page.locator("#resume")).to_be_hidden()
    finished(site.root / "now", card(0.9, "digits-vit", "2026-11-21T17:00:00+00:00"))
    expect(page.locator("h1")).to_have_text("Scorecard")


def test_a_run_that_goes_away_while_open(page: Any, site: Site) -> None:
    page.goto(f"{site.address}/run/now")
    (site.root / "now").rename(site.root.parent / "elsewhere")
    expect(page.locator("#state")).to_have_text("the folder is gone")


def test_names_with_html_are_text_and_run_nothing(page: Any, site: Site) -> None:
    page.on("dialog", lambda d: page.problems.append(f"dialog {d.message}") or d.dismiss())
    page.goto(site.address)
    page.get_by_role("link", name="onerror").click()
    expect(page.locator("h1")).to_have_text("Scorecard")
    expect(page.locator("header")).to_contain_text(HOSTILE)
    assert page.locator("img").count() == 0
    page.goto(f"{site.address}/run/broken")
    expect(page.locator(".wrong")).to_contain_text("must be JSON")
    narrow(page)


def test_the_theme_is_switched_and_kept(page: Any, site: Site) -> None:
    page.emulate_media(color_scheme="light")
    page.goto(site.address)
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Switch to dark theme").click()
    after = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert before != after
    page.goto(f"{site.address}/compare?run=alpha&run=beta")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == after
