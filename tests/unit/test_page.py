"""The scorecard page: what stands in it is what the scorecard says, whatever a recipe or a probe wrote."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupel.core.scorecard import exact, over_seeds, share
from cupel.report import assets
from cupel.report.embedded import as_json, data_of, plain
from cupel.report.figures import figures_of, fit_into
from cupel.report.html import LIMIT, page, write_page
from cupel.report.kinds import drawn
from cupel.report.pixels import depth, picture
from cupel.report.words import label, number, rows_of, spread, variants_of
from cupel.testing.cards import large_card

EVIL = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">&amp;"\'<b>'
KINDS = {
    "confusion", "reliability", "lines", "dots", "heat", "images", "records", "facts", "listing", "pathways", "none",
}  # fmt: skip


def cells(*values: float, unit: str = "share", better: str = "higher") -> dict[str, Any]:
    readings = [share(round(v * 50), 50) if unit == "share" else exact(v, unit, better) for v in values]
    return over_seeds(readings)


def card_of(figures: Any = None, variants: int = 3) -> dict[str, Any]:
    """A scorecard by hand: readings of three kinds, one of them missing in the last variant."""
    names = [f"v{i}" for i in range(variants)]

    def variant(i: int) -> dict[str, Any]:
        readings = {
            "worst_class_accuracy": cells(0.9 - 0.3 * (i % 3), 0.92 - 0.3 * (i % 3)),
            "size_bytes": cells(64008.0 / (i + 1), unit="bytes", better="lower"),
        }
        late = {"latency_1_p95_ms": cells(0.125 * (i + 1), 0.5, unit="ms", better="lower")}
        timed = {} if i == variants - 1 else late
        curve = [{"step": s, "epoch": e, "loss": 1.5 / e, "lr": 0.01} for s in ("fit", "fit-2") for e in (1, 2)]
        first = {"readings": readings, "notes": ["a note"], "figures": figures or {}, "seconds": 1.0, "forks": 0}
        return {
            "probes": {
                "first": first,
                "second": {"readings": timed, "notes": [], "figures": {}, "seconds": 1.0, "forks": 2},
            },
            "curves": {"0": curve, "1": curve},
            "artefacts": [],
            "notes": {"0": {"bits": {"head": 4.5}}},
            "failures": [],
        }

    recipe = {
        "workload": "some",
        "variants": {n: ["fit"] for n in names},
        "probes": ["first", {"x": {}, "as": "second"}],
    }
    judged = {"rule": "<= v0 / 4", "value": 32004.0, "limit": 16002.0, "passed": False, "why": "too large"}
    return {
        "format": 1,
        "recipe": recipe,
        "seeds": [0, 1],
        "baseline": "v0",
        "variants": {n: variant(i) for i, n in enumerate(names)},
        "versions": {"cupel": "0"},
        "machine": {"system": "s", "processor": "p", "cores": 2, "device": "cpu"},
        "claims": {"pdp": "not held", "dqa": "held"},
        "date": "2026-01-01T00:00:00+00:00",
        "seconds": 3.0,
        "gate": [{"variant": "v1", "reading": "first.size_bytes", **judged}],
    }


class Reader(HTMLParser):
    """All elements, the text of each script, and the table of readings as rows of texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.rows: list[list[str]] = []
        self._in_table, self._in_cell, self._in_script = False, False, False
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")
        if tag == "table":
            self._in_table = dict(attrs).get("id") == "readings"
        if self._in_table and tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._in_cell = self._in_table
            if self._in_table:
                self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._in_script = False
        if tag in ("td", "th"):
            self._in_cell = False
        if tag == "table":
            self._in_table = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
            return
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data


def embedded(text: str) -> dict[str, Any]:
    reader = Reader(text)
    at = [i for i, (tag, _) in enumerate(reader.tags) if tag == "script"]
    data = next(k for k, i in enumerate(at) if reader.tags[i][1].get("id") == "data")
    found: dict[str, Any] = json.loads(reader.scripts[data])
    return found


def test_page_asks_nothing_of_a_network() -> None:
    for tag, attributes in Reader(page(card_of())).tags:
        for key in ("src", "href", "action", "srcset", "data", "poster"):
            target = attributes.get(key) or ""
            assert not target or target.startswith("#") or target == "data:,", (tag, target)
    style = assets.style()
    assert "@import" not in style and "url(" not in style


