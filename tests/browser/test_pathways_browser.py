"""The graph of pathways in a real browser: filters, comparison, feature images, keyboard, and a smooth drag."""

from __future__ import annotations

import base64
import contextlib
import os
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cupel.report.html import write_page
from cupel.testing.cards import small_card

GROUPS = ("original only", "target only", "both", "attack only")
TOPS = {"original only": [1, 0, 0, 0], "target only": [0, 1, 0, 1], "both": [1, 1, 1, 1], "attack only": [0, 0, 0, 1]}


def pathways(layers: int, wide: int, side: int = 12, seed: int = 0) -> dict[str, Any]:
    """A made-up graph of `layers` x `wide` channels and two logits, each with five connections into it."""
    draw = random.Random(seed)
    names = [[f"stage{i // 4}.{i % 4}.conv", 64] for i in range(layers)] + [["head", 10]]
    columns: dict[str, list[Any]] = {k: [] for k in ("layer", "channel", "group", "score", "top", "shift", "patches")}
    edges: dict[str, list[Any]] = {k: [] for k in ("source", "into", "influence", "path")}
    for i in range(layers + 1):
        for c in range(wide if i < layers else 2):
            group = GROUPS[draw.randrange(4)] if i < layers else GROUPS[c]
            score = [round(draw.random(), 3) for _ in range(4)]
            shift = [0, draw.choice((-1, 0, 1))]
            patches = [[draw.randrange(6), draw.randrange(4), draw.randrange(4), 8] for _ in range(3)]
            values = (i, c, group, score, TOPS[group], shift, patches)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
            for source in draw.sample(range(wide), min(5, wide)) if i else ():
                edges["source"].append((i - 1) * wide + source)
                edges["into"].append(len(columns["layer"]) - 1)
                edges["influence"].append([round(draw.random(), 3) for _ in range(4)])
                edges["path"].append([int(draw.random() < 0.7) for _ in range(4)])
    pixels = [base64.b64encode(bytes(draw.randrange(256) for _ in range(side * side))).decode() for _ in range(6)]
    images = {"width": side, "height": side, "channels": 1, "bytes": pixels}
    return {"pair": [3, 5], "strengths": [0.1, 0.2], "success": [0.25, 1.0], "layers": names, "neurons": columns,
            "edges": edges, "images": images}  # fmt: skip


