"""Who may ask, and what a page may do. Loopback alone keeps nobody out: any web page can send the browser here."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

App = Callable[[MutableMapping[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Any]

_ALWAYS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)
_PAGE = (
    "default-src 'none'; script-src {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
NOTHING = "default-src 'none'; sandbox; base-uri 'none'; frame-ancestors 'none'"


def by_nonce(nonce: str) -> str:
    """The policy of a page of ours: only scripts that carry this page's nonce run.

    Styles may stand in attributes, since the plots set them so; with no foreign image, font or address allowed,
    a style can carry nothing away.
    """
    return _PAGE.format(scripts=f"'nonce-{nonce}'")


def by_hash(scripts: Sequence[str]) -> str:
    """The policy of a drawn scorecard: only these scripts run, each known by its SHA-256."""
    hashes = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    return _PAGE.format(scripts=" ".join(f"'sha256-{h}'" for h in hashes))


def guarded(app: App, port: int) -> App:
    """`app` behind checks of method, host and origin, and with the headers that every answer carries."""
    hosts = {f"127.0.0.1:{port}", f"localhost:{port}"} | ({"127.0.0.1", "localhost"} if port == 80 else set())

    async def checked(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return  # no websockets, no lifespan: the server is told so too
        refused = refusal(scope["method"], scope["headers"], hosts)

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = _completed(list(message["headers"]))
            await send(message)

        if refused is None:
            await app(scope, receive, with_headers)
        else:
            status, line = refused
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"allow", b"GET, HEAD")]
            await with_headers({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": line.encode()})

    return checked


def refusal(method: str, headers: Sequence[tuple[bytes, bytes]], hosts: set[str]) -> tuple[int, str] | None:
    """Status and words for a request that must not be answered, else None.

    A foreign name that was made to point at 127.0.0.1 shows in Host; a page of another site shows in Origin or
    Sec-Fetch-Site. Following a link to here is harmless and stays possible.
    """
    if method not in ("GET", "HEAD"):
        return 405, "only GET and HEAD are answered here\n"
    told: dict[bytes, list[str]] = {}
    for key, value in headers:
        told.setdefault(key.lower(), []).append(value.decode("latin-1"))
    host = told.get(b"host", [])
    if len(host) != 1 or host[0].lower() not in hosts:
        return 421, "this server answers only to 127.0.0.1 and localhost with its own port\n"
    if any(o.lower() not in {f"http://{h}" for h in hosts} for o in told.get(b"origin", [])):
        return 403, "pages of other origins are not answered\n"
    foreign = told.get(b"sec-fetch-site", ["none"])[0] in ("cross-site", "same-site")
    if foreign and told.get(b"sec-fetch-mode", [""])[0] != "navigate":
        return 403, "pages of other sites are not answered\n"
    return None


def _completed(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    there = {key.lower() for key, _ in headers}
    more = [*_ALWAYS, (b"content-security-policy", NOTHING.encode()), (b"cache-control", b"no-store")]
    return headers + [(key, value) for key, value in more if key not in there]
