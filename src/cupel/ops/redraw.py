"""First weights drawn anew."""

from __future__ import annotations

from torch import nn


def redraw(net: nn.Module) -> None:
    """Draw the weights of every layer that can (`reset_parameters`) from torch's own generator, in place.

    Parameters that no layer draws (a class token, positions) stay as they are.
    """
    for module in reversed(list(net.modules())):  # parts before the whole, which may know better
        draw = getattr(module, "reset_parameters", None)
        if callable(draw):
            draw()
