"""What a client is told when something is not done: `application/problem+json` (RFC 9457), rendered here and nowhere else.

    Problem                     raised by the edge itself
    ├── Unauthorized      401
    ├── Forbidden         403
    ├── EmailTaken        409
    └── Unprocessable     422   with `errors`

Beside these: `worker.errors` (`_STATUS` says which status), the framework's own (unknown route, wrong method, body too large or not
readable), failed validation, and anything unforeseen, which is a 500 without a word of what was inside. No answer repeats what was sent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, ClassVar

import orjson
import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import iter_route_contexts
from starlette._utils import get_route_path
from starlette.datastructures import Headers, State
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import metrics
from worker.errors import (
    ChatkeepError,
    KeyReused,
    NotFound,
    PostgresUnavailable,
    RedisUnavailable,
    ReplyFailed,
    ReplyStopped,
    TooMany,
    TooManyStreams,
    TryAgainLater,
    TurnRunning,
    UserBacklogFull,
)
from worker.logs import describe

MEDIA_TYPE = "application/problem+json"
_STATUS: Mapping[type[ChatkeepError], int] = {
    NotFound: 404,
    TurnRunning: 409,
    ReplyStopped: 409,
    KeyReused: 422,
    TooManyStreams: 429,
    ReplyFailed: 502,
}
_TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}
"""Where Python 3.11 still has the older names."""
ERRORS_MAX = 20
"""Of one body: 90,000 unknown fields were answered with 7 MB."""
_PLAIN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")
log = structlog.get_logger(__name__)

Error = dict[str, Any]
"""One field that is wrong: `loc` (where, as a path) and `message` (what is expected there)."""


class Problem(Exception):
    """Something is wrong with the request."""

    status: ClassVar[int] = 400
    headers: ClassVar[Mapping[str, str]] = {}

    def __init__(self, detail: str | None = None, errors: Sequence[Error] = ()) -> None:
        super().__init__(detail or (type(self).__doc__ or "").strip())
        self.errors = list(errors)


class Unauthorized(Problem):
    """Sign in first: this needs a valid access token."""

    status = 401
    headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": "Bearer"}


class Forbidden(Problem):
    """This request comes from another site."""

    status = 403


class EmailTaken(Problem):
    """There is an account with this e-mail address already; sign in, or use another address."""

    status = 409


class Unprocessable(Problem):
    """The request is not valid; `errors` says what is expected."""

    status = 422


def problem(
    status: int, kind: str, detail: str, *, headers: Mapping[str, str] | None = None, errors: Sequence[Error] | None = None
) -> Response:
    """The answer for a problem. `kind` names it for programs: `urn:chatkeep:<kind>`."""
    metrics.PROBLEMS.labels(kind).inc()
    body = problem_body(status, kind, detail)
    if status == 422:
        body["errors"] = list(errors or [])
    return Response(orjson.dumps(body), status_code=status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def problem_body(status: int, kind: str, detail: str) -> dict[str, Any]:
    """The members of a problem; also what a stream's `error` event carries."""
    title = _TITLES.get(status) or HTTPStatus(status).phrase
    return {"type": f"urn:chatkeep:{kind}", "title": title, "status": status, "detail": detail}


def status_of(exc: ChatkeepError) -> int:
    """The status that this error is answered with."""
    if isinstance(exc, UserBacklogFull | TooMany):
        return 429
    if isinstance(exc, TryAgainLater):
        return 503
    return next((status for kind, status in _STATUS.items() if isinstance(exc, kind)), 500)


def describe_problem(exc: ChatkeepError) -> dict[str, Any]:
    """A problem's members for one of our own errors: for the `error` event of a stream, where no handler comes any more."""
    status = status_of(exc)
    return problem_body(status, _kind(exc) if status < 500 or status in (502, 503) else "internal-error", _detail(exc, status))


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: these statuses are answered with a problem."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _TITLES.get(status) or HTTPStatus(status).phrase, "content": content} for status in statuses}


def install(app: FastAPI, body_bytes_max: int) -> None:
    """Makes `app` answer every error as described above, and refuse larger bodies."""
    handlers: dict[type[Exception], Any] = {
        ChatkeepError: _on_chatkeep_error,
        Problem: _on_problem,
        RequestValidationError: _on_invalid,
        HTTPException: _on_http_exception,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=body_bytes_max)
    app.add_middleware(DeclaredLength, bytes_max=body_bytes_max)
    app.add_middleware(Unforeseen)


async def _on_chatkeep_error(request: Request, exc: ChatkeepError) -> Response:
    return answer_to(exc, request.app.state)


