"""The web application: which address shows what."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote

from cupel.core.errors import MissingExtra
from cupel.report import assets
from cupel.ui import comparing, folders, policy, views
from cupel.ui.cards import BadCard, Shelf, Summary, load
from cupel.ui.folders import FINISHED, UNREADABLE

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

_HERE = Path(__file__).parent
_PIECE = 2**18  # bytes of a download read at a time
_TYPES = {"js": "text/javascript", "css": "text/css"}
# What drawing a card that passed the checks may still stumble over: a part that only the page itself looks into.
_STUMBLES = (ArithmeticError, AttributeError, LookupError, RecursionError, StopIteration, TypeError, ValueError)


def make_app(root: Path, port: int) -> policy.App:
    """The application for the runs under `root`, to be served on 127.0.0.1 at `port`.

    Raises:
        MissingExtra: Starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.routing import Route
    except ImportError:
        raise MissingExtra("starlette", "ui") from None
    site = _Site(root.resolve())
    routes = [
        Route("/", site.listing),
        Route("/rows", site.rows),
        Route("/run/{name}", site.run),
        Route("/run/{name}/progress", site.progress),
        Route("/run/{name}/file/{file:path}", site.file),
        Route("/compare", site.compare),
        Route("/static/{name}", site.static),
        Route("/favicon.ico", site.nothing),
    ]
    app = Starlette(routes=routes, exception_handlers={404: site.lost, 500: site.failed})
    app.router.redirect_slashes = False  # an address is right or it is not
    return policy.guarded(app, port)


@cache
def static_files() -> dict[str, str]:
    """The only files of the package that are served, by the name they are served under."""
    return {
        "early.js": assets.early(),
        "report.js": "\n;\n".join(assets.scripts()),
        "report.css": assets.style(),
        "ui.js": (_HERE / "ui.js").read_text(encoding="utf-8"),
        "ui.css": (_HERE / "ui.css").read_text(encoding="utf-8"),
    }


@cache
def version() -> str:
    """Changes when a static file does, so that browsers may keep them."""
    return hashlib.sha256("\0".join(static_files().values()).encode()).hexdigest()[:12]