def test_vendor_files_are_what_they_say_and_stand_in_the_page_once() -> None:
    folder = Path(assets.__file__).parent / "vendor"
    licences = (folder / "LICENSES").read_text(encoding="utf-8")
    for name, version in (("d3.min.js", "D3 7.9.2"), ("plot.umd.min.js", "Observable Plot 0.6.17")):
        text = (folder / name).read_text(encoding="utf-8")
        assert version in licences and version.split()[-1] in text[:80]
    whole = page(card_of())
    assert "Permission to use, copy, modify" in licences and licences.splitlines()[-1] in Reader(whole).text
    for text in [*assets.scripts(), assets.page_script(), assets.early()]:
        assert "</script" not in text.lower() and "<!--" not in text
        assert whole.count(text) == 1


def evil_card() -> dict[str, Any]:
    card = card_of({"confusion": {"counts": [[1, 0], [2, 3]], "classes": [EVIL, "b"]}, EVIL: {EVIL: [EVIL, {EVIL: 1}]}})
    card["variants"] = {EVIL if k == "v1" else k: v for k, v in card["variants"].items()}
    card["recipe"]["variants"] = {v: ["fit", EVIL] for v in card["variants"]}
    card["recipe"]["workload"] = {EVIL: {"width": 1}}
    for variant in card["variants"].values():
        variant["failures"] = variant["incidents"] = [EVIL]
        variant["notes"] = {"0": {EVIL: {EVIL: EVIL}}}
        variant["probes"] = {EVIL if k == "second" else k: v for k, v in variant["probes"].items()}
        variant["probes"]["first"]["notes"] = [EVIL]
        variant["probes"]["first"]["readings"][EVIL] = cells(0.5, unit=EVIL)
        variant["curves"] = {"0": [{"step": EVIL, "epoch": 1, "loss": 1.0, EVIL: 2.0}]}
    card["recipe"]["probes"] = ["first", {"x": {}, "as": EVIL}]
    card["claims"] = {EVIL: EVIL}
    card["machine"] = {"system": EVIL, "processor": EVIL, "cores": 2, "device": EVIL}
    card["versions"] = {EVIL: EVIL}
    card["gate"][0] |= {"variant": EVIL, "reading": EVIL, "rule": EVIL, "why": EVIL}
    card["date"] = EVIL
    card["classes"], card["notes"] = [EVIL, EVIL], [EVIL]
    return card


def test_nothing_from_a_recipe_becomes_markup() -> None:
    good, bad = Reader(page(card_of())), Reader(page(evil_card()))
    assert {t for t, _ in bad.tags} <= {t for t, _ in good.tags}
    assert len(bad.scripts) == len(good.scripts)
    assert not any(key.startswith("on") for _, attributes in bad.tags for key in attributes)
    assert EVIL in bad.text
    assert EVIL in embedded(page(evil_card()))["variants"]


def test_data_cannot_end_its_script() -> None:
    text = as_json({"a": "</script><!--\u2028"})
    assert "<" not in text and "\u2028" not in text and json.loads(text) == {"a": "</script><!--\u2028"}


@pytest.mark.parametrize("variants", [1, 3, 8, 9, 30])
def test_table_holds_the_numbers_of_the_json(variants: int) -> None:
    card = json.loads(json.dumps(card_of(variants=variants)))
    reader, names = Reader(page(card)), variants_of(card)
    wanted = {}
    for _, reading, by in rows_of(card):
        for name in names:
            cell = by.get(name)
            wanted[label(reading), name] = (number(cell["value"], cell["unit"]), spread(cell)) if cell else ("n/a", "")
    head = next(row for row in reader.rows if row and row[0].strip() in ("reading", "variant"))
    found = {}
    for row in reader.rows:
        if len(row) == len(head) and row is not head and row[0]:
            for title, text in zip(head[1:], row[1:], strict=True):
                words = text.split()
                key = (row[0], title) if head[0] == "reading" else (title, row[0])
                found[key] = (words[0], next((w for w in words if w.startswith("±")), ""))
    assert found == wanted


def test_embedded_values_are_those_of_the_scorecard() -> None:
    card = json.loads(json.dumps(card_of()))
    data = embedded(page(card))
    for row, (probe, reading, by) in zip(data["readings"], rows_of(card), strict=True):
        assert (row["probe"], row["name"]) == (probe, label(reading))
        for name, found in zip(data["variants"], row["cells"], strict=True):
            if name not in by:
                assert found is None
                continue
            cell = by[name]
            wanted = [cell["value"], cell["low"], cell["high"], *cell["seeds"]]
            whole = found * len(wanted) if len(found) == 1 else found
            assert whole == pytest.approx(wanted, rel=1e-5)
            assert all(f == w for f, w in zip(whole, wanted, strict=True) if float(w).is_integer())


