"""Who may import whom, and what must stay unloaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cupel

ROOT = Path(cupel.__file__).parent
# layer -> layers it may import besides itself
MAY = {
    "core": {"core"},
    "storage": {"core", "storage"},
    "runner": {"core", "storage", "runner", "report"},
    "ops": {"core", "ops"},
    "nets": {"core", "ops", "nets"},
    "data": {"core", "ops", "data"},
    "techniques": {"core", "ops", "nets"},
    "probes": {"core", "storage", "ops", "nets"},
    "engines": {"core", "ops", "nets"},
    "intake": {"core", "storage", "ops", "nets", "data", "intake"},
    "workloads": {"core", "storage", "ops", "nets", "data", "intake"},
    "report": {"core", "storage", "report"},
    "ui": {"core", "storage", "report", "ui"},
    "cli": {"core", "storage", "runner", "report", "data", "intake", "ui", "cli"},
}
FORBIDDEN = {"utils", "helpers", "common", "misc"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return {m for m in found if m.startswith("cupel.")}


@pytest.mark.parametrize("layer", MAY)
def test_layer_imports_only_below(layer: str) -> None:
    files = list((ROOT / layer).rglob("*.py"))
    assert files
    for path in files:
        for module in imports(path):
            target = module.split(".")[1]
            assert target in MAY[layer], f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("layer", ["techniques", "probes", "workloads", "engines"])
def test_no_method_imports_another(layer: str) -> None:
    for path in (ROOT / layer).rglob("*.py"):
        assert not {m for m in imports(path) if m.split(".")[1] in ("techniques", "probes", "workloads", "engines")}, (
            path
        )


def test_no_dumping_grounds() -> None:
    assert not [p for p in ROOT.rglob("*.py") if p.stem in FORBIDDEN]


def test_core_is_small() -> None:
    lines = sum(p.read_text(encoding="utf-8").count("\n") for p in (ROOT / "core").glob("*.py"))
    assert lines <= 2500


def test_fit_is_short() -> None:
    assert (ROOT / "core" / "fit.py").read_text(encoding="utf-8").count("\n") <= 250


@pytest.mark.parametrize(
    "words",
    [["list"], ["list", "--json"], ["data", "list"], ["show", "pdp"], ["plan", "RECIPE"], ["schema"], ["--help"]],
)
def test_torch_stays_unloaded(words: list[str]) -> None:
    words = [str(ROOT / "recipes" / "demo.yaml") if w == "RECIPE" else w for w in words]
    code = (
        "import sys, cupel.cli as c\n"
        f"sys.argv = ['cupel', *{words!r}]\n"
        "try:\n    c.main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'\n"
        "assert 'numpy' not in sys.modules, 'numpy was loaded'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr


def test_only_core_runs_backward() -> None:
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] in ("core", "claims"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "backward"), path
