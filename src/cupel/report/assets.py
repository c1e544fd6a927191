"""The style and the scripts that the scorecard page and `cupel ui` share; nothing is fetched from a network."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent
VENDOR = ("vendor/d3.min.js", "vendor/plot.umd.min.js")
OURS = ("elements.js", "plots.js", "series.js", "pictures.js", "graph.js", "pathways.js", "figures.js", "table.js")


def style() -> str:
    """The style sheet: colours as CSS variables, light and dark, screen and paper."""
    return _text("page.css")


def early() -> str:
    """A few lines for the page's head: the theme chosen last time, before anything is painted."""
    return _text("theme.js")


def scripts() -> list[str]:
    """D3 and Plot, then ours, in the order in which a page must run them. They only define `window.cupel`."""
    return [_text(name) for name in (*VENDOR, *OURS)]


def licenses() -> str:
    """The notices that D3 and Plot want beside every copy of them."""
    return _text("vendor/LICENSES")


def page_script() -> str:
    """What the scorecard page runs after `scripts()`: it reads the embedded data and draws."""
    return _text("page.js")


@cache
def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