def test_marks_are_words_too() -> None:
    reader = Reader(page(card_of()))
    row = next(r for r in reader.rows if r and r[0] == "size (bytes)")
    assert [c.split()[-1] for c in row[1:]] == ["64k", "32k", "best"]
    row = next(r for r in reader.rows if r and r[0] == "worst class accuracy")
    assert row[1].endswith("best") and row[3].endswith("worse")


@pytest.mark.parametrize("variants", [9, 30])
def test_marks_of_long_tables_are_those_of_short_ones(variants: int) -> None:
    classes = [a.get("class") for t, a in Reader(page(card_of(variants=variants))).tags if t == "td"]
    assert classes.count("best") == len(range(0, variants, 3)) + 2  # equal accuracies, one size, one latency
    assert classes.count("worse") >= len(range(2, variants, 3))


def test_words_for_every_reading_of_the_catalogue() -> None:
    from cupel.core.catalogue import entries

    names = {r for e in entries() for r in e.card().readings}
    assert len(names) > 30
    for name in names:
        assert not re.search(r"_|\bp95\b|\bms\b(?!\))|\bnll\b|\bece\b|\bauc\b|1fpr|1e\d", label(name)), label(name)


# figures


PICTURE = [[[((x * y) % 7) / 7 for x in range(8)] for y in range(8)]]
FORMS: dict[str, tuple[Any, str]] = {
    "confusion": ([[5, 1], [0, 6]], "confusion"),
    "confusion ": ([[5, 1], [0, 6]], "heat"),
    "reliability": (
        {"rule": "x", "edges": [0, 0.5, 1], "count": [0, 4], "confidence": [None, 0.8], "accuracy": [None, 1]},
        "reliability",
    ),
    "severity": ({"noise": [0.9, 0.8], "blur": [0.7, 0.1]}, "lines"),
    "roc": ([[0, 0], [0.5, 0.8], [1, 1]], "lines"),
    "spectrum": ([[0.1] * 13], "lines"),
    "trigger": ([[0.1] * 20, [0.2] * 20], "lines"),
    "adversarial": ([{"clean": PICTURE, "adversarial": PICTURE, "label": 1, "read_as": 2}], "images"),
    "attributions": ([{"input": [[0.5] * 24], "map": [0.1] * 24, "class": 1}], "images"),
    "layers": ([{"layer": "head", "bits": None, "macs": 4}, {"layer": "x", "sparsity": 0.5}], "records"),
    "recall_at": ({"5": 0.1, "10": None}, "dots"),
    "recall_by_quarter": ([0.1, 0.2, 0.3, 0.4], "dots"),
    "long": (list(range(100)), "lines"),
    "grid": ([[1.0, -2.0, 3.0]] * 9, "heat"),
    "pair": ([[0, 5], [1, 6], [4, 7]], "lines"),
    "number": (0.25, "facts"),
    "word": ("yes", "facts"),
    "truth": (True, "facts"),
    "mixed": ({"a": 1, "b": "two"}, "facts"),
    "nested": ({"a": {"x": 1, "y": [1, 2]}, "b": {"x": 2}}, "records"),
    "ragged": ([[1, 2], [3]], "listing"),
    "odd": ({"a": [1, {"b": [2, "c"]}], "d": 3}, "listing"),
    "image": ([[[0.1] * 6] * 6] * 3, "images"),
    "names": (["a", "b", None], "records"),
    "nothing": ([], "none"),
    "null": (None, "none"),
}  # fmt: skip


@pytest.mark.parametrize("key", FORMS)
def test_form_of_a_figure_gives_its_kind(key: str) -> None:
    value, kind = FORMS[key]
    assert drawn({key: value})[key]["kind"] == kind


def test_known_names_with_other_content_fall_back_to_their_form() -> None:
    for key in ("confusion", "reliability", "severity", "roc", "spectrum"):
        for value in ("word", 3, [1, 2, 3], {"a": {"b": 1}}, [[1], [2, 3]], {"x": None}, [{"a": 1}]):
            assert drawn({key: value})[key]["kind"] in KINDS


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False, width=16) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=40,
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "confusion", "roc", "severity", "clean", "layers", "map"]), json_like))
def test_no_figure_vanishes_and_none_breaks_the_page(figures: dict[str, Any]) -> None:
    card = card_of(plain(figures))
    found = figures_of(card)
    hidden = {"clean", "strengths"} if isinstance(figures.get("severity"), dict) else set()
    facts = {f for entry in found if entry["kind"] == "facts" for f, _ in (entry["all"].get("facts") or [])}
    for key in set(figures) - hidden:
        named = [f for f in found if f["name"] == label(key)]
        inner = figures[key] if isinstance(figures[key], dict) else {}
        assert named or label(key) in facts or any(label(k) in facts for k in inner)
        assert all({*f["by"], *f["none"]} == set(card["variants"]) for f in named)
    assert {f["kind"] for f in found} <= KINDS
    as_json(data_of(card))