class _Site:
    """Answers requests about the runs under one folder. Its methods run in worker threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shelf = Shelf(root)

    def listing(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        return _page(views.listing(self.root, self.shelf.summaries(), nonce, version()), nonce)

    def rows(self, request: Request) -> Response:
        return _answer(views.rows(self.shelf.summaries()), "text/html; charset=utf-8")

    def run(self, request: Request) -> Response:
        name = request.path_params["name"]
        folder = folders.runs_in(self.root).get(name)
        if folder is None:
            return _line("No such run", f"There is no run {name!r} here; it may have been moved or deleted.", 404)
        summary, found = self.shelf.summary(name, folder), folders.files_of(folder)
        nonce = secrets.token_urlsafe(16)
        if summary.state == UNREADABLE:
            return _line(name, summary.wrong, 200, views.strip(summary, found))
        if summary.state != FINISHED:
            return _page(views.underway(summary, folder, found, nonce, version()), nonce)
        return _scorecard(summary, folder, views.strip(summary, found))

    def progress(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        name = request.path_params["name"]
        folder = folders.runs_in(self.root).get(name)
        if folder is None:
            return JSONResponse({"state": "gone"})
        p = folders.progress_of(folder)
        return JSONResponse(
            {"state": folders.state_of(folder), "done": p.done, "total": p.total, "count": views.counted(p),
             "what": p.what}
        )  # fmt: skip

    def file(self, request: Request) -> Response:
        name, file = request.path_params["name"], request.path_params["file"]
        folder = folders.runs_in(self.root).get(name)
        if folder is None or file not in folders.files_of(folder):
            return _line("No such file", "This run holds no such file.", 404)
        try:
            opened = folders.open_within(folder, file)
        except OSError:
            return _line("No such file", "The file is not there any more.", 404)
        return _download(opened, file.rsplit("/", 1)[-1], request.method == "HEAD")

    def compare(self, request: Request) -> Response:
        asked = list(dict.fromkeys(request.query_params.getlist("run")))[: comparing.MOST_RUNS]
        runs = folders.runs_in(self.root)
        names, cards, wrong = [], [], []
        for name in asked:
            try:
                if name not in runs:
                    raise BadCard("there is no such run here.")
                cards.append(load(runs[name]))
                names.append(name)
            except BadCard as error:
                wrong.append(f"{name[:100]}: {error}")
        if len(cards) < 2:
            line = " ".join(["Choose two or more finished runs to compare.", *wrong])
            return _line("Comparison", line, 400)
        if sum(_cells(c) for c in cards) > comparing.MOST_CELLS:
            line = f"These runs hold more than {comparing.MOST_CELLS} readings together. Choose fewer."
            return _line("Comparison", line, 400)
        nonce = secrets.token_urlsafe(16)
        try:
            what = comparing.chosen(names, cards, request.query_params.get("base", "0"))
            return _page(comparing.page(what, wrong, nonce, version()), nonce)
        except _STUMBLES as error:
            return _line("Comparison", f"One of these scorecards cannot be compared ({type(error).__name__}).", 400)

    def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in static_files():
            return _line("No such page", "There is nothing at this address.", 404)
        kind = _TYPES[name.rsplit(".", 1)[-1]] + "; charset=utf-8"
        return _answer(static_files()[name], kind, {"cache-control": "private, max-age=86400, immutable"})

    def nothing(self, request: Request) -> Response:
        return _answer("", "image/x-icon")

    def lost(self, request: Request, error: Exception) -> Response:
        return _line("No such page", "There is nothing at this address.", 404)

    def failed(self, request: Request, error: Exception) -> Response:
        return _line("Defect", f"cupel failed to draw this page ({type(error).__name__}); please report it.", 500)


def _cells(card: dict[str, Any]) -> int:
    return sum(len(p["readings"]) for v in card["variants"].values() for p in v["probes"].values())


def _scorecard(summary: Summary, folder: Path, strip: str) -> Response:
    """The run's page, drawn afresh from its numbers.

    The `scorecard.html` in the folder is never shown, only offered for download: whoever sent the folder may have
    put any script into it. What is drawn here holds only our own scripts, and the browser runs no other.
    """
    from cupel.report.html import page

    try:
        text = page(load(folder))
    except BadCard as error:
        return _line(summary.name, str(error), 200, strip)
    except _STUMBLES as error:
        line = f"scorecard.json has a part that cannot be drawn ({type(error).__name__}: {str(error)[:80]})."
        return _line(summary.name, line, 200, strip)
    link = f'<link rel="stylesheet" href="/static/ui.css?{version()}">\n</head>'
    text = re.sub("<body[^>]*>", lambda found: f"{found[0]}\n{strip}", text.replace("</head>", link, 1), count=1)
    trusted = [assets.early(), *assets.scripts(), assets.page_script()]
    return _answer(text, "text/html; charset=utf-8", {"content-security-policy": policy.by_hash(trusted)})


def _page(text: str, nonce: str, status: int = 200) -> Response:
    return _answer(text, "text/html; charset=utf-8", {"content-security-policy": policy.by_nonce(nonce)}, status)


def _line(title: str, line: str, status: int, above: str = "") -> Response:
    nonce = secrets.token_urlsafe(16)
    return _page(views.message(title, line, nonce, version(), above), nonce, status)


def _answer(text: str, kind: str, headers: dict[str, str] | None = None, status: int = 200) -> Response:
    from starlette.responses import Response

    # A lone surrogate from a hostile file has no UTF-8 form; it becomes a question mark.
    return Response(text.encode("utf-8", "replace"), status, {"content-type": kind} | (headers or {}))


def _download(opened: int, name: str, head: bool) -> Response:
    """A file as an attachment, never as something the browser would show or run."""
    from starlette.responses import Response, StreamingResponse

    file = os.fdopen(opened, "rb")  # closes with its last reference, also where the browser goes away first
    length = os.fstat(opened).st_size
    headers = {
        "content-type": "application/octet-stream",
        "content-length": str(length),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}",
    }
    if head:
        file.close()
        return Response(None, 200, headers)
    return StreamingResponse(_pieces(file, length), 200, headers)


def _pieces(file: BinaryIO, length: int) -> Iterator[bytes]:
    """At most `length` bytes, also where the file grows meanwhile."""
    with file:
        while length > 0 and (piece := file.read(min(_PIECE, length))):
            length -= len(piece)
            yield piece
