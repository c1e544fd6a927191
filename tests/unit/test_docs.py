"""Every Python block of the documents runs, and the generated pages are up to date."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import yaml

from cupel.testing.docs import pages

TOP = Path(__file__).parents[2]
WRITTEN = ["README.md", "docs/technique.md", "docs/probe.md", "docs/workload.md"]
BLOCK = re.compile(r"```python([^\n]*)\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("name", WRITTEN)
def test_python_blocks_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = BLOCK.findall((TOP / name).read_text(encoding="utf-8"))
    assert blocks
    module = types.ModuleType("docs_example")
    monkeypatch.setitem(sys.modules, "docs_example", module)
    for head, code in blocks:
        if "file=" in head:
            assert code.rstrip() == (TOP / head.split("file=")[1].strip()).read_text(encoding="utf-8").rstrip()
            continue
        exec(compile(code, name, "exec"), module.__dict__)


def test_recipes_of_the_readme_are_planned() -> None:
    from cupel.runner.plan import make_plan
    from cupel.runner.recipe import recipe_of

    for text in re.findall(r"```yaml\n(.*?)```", (TOP / "README.md").read_text(encoding="utf-8"), re.DOTALL):
        assert make_plan(recipe_of(**yaml.safe_load(text))).nodes


def test_generated_pages_are_up_to_date() -> None:
    for name, text in pages().items():
        assert (TOP / "docs" / name).read_text(encoding="utf-8") == text.rstrip() + "\n", (
            f"run `make docs`: {name} is old"
        )


def test_links_lead_somewhere() -> None:
    for page in [TOP / "README.md", *(TOP / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_recipe_of_every_page_is_read() -> None:
    from cupel.runner.recipe import recipe_of

    count = 0
    for name, text in pages().items():
        for block in re.findall(r"In a recipe:\n\n```yaml\n(.*?)```", text, re.DOTALL):
            found = yaml.safe_load(block)
            parts = {"steps": found} if isinstance(found, list) else found
            rest = {"workload": "digits-cnn", "steps": ["fit"], "probes": ["accuracy"]}
            assert recipe_of(**(rest | parts)).plain(), name
            count += 1
    assert count > 40
