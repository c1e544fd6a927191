"""A graph of channels and connections that a probe found, checked and put into the shape that the page draws."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from cupel.report.pixels import is_number

_MOST = 4096  # channels, connections by ten: what a person could still look at


def pathways(value: Any, beside: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a figure of kind `pathways`.

    Raises:
        ValueError: something does not fit together; the page then tells the figure in words.
    """
    strengths = [float(v) for v in value["strengths"]]
    layers = [[str(name), _whole(count)] for name, count in value["layers"]]
    neurons, edges, conditions = value["neurons"], value["edges"], 2 + len(strengths)
    images = _images(value["images"])
    count = len(neurons["layer"])
    size = {"score": conditions, "top": conditions, "shift": len(strengths)}
    _need(0 < count <= _MOST and len(edges["into"]) <= 10 * _MOST and strengths and len(layers) > 1)
    _need(len(value["success"]) == len(strengths))
    kept: dict[str, list[Any]] = {"layer": [_within(v, len(layers)) for v in neurons["layer"]]}
    kept |= {"channel": [_whole(v) for v in neurons["channel"]], "group": [_group(v) for v in neurons["group"]]}
    kept |= {key: [_numbers(row, n) for row in neurons[key]] for key, n in size.items()}
    kept["patches"] = [[_patch(p, images) for p in row] for row in neurons["patches"]]
    _need(all(len(column) == count for column in kept.values()))
    joined: dict[str, list[Any]] = {key: [_within(v, count) for v in edges[key]] for key in ("source", "into")}
    joined |= {key: [_numbers(row, conditions) for row in edges[key]] for key in ("influence", "path")}
    _need(len({len(column) for column in joined.values()}) == 1)
    return {
        "kind": "pathways", "pair": [_class(c, beside.get("classes")) for c in value["pair"]], "strengths": strengths,
        "success": _numbers(value["success"], len(strengths)), "layers": layers, "neurons": kept, "edges": joined,
        "images": images, "groups": list(_GROUPS),
    }  # fmt: skip


_GROUPS = ("original only", "both", "target only", "attack only")  # as the page orders them


def _need(holds: Any) -> None:
    if not holds:
        raise ValueError("a graph of channels must fit together")


def _whole(value: Any) -> int:
    _need(isinstance(value, int) and not isinstance(value, bool) and value >= 0)
    return int(value)


def _within(value: Any, count: int) -> int:
    _need(_whole(value) < count)
    return int(value)


def _numbers(row: Sequence[Any], count: int) -> list[Any]:
    _need(isinstance(row, list) and len(row) == count and all(v is None or is_number(v) for v in row))
    return list(row)


def _group(word: Any) -> int:
    return _GROUPS.index(word)


def _class(number: Any, names: Any) -> str:
    known = isinstance(names, list) and isinstance(number, int) and 0 <= number < len(names)
    return str(names[number]) if known else str(_whole(number))


def _images(value: Mapping[str, Any]) -> dict[str, Any]:
    width, height, channels = (_whole(value[k]) for k in ("width", "height", "channels"))
    size = width * height * channels
    _need(size > 0 and channels in (1, 3))
    _need(all(len(base64.b64decode(text, validate=True)) == size for text in value["bytes"]))
    return {"width": width, "height": height, "channels": channels, "bytes": list(value["bytes"])}


def _patch(patch: Sequence[Any], images: Mapping[str, Any]) -> list[int]:
    image, top, left, side = (_whole(v) for v in patch)
    _need(image < len(images["bytes"]) and side > 0)
    _need(top + side <= images["height"] and left + side <= images["width"])
    return [image, top, left, side]
