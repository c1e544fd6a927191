"""The user's own Python, named as `package.module:name`: importing it runs its code, which callers announce."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from cupel.core.errors import CupelError, nearest


def imported(place: str, module: str, name: str, refuse: type[CupelError] = CupelError) -> Any:
    """What `module` calls `name`, found where the command runs or among the installed packages.

    Args:
        place: as the user wrote it, for messages.
        refuse: the kind of error.
    """
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)  # last, so that it hides nobody else's modules
    try:
        value: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise refuse(
            f"{place} must be importable; importing {module} raised {type(error).__name__}: {error}. "
            f"Try `python -c 'import {module}'`."
        ) from None
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    for word in name.split("."):
        if not hasattr(value, word):
            raise refuse(f"{place} must exist; {module} has no {word!r}.{nearest(word, dir(value))} Correct the name.")
        value = getattr(value, word)
    return value