@pytest.fixture(scope="module")
def folder(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("paths")
    for name, figure in {"small": pathways(3, 6), "large": pathways(20, 25), "odd": {"strengths": [1], "x": 2}}.items():
        card = small_card()
        for variant in card["variants"].values():
            for probe in variant["probes"].values():
                probe["figures"] = {}
            variant["probes"]["evasion"]["figures"] = {"pathways": figure}
        write_page(card, made / f"{name}.html")
    return made


@pytest.fixture
def opened(page: Any, folder: Path) -> Callable[..., Any]:
    def go(name: str = "small") -> Any:
        page.goto((folder / f"{name}.html").as_uri())
        page.evaluate("document.querySelector('#figures').scrollIntoView(); cupel.drawAll()")
        page.wait_for_function("document.documentElement.classList.contains('drawn')")
        return page

    return go


def settled(page: Any) -> None:
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.wait_for_function("!document.querySelector('canvas.graph').cupelGraph.busy()")


def ink(page: Any) -> list[int]:
    """How many pixels of the first graph have each of the colours that mean something, roughly."""
    settled(page)
    found: list[int] = page.evaluate(
        """() => {
        const node = document.querySelector("canvas.graph"), copy = document.createElement("canvas");
        copy.width = node.width; copy.height = node.height;
        const read = copy.getContext("2d", { willReadFrequently: true });
        read.drawImage(node, 0, 0);
        const all = read.getImageData(0, 0, node.width, node.height).data;
        const css = getComputedStyle(node), far = (a, b) => Math.abs(a - b);
        return ["--c1", "--c7", "--c2", "--c4"].map((name) => {
          const { r, g, b } = d3.rgb(css.getPropertyValue(name).trim());
          let n = 0;
          for (let p = 0; p < all.length; p += 4)
            n += all[p + 3] > 250 && far(all[p], r) + far(all[p + 1], g) + far(all[p + 2], b) < 6;
          return n; }); }"""
    )
    return found


def at(page: Any, i: int) -> tuple[float, float]:
    page.locator("canvas.graph").first.scroll_into_view_if_needed()
    x, y = page.evaluate("(i) => document.querySelector('canvas.graph').cupelGraph.at(i)", i)
    return x, y


def test_groups_and_shifts_are_filtered(opened: Any) -> None:
    page = opened()
    panel = page.locator(".panel.pathways").first
    panel.get_by_text("Pathway only").click()
    before = ink(page)
    assert all(before)
    for k, name in enumerate(("original only", "both", "target only", "attack only")):
        button = panel.get_by_role("button", name=name)
        assert button.get_attribute("aria-pressed") == "true"
        button.click()
        assert button.get_attribute("aria-pressed") == "false"
        assert ink(page)[k] < 0.35 * before[k], name  # lines may share a colour with marks
        button.click()
    assert ink(page) == before
    excited = panel.get_by_role("button", name="excited")
    excited.click()
    only = ink(page)
    assert excited.get_attribute("aria-pressed") == "true" and sum(only) < sum(before)
    panel.get_by_role("button", name="inhibited").click()
    assert sum(only) < sum(ink(page)) < sum(before)


def test_views_compare_the_classes_with_the_attack(opened: Any) -> None:
    page = opened()
    panel = page.locator(".panel.pathways").first
    drawn = [ink(page)]
    for view in ("Original class", "Target class", "Attacked"):
        panel.locator("select").first.select_option(label=view)
        drawn.append(ink(page))
        assert view.lower() in panel.locator(".key").first.inner_text().lower()
    assert len({tuple(d) for d in drawn}) == 4
    strength = panel.locator("select").nth(1)
    assert strength.locator("option").all_inner_texts() == ["0.1 (25 % succeed)", "0.2 (100 % succeed)"]
    assert strength.input_value() == "1"
    strength.select_option("0")
    assert ink(page) != drawn[-1]


def test_pointing_shows_feature_images_and_clicking_keeps_them(opened: Any) -> None:
    page = opened()
    panel = page.locator(".panel.pathways").first
    x, y = at(page, 8)
    page.mouse.move(x, y)
    card = panel.locator(".channel-card")
    card.wait_for(state="visible")
    assert "channel" in card.inner_text() and card.locator("canvas").count() == 3
    box, graph = card.bounding_box(), panel.locator("canvas.graph").bounding_box()
    assert graph["x"] <= box["x"] and box["x"] + box["width"] <= graph["x"] + graph["width"] + 1
    page.mouse.click(x, y)
    side = panel.locator(".channel")
    title = side.locator(".panel-name").first.inner_text()
    assert title.startswith("stage0.1.conv, channel ")
    assert side.locator(".features canvas").count() == 6  # the part that it sees, and where
    assert side.locator(".scores tr").count() == 4 and side.locator(".goto").count() >= 5
    page.mouse.move(x + 60, y + 9)
    side.locator(".goto").first.click()
    assert side.locator(".panel-name").first.inner_text() != title
    assert side.locator(".panel-name").first.inner_text().startswith("stage0.0.conv")


def test_a_channel_and_the_ground_are_dragged(opened: Any) -> None:
    page = opened()
    x, y = at(page, 8)
    other = at(page, 0)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 30, y + 5)
    page.mouse.move(x + 70, y - 40)
    page.mouse.up()
    assert at(page, 8) == pytest.approx((x + 70, y - 40), abs=1.5) and at(page, 0) == pytest.approx(other, abs=0.5)
    assert page.locator(".channel .panel-name").count() == 0  # a drag is no click
    page.mouse.move(x + 130, y + 160)
    page.mouse.down()
    page.mouse.move(x + 150, y + 170, steps=3)
    page.mouse.up()
    assert at(page, 0) == pytest.approx((other[0] + 20, other[1] + 10), abs=1.5)
    page.get_by_role("button", name="Zoom in").first.click()
    near, far = at(page, 0), at(page, 8)
    page.get_by_role("button", name="Zoom out").first.click()
    assert far[0] - near[0] > at(page, 8)[0] - at(page, 0)[0]
    page.get_by_role("button", name="Fit the graph").first.click()
    assert at(page, 0) == pytest.approx(other, abs=1.5)
    assert at(page, 8) == pytest.approx((x + 70, y - 40), abs=1.5)  # stays where the reader put it


def test_the_keyboard_reaches_every_channel(opened: Any) -> None:
    page = opened()
    panel = page.locator(".panel.pathways").first
    panel.get_by_text("Pathway only").click()
    graph = panel.locator("canvas.graph")
    graph.focus()
    page.mouse.move(0, 0)  # or what lies under the pointer after scrolling answers it too
    page.wait_for_timeout(300)
    page.keyboard.press("ArrowLeft")
    said = panel.locator("[role=status]")
    assert said.inner_text().startswith("head, class 5")
    page.keyboard.press("ArrowUp")
    assert said.inner_text().startswith("head, class 3")
    seen = set()
    for layer in ("stage0.2.conv", "stage0.1.conv", "stage0.0.conv"):
        page.keyboard.press("ArrowLeft")
        assert said.inner_text().startswith(layer)
        for key in ["ArrowUp"] * 6 + ["ArrowDown"] * 6:
            page.keyboard.press(key)
            seen.add(said.inner_text().split(":")[0])
    assert len(seen) == 18
    page.keyboard.press("Enter")
    chosen = panel.locator(".channel .panel-name").first.inner_text()
    assert chosen in seen
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("+")
    page.keyboard.press("0")
    page.keyboard.press("Escape")
    assert panel.locator(".channel .panel-name").count() == 0