def answer_to(exc: ChatkeepError, state: State) -> Response:
    """The answer to one of our own errors, which is counted and, if nobody foresaw it, logged."""
    status = status_of(exc)
    if isinstance(exc, RedisUnavailable):
        metrics.REDIS_ERRORS.inc()
    if isinstance(exc, PostgresUnavailable):
        metrics.POSTGRES_ERRORS.inc()
        state.readiness.doubt_postgres()
    if status == 500:
        log.error("unforeseen error", **describe(exc))
        return problem(500, "internal-error", _detail(exc, status))
    headers = {"Retry-After": str(exc.retry_after_seconds)} if isinstance(exc, TryAgainLater) else None
    return problem(status, _kind(exc), _detail(exc, status), headers=headers)


async def _on_problem(_: Request, exc: Problem) -> Response:
    return problem(exc.status, _kind(exc), str(exc), headers=exc.headers, errors=exc.errors)


async def _on_invalid(_: Request, exc: RequestValidationError) -> Response:
    errors = [_error(error) for error in exc.errors()[:ERRORS_MAX]]
    if exc.errors() and exc.errors()[0]["type"] == "json_invalid":
        return problem(422, "unprocessable", "The body is not valid JSON.", errors=errors)
    return problem(422, "unprocessable", (Unprocessable.__doc__ or "").strip(), errors=errors)


async def _on_http_exception(request: Request, exc: HTTPException) -> Response:
    if exc.status_code == 404:
        return problem(404, "no-such-route", "There is nothing at this address.")
    if exc.status_code == 405:
        allowed = ", ".join(sorted(_methods_at(request)))
        return problem(405, "method-not-allowed", f"This address takes {allowed}.", headers={"Allow": allowed})
    if exc.status_code == 413:
        return too_large(request.app.state.settings.body_bytes_max)
    if exc.status_code == 400 and isinstance(
        exc.__cause__, ValueError | RecursionError
    ):  # what FastAPI makes of a body that it cannot read
        error = {"loc": ["body"], "message": "must be JSON in UTF-8, with reasonable depth and numbers"}
        return problem(422, "unprocessable", "The body is not valid JSON.", errors=[error])
    return problem(exc.status_code, "http-error", HTTPStatus(exc.status_code).phrase, headers=exc.headers)


def too_large(bytes_max: int) -> Response:
    """The answer to a body that is too large.

    Without `Connection: close`: the server would end it with the body unread, and the client would see a reset before the answer.
    """
    return problem(413, "body-too-large", f"The body must have at most {bytes_max} bytes.")


def _methods_at(request: Request) -> set[str]:
    """Every method that some route takes at this path; the framework's own header names only those of the first."""
    path = get_route_path(request.scope)
    routes = [route for route in iter_route_contexts(request.app.routes) if getattr(route, "path_regex", None) is not None]
    return {method for route in routes if route.path_regex.match(path) for method in route.methods or ()}


def _kind(exc: Exception) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", type(exc).__name__).lower()


def _detail(exc: ChatkeepError, status: int) -> str:
    return "Something went wrong on our side." if status == 500 else exc.detail


def _error(error: Mapping[str, Any]) -> Error:
    """One of pydantic's errors without the input. A field's name may be the client's own: only a plain one is repeated."""
    loc = [part if isinstance(part, int) or _PLAIN_NAME.fullmatch(part) else "(unreadable name)" for part in error["loc"]]
    if error["type"] == "json_invalid":
        return {"loc": loc, "message": f"{error['ctx']['error']}"}
    if error["type"] in ("model_attributes_type", "model_type", "dict_type"):
        return {"loc": loc, "message": "must be a JSON object, sent as application/json"}
    return {"loc": loc, "message": str(error["msg"]).removeprefix("Value error, ")}


class Unforeseen:
    """What nobody foresaw becomes a 500, and an event that names the place but quotes nothing.

    Starlette's own would answer too, but raise the exception again, and uvicorn would log its text with whatever it quotes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def note_start(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, note_start)
        except Exception as exc:  # noqa: BLE001 - the last resort
            answer = unforeseen(exc, scope["method"])
            if started:  # only cutting the connection tells the client that the answer is not whole
                raise BrokenAnswer() from None
            await answer(scope, receive, send)


def unforeseen(exc: Exception, method: str) -> Response:
    """The answer to what nobody foresaw; says where it was, and quotes nothing."""
    log.error("unforeseen error", method=method, **describe(exc))
    return problem(500, "internal-error", "Something went wrong on our side.")


class BrokenAnswer(Exception):
    """An answer that had begun could not be finished; the event before this one says why."""


class DeclaredLength:
    """Refuses a body that says it is too large, before any of it is read; Starlette's middleware counts those that do not say.

    (It refuses both, but the first kind in plain text, whatever handlers there are.)
    """

    def __init__(self, app: ASGIApp, bytes_max: int) -> None:
        self.app = app
        self.bytes_max = bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            length = Headers(scope=scope).get("content-length", "")
            if length.isdigit() and (len(length) > 18 or int(length) > self.bytes_max):
                await too_large(self.bytes_max)(scope, receive, send)
                return
        await self.app(scope, receive, send)
