"""Methods on the command line: `pdp:sparsity=0.8,epochs=3` as an entry of a recipe."""

from __future__ import annotations

from typing import Any


def ref(text: str, between: str = ",") -> Any:
    """`NAME` or `NAME:key=value<between>key=value`; values are read as YAML.

    >>> ref("pdp:sparsity=0.8,stop=0.5"), ref("pdp"), ref("my.module:Cls")
    ({'pdp': {'sparsity': 0.8, 'stop': 0.5}}, 'pdp', 'my.module:Cls')

    Raises:
        ParamError: a parameter without a value.
    """
    import yaml

    from cupel.core.errors import ParamError

    name, colon, rest = text.strip().partition(":")
    if not colon or ("=" not in rest and "." in name):
        return text.strip()
    if "." in name:  # the user's own class, then its parameters
        kind, _, rest = rest.partition(":")
        name = f"{name}:{kind}"
    params: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in rest.split(between))):
        key, equals, value = part.partition("=")
        if not equals:
            raise ParamError(f"a parameter must be key=value; got {part!r}. Write {name}:key=value.")
        try:
            params[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ParamError(f"{key.strip()} of {name} must be a plain value; got {value!r}. Correct it.") from None
    return {name: params} if params else name


def refs(text: str) -> list[Any]:
    """Several, with commas between; parameters of one with colons.

    >>> refs("accuracy,evasion:eps=0.1:steps=5")
    ['accuracy', {'evasion': {'eps': 0.1, 'steps': 5}}]
    """
    return [ref(part, ":") for part in text.split(",") if part.strip()]
