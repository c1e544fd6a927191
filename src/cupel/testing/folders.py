"""Comparing run folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def content(folder: Path) -> dict[str, Any]:
    """Everything in a run folder but dates, durations and the page that is drawn from the rest."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if k not in ("date", "seconds")}
        return [without(v) for v in value] if isinstance(value, list) else value

    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".html"):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = without(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".jsonl":
            found[name] = [without(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        else:
            found[name] = path.read_bytes()
    return found
