"""The API process: `uvicorn api.app:app`. What it is made of, what it opens and closes, and in which order.

`app` is made when it is first asked for, so that importing this module needs no settings; a setting that is missing or wrong ends the
process with one line. What the routes share lies in `app.state`:

    settings  tokens  refresh_tokens  ended (sign-ins)  outside  attempts  passwords  readiness  redis_sync (for /metrics)
    log       the pending log (`worker/pending.py`)
    turns     running chat replies (`api/turns.py`)
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.routing import iter_route_contexts
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import State
from starlette.types import Receive, Scope, Send

from api import auth, chat, conversations, errors, events, fast, health, metrics
from api.attempts import Attempts
from api.health import Readiness
from api.middleware import OptionalSlash, SafetyHeaders
from api.outside import OutsideUsers, outside_tokens
from api.passwords import Passwords
from api.replies import responder
from api.schemas import MESSAGE_CHARS_MAX, ProblemOut
from api.streams import OpenStreams
from api.tokens import Tokens
from api.turns import Turns
from worker import database, log_thread, logs
from worker.ended import EndedSignIns
from worker.errors import ChatkeepError, ConfigurationError
from worker.events import EventHub
from worker.pending import PendingLog
from worker.redis import DurabilityMonitor, connect, connect_sync
from worker.replies import ReplyStreams
from worker.settings import Settings, get_settings
from worker.sign_ins import RefreshTokens

STATIC = Path(__file__).parent / "static"

log = structlog.get_logger(__name__)


class Attributes(State):
    """As plain attributes what Starlette keeps behind `__getattr__`, which Python asks only after it has looked in vain, and has put that
    into words: 0.4 µs, seven times in an append."""

    def __init__(self) -> None:
        object.__setattr__(self, "_state", self.__dict__)


class Chatkeep(FastAPI):
    """FastAPI, which is asked only for what `api/fast.py` leaves, with the shape of a problem in its OpenAPI document."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left: Receive | None = receive
        if scope["type"] == "http":
            MESSAGE_CHARS_MAX.set(self.state.settings.message_chars_max)
            left = await fast.answer(self.state, scope, receive, send)
        if left is not None:
            await super().__call__(scope, left, send)

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            problem = ProblemOut.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas = document["components"]["schemas"]
            schemas |= {**problem.pop("$defs"), "Problem": problem}
            for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own shape, which is never answered
                schemas.pop(name, None)
            for operation in (one for path in document["paths"].values() for one in path.values()):
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    operation["responses"] |= {"422": errors.problems(422)[422]}
        return super().openapi()


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application. With `settings`, it uses these rather than the process's."""
    chosen = settings or get_settings()
    app = Chatkeep(
        title="Chatkeep",
        description="Keeps chat history: a message is acknowledged once it is fsynced, and read back at every instant after.",
        version="0.1.0",
        lifespan=_lifespan,
        redirect_slashes=False,
        redoc_url=None,
        openapi_tags=[{"name": name} for name in ("accounts", "conversations", "chat", "operations")],
    )
    app.state = Attributes()
    app.state.settings = chosen
    app.state.tokens = Tokens(chosen.jwt_secret.get_secret_value(), chosen.access_token_seconds)
    app.state.refresh_tokens = RefreshTokens(chosen.jwt_secret.get_secret_value(), chosen.refresh_token_seconds)
    app.state.outside = None
    app.state.responder = responder(chosen)
    for router in (auth.router, conversations.router, chat.router, events.router, health.router):
        app.include_router(router)
    app.add_api_route("/", _page, include_in_schema=False)
    app.add_api_route("/c/{conversation}", _page, include_in_schema=False)
    app.mount("/static", StaticFiles(directory=STATIC))
    errors.install(app, chosen.body_bytes_max)  # the innermost first
    app.add_middleware(SafetyHeaders)
    app.add_middleware(metrics.Durations)
    app.add_middleware(OptionalSlash, paths=[route.path or "" for route in iter_route_contexts(app.routes)])
    return app


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(name)
    try:
        settings = get_settings()
        logs.configure(settings.log_level, process="api", beside=True)
        _check_installation()
        made = globals()["app"] = create_app()
    except ConfigurationError as exc:
        sys.exit(f"chatkeep: {exc}")
    # The 150,000 objects of the libraries stay as long as the process. To look through them all again, as every full collection does,
    # stops everybody for 175 ms.
    gc.collect()
    gc.freeze()
    return made


def _check_installation() -> None:
    """Refuses to start with another number of shards or a wrong address; stores that are away are no reason not to start."""
    from worker.tasks import check_installation  # here, because it starts Celery's application, which needs the settings

    try:
        check_installation()
    except ConfigurationError:
        raise
    except ChatkeepError as exc:
        log.warning("installation not checked", error=type(exc).__name__)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    from worker.app import app as celery  # here for the same reason
    from worker.wakeups import Wakeups

    settings: Settings = app.state.settings
    asyncio.get_running_loop().set_exception_handler(_on_lost_exception)
    async with AsyncExitStack() as stack:
        stack.callback(log_thread.be_patient)
        stack.callback(database.dispose)
        app.state.redis_sync = connect_sync(settings, name="chatkeep-api-metrics")
        stack.callback(app.state.redis_sync.close)
        monitor = DurabilityMonitor(settings)
        client = connect(settings, monitor=monitor)
        stack.push_async_callback(client.aclose)
        stack.push_async_callback(monitor.close)
        await monitor.start(client)

        wakeups = Wakeups(celery, settings.flush_interval_ms / 1000)
        stack.push_async_callback(asyncio.to_thread, wakeups.close)
        app.state.log = PendingLog(client, settings, wakeups.ask, monitor.check)
        stack.push_async_callback(app.state.log.close)
        await app.state.log.start()

        streams = ReplyStreams(client, settings)
        stack.push_async_callback(streams.close)
        stack.push_async_callback(app.state.responder.close)
        app.state.turns = Turns(app.state.log, streams, app.state.responder, settings)
        stack.push_async_callback(app.state.turns.close)
        await app.state.turns.start()
        app.state.events = EventHub(client, settings)
        stack.push_async_callback(app.state.events.close)
        await app.state.events.start()
        app.state.streams = OpenStreams(settings.streams_per_user_max, lambda sign_in: bool(app.state.ended.knows(sign_in)))
        app.state.ended = EndedSignIns(client, settings, app.state.streams.end)
        stack.push_async_callback(app.state.ended.close)
        await app.state.ended.start()

        if (provider := outside_tokens(settings)) is not None:
            app.state.outside = OutsideUsers(provider, settings, client, app.state.log.threads)
            stack.push_async_callback(provider.close)
            await provider.start()

        app.state.readiness = Readiness(settings, monitor, app.state.log.threads)
        app.state.attempts = Attempts(client, settings)
        app.state.passwords = Passwords()
        stack.callback(app.state.passwords.close)
        await app.state.passwords.start()
        yield


def _on_lost_exception(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An exception that nobody waited for; asyncio's own handler would print its text, which may quote data."""
    exc = context.get("exception")
    log.error("exception nobody waited for", **(logs.describe(exc) if exc else {"detail": context.get("message")}))


async def _page() -> FileResponse:
    return FileResponse(STATIC / "index.html")
