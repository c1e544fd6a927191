"""cupel refines neural networks and tests them at once.

Everything a recipe does is reachable from Python: `cupel.run`, `cupel.fit`, and each method by name,
`cupel.PDP(sparsity=0.9)`. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_HOME = {
    "apply": "cupel.core.steps",
    "fit": "cupel.core.fit",
    "run": "cupel.runner.run",
    "descend": "cupel.core.descend",
    "Batch": "cupel.core.types",
    "Budget": "cupel.core.types",
    "Examples": "cupel.core.types",
    "Splits": "cupel.core.types",
    "Subject": "cupel.core.types",
    "Classification": "cupel.core.tasks",
    "Context": "cupel.core.context",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    from cupel.core.catalogue import entries

    wanted = name.lower()
    for entry in entries():
        if entry.path.stem.replace("_", "") == wanted and not name.startswith("_"):
            found = entry.load()
            if found.__name__ == name:
                return found
    raise AttributeError(f"module 'cupel' has no attribute {name!r}")
