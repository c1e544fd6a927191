"""Plain values that remember the line they came from."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cupel.core.errors import RecipeError, nearest

MAX_BYTES, MAX_NODES, MAX_DEPTH = 1_000_000, 20_000, 40


@dataclass
class Tree:
    """A scalar, a list of trees, or a dict of trees, with file and line."""

    value: Any
    where: str = ""

    def error(self, message: str) -> RecipeError:
        return RecipeError(f"{self.where}: {message}" if self.where else message)

    def told(self) -> str:
        """The value as a message shows it, shortened."""
        text = repr(self.plain())
        return text if len(text) <= 60 else text[:57] + "..."

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {k: t.plain() for k, t in self.value.items()}
        if isinstance(self.value, list):
            return [t.plain() for t in self.value]
        return self.value

    def mapping(self, what: str, known: Iterable[str] = ()) -> dict[str, Tree]:
        if not isinstance(self.value, dict):
            raise self.error(f"{what} must be a mapping; got {self.told()}. Write `key: value` lines below it.")
        known = list(known)
        for key, tree in self.value.items():
            if known and key not in known:
                raise tree.error(
                    f"a key of {what} must be one of {', '.join(known)}; got {key!r}.{nearest(key, known)} "
                    "Correct or remove it."
                )
        return self.value

    def sequence(self, what: str) -> list[Tree]:
        if not isinstance(self.value, list):
            raise self.error(f"{what} must be a list; got {self.told()}. Write `[a, b]` or `- a` lines.")
        return self.value


_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, with `1e-3` read as a number, as people mean it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_file(path: Path) -> Tree:
    """Read a YAML file into a tree, within bounds of size, depth and expansion."""
    if path.is_dir():
        raise RecipeError(f"{path}: a recipe must be a YAML file; got a directory. Name a file in it.")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)  # bounded: a device has no end
        if len(raw) > MAX_BYTES:
            raise RecipeError(f"{path}: a recipe must be under {MAX_BYTES:,} bytes; got more. Is this the right file?")
        text = raw.decode("utf-8")
    except FileNotFoundError:
        raise RecipeError(
            f"{path}: a recipe must exist; there is no such file.{_siblings(path)} Check the path."
        ) from None
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError(
            f"{path}:{line}: a recipe must be UTF-8 text; byte {error.start} is not. Save it as UTF-8."
        ) from None
    except OSError as error:
        raise RecipeError(f"{path}: a recipe must be readable; {error.strerror}. Check its permissions.") from None
    except ValueError:
        raise RecipeError(f"{str(path)!r:.80}: a recipe must have a path without zero bytes. Check the path.") from None
    return parse_text(text, str(path))


def _siblings(path: Path) -> str:
    try:
        return nearest(path.name, [p.name for p in path.parent.iterdir()])
    except OSError:
        return ""


def parse_text(text: str, name: str) -> Tree:
    try:
        loader = _Loader(text)  # refuses control characters at once
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark else 1
        tab = "\t" in (text.splitlines()[line - 1] if line <= len(text.splitlines()) else "")
        hint = "Use spaces: YAML does not take tabs." if tab else "Correct the YAML there."
        raise RecipeError(f"{name}:{line}: a recipe must be YAML; {error.problem}. {hint}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(
            f"{name}: a recipe must be YAML text; {str(error).splitlines()[0]}. Save it as plain text."
        ) from None
    if node is None:
        raise RecipeError(
            f"{name}:1: a recipe must hold something; the file is empty. Start with `workload: digits-cnn`."
        )
    return _Reader(loader, name).read(node, ())


class _Reader:
    def __init__(self, loader: _Loader, name: str) -> None:
        self.loader, self.name, self.count = loader, name, 0

    def read(self, node: yaml.Node, above: tuple[int, ...]) -> Tree:
        where = f"{self.name}:{node.start_mark.line + 1}"
        self.count += 1
        if self.count > MAX_NODES or len(above) > MAX_DEPTH:
            raise RecipeError(
                f"{where}: a recipe must stay under {MAX_NODES:,} values and {MAX_DEPTH} levels; this one does not. "
                "Look for anchors that repeat each other."
            )
        if id(node) in above:
            raise RecipeError(f"{where}: a value must not contain itself; this anchor does. Break the circle.")
        above = (*above, id(node))
        if node.tag not in _TAGS:
            raise RecipeError(f"{where}: a value must be plain; got tag {node.tag}. Remove the tag.")
        if isinstance(node, yaml.MappingNode):
            return Tree(self._mapping(node, above), where)
        if isinstance(node, yaml.SequenceNode):
            return Tree([self.read(child, above) for child in node.value], where)
        try:
            value = self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError):  # LookupError: `!!int ''`, `!!bool maybe`
            raise RecipeError(
                f"{where}: a value must be readable; got {node.value!r:.40}. Write a plain value."
            ) from None
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{where}: a number must be finite; got {value}. Write a finite one.")
        return Tree(value, where)

    def _mapping(self, node: yaml.MappingNode, above: tuple[int, ...]) -> dict[str, Tree]:
        found: dict[str, Tree] = {}
        for key_node, value_node in node.value:
            line = f"{self.name}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode) or key_node.value == "<<":
                raise RecipeError(
                    f"{line}: a key must be a plain word; got {key_node.value!r:.40}. Write `name: value`."
                )
            key = str(key_node.value)
            if key in found:
                raise RecipeError(f"{line}: key {key!r} must stand once; it stands twice. Remove one.")
            child = self.read(value_node, above)
            if not isinstance(child.value, (dict, list)):
                child.where = line
            found[key] = child
        return found


def from_python(value: Any, depth: int = 0, count: Iterator[int] | None = None) -> Tree:
    """A tree of Python values; methods given as objects stay objects."""
    count = count or itertools.count(1)
    if depth > MAX_DEPTH or next(count) > MAX_NODES:
        raise RecipeError(
            f"a recipe must stay under {MAX_NODES:,} values and {MAX_DEPTH} levels; this one does not. "
            "Does a value contain itself?"
        )
    if isinstance(value, Mapping):
        return Tree({str(k): from_python(v, depth + 1, count) for k, v in value.items()})
    if isinstance(value, (list, tuple)) and not dataclasses.is_dataclass(value):
        return Tree([from_python(v, depth + 1, count) for v in value])
    return Tree(value)


def put_at(tree: Tree, change: str) -> None:
    """Apply one `path=value` setting, such as `variants.lean.0.fit.techniques.0.pdp.sparsity=0.8`."""
    path, sign, text = change.partition("=")
    if not sign or not path:
        raise RecipeError(f"--set must be path=value; got {change!r}. Write --set workload.digits-cnn.width=8")
    steps, here = path.split("."), tree
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        if isinstance(here.value, list):
            if not (step.isascii() and step.isdigit()) or int(step) >= len(here.value):
                raise RecipeError(f"--set {change}: {step!r} must be a position below {len(here.value)}. Count from 0.")
            if last:
                here.value[int(step)] = parse_text(text, "--set")
                return
            here = here.value[int(step)]
            continue
        if isinstance(here.value, str) and here.value == step:
            here.value = {step: Tree({})}  # a bare name gains parameters
        if not isinstance(here.value, dict):
            above = ".".join(steps[:i])
            raise RecipeError(f"--set {change}: {above!r} must hold keys; nothing lies under it. Check the path.")
        if last:
            here.value[step] = parse_text(text, "--set")
            return
        if step not in here.value:
            raise RecipeError(
                f"--set {change}: {step!r} must be a key there.{nearest(step, here.value)} Check the path."
            )
        here = here.value[step]