def test_severity_takes_strengths_and_the_clean_accuracy_along() -> None:
    found = drawn({"severity": {"noise": [0.9, 0.8]}, "strengths": {"noise": [0.1, 0.2]}, "clean": 0.95})
    assert list(found) == ["severity"]
    assert found["severity"]["series"] == {"noise": [[0, 0.95], [1, 0.9], [2, 0.8]]}
    assert "noise 0.1, 0.2" in found["severity"]["note"]


def test_classes_are_called_by_their_names() -> None:
    pictures = [{"clean": PICTURE, "label": 1, "read_as": 0, "index": 1}]
    found = drawn({"confusion": [[1, 0], [2, 3]], "adversarial": pictures}, ["cat", "dog"])
    assert found["confusion"]["classes"] == ["cat", "dog"]
    assert found["adversarial"]["items"][0]["words"] == "label dog, read as cat, index 1"
    assert drawn({"confusion": [[1, 0], [2, 3]]}, ["cat"])["confusion"]["classes"] == ["0", "1"]


def test_notes_of_the_run_and_incidents_are_told() -> None:
    card = card_of() | {"notes": ["ten classes"]}
    card["variants"]["v1"]["incidents"] = ["seed 0: a worker died"]
    text = Reader(page(card)).text
    assert "ten classes" in text and "a worker died" in text


def test_pictures_keep_their_values_to_a_255th() -> None:
    rows = [[i / 63 for i in range(8 * k, 8 * k + 8)] for k in range(8)]
    made = picture("clean", [rows], (0.0, 1.0))
    back = [b / 255 for b in base64.b64decode(made["bytes"])]
    assert (made["width"], made["height"], made["channels"]) == (8, 8, 1)
    assert back == pytest.approx([v for row in rows for v in row], abs=0.5 / 255 + 1e-9)
    signed = picture("map", [[-2.0, 0.0], [1.0, 2.0]] * 2, (0.0, 1.0))
    back = [signed["low"] + b / 255 * (signed["high"] - signed["low"]) for b in base64.b64decode(signed["bytes"])]
    assert back[:4] == pytest.approx([-2, 0, 1, 2], abs=0.01) and signed["signed"]
    colour = picture("clean", [[[v] * 8] * 8 for v in (0.0, 0.5, 1.0)], (0.0, 1.0))
    assert base64.b64decode(colour["bytes"])[:3] == bytes([0, 128, 255])
    assert depth([[[1]], [[2]]]) == 3


def test_training_curves_of_every_variant_seed_and_step() -> None:
    data = data_of(plain(card_of()))
    assert set(data["curves"]) == {"loss", "learning rate"} and set(data["curves"]["loss"]) == {"fit", "fit-2"}
    assert data["curves"]["loss"]["fit"]["v2"]["1"] == [[1, 1.5], [2, 0.75]]


# size


def test_a_card_too_large_names_the_figures_it_leaves_out() -> None:
    card = card_of(variants=40)
    for i, variant in enumerate(card["variants"].values()):
        pictures = [{"clean": PICTURE, "adversarial": PICTURE, "label": 100 * i + k} for k in range(6)]
        variant["probes"]["first"]["figures"] = {"adversarial": pictures, "layers": [{"a": f"{i}" * 300}]}
    limit = len(page(card).encode()) - 20_000
    small = page(card, limit)
    assert len(small.encode()) <= limit
    data = embedded(small)
    left = sum(len(f["left"]) for f in data["figures"])
    assert data["left_out"] == left > 0
    for figure in data["figures"]:
        assert {*figure["by"], *figure["left"]} == set(card["variants"]) and "v0" in figure["by"]
    assert sum(len(f["left"]) for f in data_of(plain(card))["figures"]) == 0


def test_a_card_far_too_large_names_what_else_it_leaves_out() -> None:
    card = plain(card_of(variants=40))
    whole = len(as_json(data_of(card)))
    assert data_of(card)["lacks"] == []
    some, least = data_of(card, whole - 500), data_of(card, 3_000)
    assert some["lacks"] == ["training curves"] and some["curves"] == {}
    assert some["readings"] == data_of(card)["readings"]
    assert least["lacks"] == ["training curves", "values of single seeds"]
    assert all(cell is None or len(cell) <= 3 for row in least["readings"] for cell in row["cells"])


