"""The scorecard as one self-contained page: no network, light and dark, printable."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cupel.report import assets, told
from cupel.report.embedded import as_json, data_of, plain
from cupel.report.table import readings_table

LIMIT = 2_000_000  # bytes of a page, so that it can be mailed and opens at once
_SPARE = 10_000
_HERE = Path(__file__).parent


def write_page(card: Mapping[str, Any], path: Path) -> None:
    """Write `scorecard.html`."""
    path.write_text(page(card), encoding="utf-8")


def page(card: Mapping[str, Any], limit: int = LIMIT) -> str:
    """The page's text. Every word from the recipe is escaped; figures that `limit` bytes do not hold are named."""
    card = plain(card)
    parts = {
        "TITLE": html.escape(told.title(card)),
        "SINGLE": "single" if len(card["variants"]) == 1 else "",
        "EARLY": assets.early(),
        "STYLE": assets.style(),
        "SUMMARY": told.summary(card),
        "GATE": told.gate(card),
        "TABLE": readings_table(card),
        "FAILURES": told.failures(card),
        "CLAIMS": told.claims(card),
        "RECIPE": html.escape(yaml.safe_dump(card["recipe"], sort_keys=False, allow_unicode=True)),
        "ABOUT": told.about(card),
        "LICENSES": html.escape(assets.licenses()),
        "SCRIPTS": "\n".join(f"<script>{text}</script>" for text in [*assets.scripts(), assets.page_script()]),
    }
    frame = (_HERE / "page.html").read_text(encoding="utf-8")
    used = sum(len(text.encode()) for text in parts.values()) + len(frame)
    parts["DATA"] = as_json(data_of(card, limit - used - _SPARE))
    return re.sub(r"<!--([A-Z]+)-->", lambda found: parts[found[1]], frame)
