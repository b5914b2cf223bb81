"""What happens to every request, as plain ASGI: Starlette's `BaseHTTPMiddleware` hides from a stream that its client has left."""

from __future__ import annotations

from collections.abc import Iterable

from starlette._utils import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Header = tuple[bytes, bytes]

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify"
)
"""The page takes HTML from DOMPurify only, even from its own scripts; FastAPI's `/docs`, which loads from elsewhere, has no policy."""
_ALWAYS: tuple[Header, ...] = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"x-frame-options", b"DENY"))
_ON_PAGE = (*_ALWAYS, (b"content-security-policy", PAGE_POLICY.encode()))
_API_CACHING, _PAGE_CACHING = (b"cache-control", b"no-store"), (b"cache-control", b"no-cache")
ON_API: tuple[Header, ...] = (*_ALWAYS, _API_CACHING)
"""What an answer of the API has that says nothing else."""


class SafetyHeaders:
    """Tells browsers what not to do; an answer that says its own `Cache-Control` keeps it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path: str = scope["path"]
        added, caching = _ALWAYS, None
        if path.startswith("/api/"):
            caching = _API_CACHING
        elif path == "/" or path.startswith(("/c/", "/static/")):
            added, caching = _ON_PAGE, _PAGE_CACHING

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message["headers"] = [*message.get("headers", ()), *added]
                if caching and all(name != b"cache-control" for name, _ in headers):
                    headers.append(caching)
            await send(message)

        await self.app(scope, receive, with_headers)


class OptionalSlash:
    """Makes a trailing slash optional without a redirect, which would cost a round trip and lose bodies in some clients."""

    def __init__(self, app: ASGIApp, paths: Iterable[str]) -> None:
        self.app = app
        self._with_slash = frozenset(path for path in paths if path.endswith("/") and path != "/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = get_route_path(scope)
            if path + "/" in self._with_slash:
                scope["path"] += "/"
            elif path.endswith("/") and path not in self._with_slash and len(path) > 1 and path[-2] != "/":
                scope["path"] = scope["path"][:-1]
        await self.app(scope, receive, send)