def test_images_go_before_numbers() -> None:
    figures: list[dict[str, Any]] = [
        {"kind": kind, "by": {f"v{i}": {"x": "y" * 100} for i in range(12)}, "none": [], "left": []}
        for kind in ("images", "confusion")
    ]
    gone = fit_into(figures, 3000)
    assert gone == len(figures[0]["left"]) + len(figures[1]["left"]) > 0
    assert "v0" in figures[0]["by"] and len(figures[1]["by"]) > len(figures[0]["by"])


def test_two_hundred_variants_stay_under_two_megabytes(tmp_path: Path) -> None:
    card = large_card(card_of({k: v for k, (v, _) in FORMS.items()}), 200)
    write_page(card, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < LIMIT
    assert len(Reader((tmp_path / "page.html").read_text(encoding="utf-8")).rows) == 202


# cards at the edge


def test_cards_with_little_in_them_still_make_a_page() -> None:
    card = card_of(variants=1)
    card["gate"], card["claims"] = [], {}
    only = card["variants"]["v0"]
    empty = {"readings": {}, "notes": ["not measured: the variant failed"], "figures": {}, "seconds": 0.0}
    only["probes"] = dict.fromkeys(only["probes"], empty)
    only["curves"], only["failures"], only["notes"] = {}, ["broke"], {}
    reader = Reader(page(card))
    assert "no gate" in reader.text and "failed: broke" in reader.text


def test_a_card_in_memory_gives_the_page_of_its_json() -> None:
    figures = {"pairs": ((0, 1), (1, 2), (3, 5)), "nan": [float("nan"), 1.0]}
    assert page(card_of(figures)) == page(json.loads(json.dumps(card_of(plain(figures)))))


def test_gate_says_what_was_measured() -> None:
    text = Reader(page(card_of())).text
    assert "0 of 1 rule" in text and "first: size (bytes)" in text and "32k" in text and "too large" in text


# colours


def colours(block: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def themes() -> dict[str, dict[str, str]]:
    style = assets.style()
    blocks = {
        "light": style[style.index(":root {") : style.index("@media (prefers")],
        "dark": style[style.index(':root[data-theme="dark"] {') : style.index("/* the page */")],
        "system": style[style.index("@media (prefers-color-scheme: dark)") : style.index(':root[data-theme="dark"] {')],
        "paper": style[style.index("@media print") :],
    }
    return {name: colours(block) for name, block in blocks.items()}


@pytest.mark.parametrize("theme", ["light", "dark", "system", "paper"])
def test_contrast_is_that_of_wcag_aa(theme: str) -> None:
    found = themes()[theme]
    for ground in (found["ground"], found["panel"]):
        for text in ("ink", "soft", "good", "bad", "link"):
            assert contrast(found[text], ground) >= 4.5, (theme, text)
        for mark in ("edge", *(f"c{i}" for i in range(1, 8))):
            assert contrast(found[mark], ground) >= 3, (theme, mark)


def test_both_ways_into_a_theme_give_the_same_colours() -> None:
    found = themes()
    assert found["dark"] == found["system"]
    assert {k: v for k, v in found["light"].items() if k != "focus"} == found["paper"]


def test_headings_descend_one_at_a_time() -> None:
    levels = [int(t[1]) for t, _ in Reader(page(card_of())).tags if re.fullmatch(r"h[1-6]", t)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))


def test_one_variant_is_offered_nothing_to_choose() -> None:
    assert '<body class="single">' in page(card_of(variants=1))
    assert '<body class="">' in page(card_of(variants=2))


def test_a_figure_may_describe_its_own_lines_and_tables_name_classes() -> None:
    own = {"x": "rate", "y": "accuracy", "share": True, "series": {"kept": [[-6, 0.5], [-5, None]]}, "note": "n"}
    found = drawn({"own": own})["own"]
    assert found["kind"] == "lines" and found["x"] == "rate" and found["series"] == {"kept": [[-6, 0.5], [-5, None]]}
    rows = [{"index": 7, "given": 0, "suggested": 1, "share": 0.25}]
    assert drawn({"r": rows}, ["cat", "<b>"])["r"]["rows"] == [["7", "cat", "<b>", 0.25]]
    assert drawn({"r": rows})["r"]["rows"] == [["7", "0", "1", 0.25]]
