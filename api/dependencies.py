"""What the routes ask for: the caller, the log, a page, a retry key, and a thread for Postgres."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar, cast

from fastapi import Depends, Header, Path, Query, Request

from api.errors import Unprocessable
from api.schemas import IDEMPOTENCY_KEY, PAGE_DEFAULT, PAGE_MAX, Id, Page, PathId
from api.tokens import CurrentUser, User
from worker.pending import PendingLog
from worker.settings import Settings

__all__ = [
    "AppSettings",
    "ConversationId",
    "CurrentUser",
    "HistoryPage",
    "IdempotencyKey",
    "Log",
    "Page",
    "SessionId",
    "User",
    "in_thread",
    "log_of",
    "settings_of",
]

T = TypeVar("T")

ConversationId = Annotated[PathId, Path(description="The conversation's id")]
SessionId = Annotated[PathId, Path(description="The session's id: the conversation's, as a string")]

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=f"^{IDEMPOTENCY_KEY}$",
        description="Up to 200 visible ASCII characters. With the same key, the same body is answered as the first time, and stored once.",
    ),
]


async def history_page(
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = PAGE_DEFAULT,
    before: Annotated[Id | None, Query(description="Only messages older than this one")] = None,
    after: Annotated[Id | None, Query(description="Only messages newer than this one")] = None,
) -> Page:
    """The page of a history that is asked for."""
    if before is not None and after is not None:
        raise Unprocessable(errors=[{"loc": ["query", "after"], "message": "give either before or after, not both"}])
    return Page(limit, before, after)


HistoryPage = Annotated[Page, Depends(history_page)]


def settings_of(request: Request) -> Settings:
    """The settings that this app was made with."""
    return cast(Settings, request.app.state.settings)


def log_of(request: Request) -> PendingLog:
    """The pending log of this process."""
    return cast(PendingLog, request.app.state.log)


async def _settings(request: Request) -> Settings:
    return settings_of(request)


async def _log(request: Request) -> PendingLog:
    return log_of(request)


AppSettings = Annotated[Settings, Depends(_settings)]
Log = Annotated[PendingLog, Depends(_log)]


async def in_thread(request: Request, work: Callable[[], T]) -> T:
    """Runs bounded, synchronous Postgres work off the event loop; raises `PostgresUnavailable` when no thread gets free in time."""
    return await log_of(request).threads.run(work)
