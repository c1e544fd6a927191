"""Serving the application on this machine only."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from pathlib import Path

from cupel.core.errors import CupelError, MissingExtra
from cupel.ui.app import make_app


def bound(port: int) -> socket.socket:
    """A listening socket on 127.0.0.1; port 0 takes any that is free.

    Raises:
        CupelError: the port is taken or not ours to take.
    """
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(("127.0.0.1", port))
        made.listen(64)
    except OSError as error:
        made.close()
        taken = error.errno == errno.EADDRINUSE
        why = "another program listens there" if taken else str(error.strerror)
        raise CupelError(
            f"the port must be free; got {port}: {why}. Give another --port, or --port 0 for any that is free."
        ) from None
    return made


def checked_root(root: Path) -> Path:
    """`root` as a folder that is there.

    Raises:
        CupelError: it is not.
    """
    if not root.is_dir():
        what = "a file" if root.exists() else "nothing"
        raise CupelError(
            f"RUNS must be a run folder or a folder of runs; got {root}, which is {what}. "
            "Make a run with `cupel run`, or give the folder that holds your runs."
        )
    return root.resolve()


def serve(root: Path, port: int, ready: Callable[[str], None]) -> None:
    """Serve until interrupted; `ready` gets the address as soon as it answers.

    Raises:
        CupelError: the folder or the port cannot be used.
        MissingExtra: Starlette or uvicorn is not installed.
    """
    try:
        import uvicorn
    except ImportError:
        raise MissingExtra("uvicorn", "ui") from None
    folder = checked_root(root)
    with bound(port) as listening:
        taken = listening.getsockname()[1]
        config = uvicorn.Config(
            make_app(folder, taken),
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,
        )
        ready(f"http://127.0.0.1:{taken}/")
        uvicorn.Server(config).run(sockets=[listening])