def test_numbers_are_in_a_table_and_the_theme_switches(opened: Any) -> None:
    page = opened()
    panel = page.locator(".panel.pathways").first
    panel.locator("summary").click()
    assert panel.locator(".numbers tbody tr").count() == 3 * 6 + 2
    settled(page)
    light = page.evaluate("document.querySelector('canvas.graph').toDataURL()")
    page.click("#theme")
    settled(page)
    assert all(ink(page)) and page.evaluate("document.querySelector('canvas.graph').toDataURL()") != light


@pytest.mark.parametrize("width", [1280, 700, 360])
def test_nothing_is_wider_than_the_page(opened: Any, width: int) -> None:
    page = opened("large")
    page.set_viewport_size({"width": width, "height": 800})
    page.wait_for_function("(w) => document.querySelector('canvas.graph').clientWidth < w", arg=width)
    x, y = at(page, 40)
    page.mouse.click(x, y)
    settled(page)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width
    over = page.evaluate(
        """() => [...document.querySelectorAll(".pathways *")]
        .filter((n) => n.clientWidth && n.scrollWidth > n.clientWidth + 1 && !n.closest(".wide, .sr, .numbers"))
        .map((n) => n.className || n.tagName)"""
    )
    assert over == []


def test_a_figure_that_does_not_fit_together_is_told_in_words(opened: Any) -> None:
    page = opened("odd")
    assert page.locator("canvas.graph").count() == 0 and "strengths" in page.inner_text("#figures")


DRAG = """async ([x, y]) => {
  const node = document.querySelector("canvas.graph"), gaps = [];
  const frame = () => new Promise((done) => requestAnimationFrame(done));
  const send = (type, x, y) => node.dispatchEvent(new PointerEvent(type, {
    clientX: x, clientY: y, pointerId: 1, bubbles: true, button: 0, buttons: 1, isPrimary: true }));
  node.setPointerCapture = () => {};
  send("pointerdown", x, y);
  let last = await frame();
  for (let k = 0; k < 180; k++) {
    send("pointermove", x + 80 * Math.sin(k / 9), y + 60 * Math.cos(k / 7));
    const now = await frame();
    gaps.push(now - last);
    last = now;
  }
  send("pointerup", x + 80, y);
  return gaps;
}"""


@pytest.mark.parametrize("what", ["a channel", "the ground"])
def test_a_drag_among_five_hundred_channels_keeps_sixty_frames_a_second(opened: Any, capsys: Any, what: str) -> None:
    page = opened("large")
    page.locator(".pathways canvas.graph").first.scroll_into_view_if_needed()
    page.locator(".panel.pathways").first.get_by_text("Pathway only").click()  # all 502 channels, 2,400 connections
    settled(page)
    x, y = at(page, 260)
    if what == "the ground":
        x, y = x + 14, y - 9.5
    before = spent()
    gaps = page.evaluate(DRAG, [x, y])
    each, rate = (spent() - before) / len(gaps), 1000 / statistics.mean(gaps)
    with capsys.disabled():
        print(f"\n502 channels, dragging {what}: {rate:.1f} frames/s, median {statistics.median(gaps):.1f} ms a frame, "
              f"{each:.1f} ms of processor time a frame, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    assert each < 1000 / 60  # all processes of the browser together: a single core keeps up
    if os.getloadavg()[0] < 0.5 * (os.cpu_count() or 1):  # else other programs decide how often a frame gets its turn
        assert rate > 55


def spent() -> float:
    """Processor time in ms of all programs that this one has started, and of those that they have."""
    found: dict[int, tuple[int, float]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # a process may end meanwhile
            part = path.read_text(errors="replace").rsplit(")", 1)[1].split()
            found[int(path.parent.name)] = (
                int(part[1]),
                (int(part[11]) + int(part[12])) * 1000 / os.sysconf("SC_CLK_TCK"),
            )
    reached, total = {os.getpid()}, 0.0
    while more := {pid for pid, (parent, _) in found.items() if parent in reached and pid not in reached}:
        reached |= more
        total += sum(found[pid][1] for pid in more)
    return total
