"""Is it alive (`/livez`, `/healthz`), can it acknowledge (`/readyz`), what has it counted (`/metrics`).

Readiness is about writes, so it is decided by Redis; without Postgres it is only degraded. Nothing here keeps an idle Postgres awake: it is
asked with the first packet of a handshake, which its postmaster, a pooler or Neon's proxy answers without waking a database. A frozen or
absent server does not answer it. A query is sent only to find out whether trouble is over: at the start, after a request could not be
served, and while queries fail.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Literal, cast

import structlog
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy.engine import URL

from api import metrics
from api.schemas import CheckOut, Liveness, ReadinessOut
from worker import backlog, keys
from worker.accounts import ask_postgres
from worker.backlog import ShardBacklog
from worker.database import sqlalchemy_url
from worker.errors import PostgresUnavailable, TryAgainLater
from worker.redis import KEEPS_WRITES, Check, DurabilityMonitor
from worker.settings import Settings
from worker.threads import DatabaseThreads

router = APIRouter(tags=["operations"])

FRESH_SECONDS = 1.0
"""However many ask: the stores are looked at once in this time."""
POSTGRES_SECONDS = 0.9
"""To knock, and as much again to ask."""
QUERY_PAUSE_SECONDS = 5.0
_SSL_REQUEST = (8).to_bytes(4, "big") + (80877103).to_bytes(4, "big")
"""Postgres's protocol: "would you speak TLS?". Answered with one byte, before anybody has said which database or user is meant."""

log = structlog.get_logger(__name__)


@router.head("/livez", include_in_schema=False)
@router.head("/healthz", include_in_schema=False)
@router.get("/livez", response_model=Liveness)
@router.get("/healthz", response_model=Liveness)
async def alive() -> Response:
    """The process lives. Nothing else is asked."""
    return JSONResponse({"status": "ok"})


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", response_model=ReadinessOut, responses={503: {"model": ReadinessOut, "description": "Not ready"}})
async def ready(request: Request) -> Response:
    """200 while writes can be acknowledged (`degraded`: without Postgres), else 503 with the checks that fail."""
    readiness: Readiness = request.app.state.readiness
    found = await readiness.look()
    unavailable = found.status == "unavailable"
    return JSONResponse(
        found.model_dump(exclude_none=True), status_code=503 if unavailable else 200, headers={"Retry-After": "2"} if unavailable else None
    )


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def prometheus(request: Request) -> Response:
    """Metrics in Prometheus's text format."""
    backlogs, stats = await asyncio.to_thread(_ask_redis, request.app.state.redis_sync, request.app.state.settings.shards)
    return Response(metrics.render(backlogs, stats), media_type=metrics.CONTENT_TYPE)


class Readiness:
    """Looks at both stores, not more often than `FRESH_SECONDS`."""

    def __init__(
        self, settings: Settings, monitor: DurabilityMonitor, threads: DatabaseThreads, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._monitor = monitor
        self._postgres = _PostgresCheck(sqlalchemy_url(settings.database_url.get_secret_value()), threads, clock)
        self._clock = clock
        self._found: ReadinessOut | None = None
        self._looked_at = float("-inf")
        self._looking = asyncio.Lock()

    def doubt_postgres(self) -> None:
        """A request has failed for want of Postgres: the next look asks it a query."""
        self._postgres.doubt()

    async def look(self) -> ReadinessOut:
        """The state of things, not older than `FRESH_SECONDS`; takes less than 2 s."""
        async with self._looking:
            if self._found is None or self._clock() - self._looked_at > FRESH_SECONDS:
                redis, postgres = await asyncio.gather(self._monitor.refresh(FRESH_SECONDS), self._postgres.look())
                self._found, self._looked_at = self._judge((*redis, postgres)), self._clock()
            return self._found

    def _judge(self, checks: tuple[Check, ...]) -> ReadinessOut:
        failed = {check.name for check in checks if not check.ok}
        unavailable = failed - {"postgres", *(KEEPS_WRITES if self._monitor.unsafe else ())}
        status: Literal["ok", "degraded", "unavailable"] = "unavailable" if unavailable else "degraded" if failed else "ok"
        return ReadinessOut(status=status, checks={check.name: CheckOut(ok=check.ok, detail=check.detail) for check in checks})


class _PostgresCheck:
    """Whether Postgres would answer."""

    def __init__(self, url: URL, threads: DatabaseThreads, clock: Callable[[], float]) -> None:
        self._address = url
        self._threads = threads
        self._clock = clock
        self._asked_at = float("-inf")
        self._doubted = True

    def doubt(self) -> None:
        """The next look sends a query."""
        self._doubted, self._asked_at = True, float("-inf")

    async def look(self) -> Check:
        """Knocks; where there is doubt, asks, but not more often than `QUERY_PAUSE_SECONDS` while that fails."""
        try:
            async with asyncio.timeout(POSTGRES_SECONDS):
                await _knock(self._address)
        except (OSError, TimeoutError) as exc:
            self.doubt()
            return Check("postgres", False, f"no answer ({type(exc).__name__}); accepted messages wait in Redis")
        if self._doubted and self._clock() - self._asked_at >= QUERY_PAUSE_SECONDS:
            self._asked_at = self._clock()
            self._doubted = not await self._answers()
        return (
            Check("postgres", False, "it does not answer queries; accepted messages wait in Redis")
            if self._doubted
            else Check("postgres", True)
        )

    async def _answers(self) -> bool:
        try:
            async with asyncio.timeout(POSTGRES_SECONDS):
                await self._threads.run(partial(ask_postgres, POSTGRES_SECONDS))
        except (TimeoutError, PostgresUnavailable) as exc:
            log.warning("postgres does not answer", error=type(exc).__name__)
            return False
        return True


async def _knock(url: URL) -> None:
    """Raises `OSError` or `TimeoutError` unless something at this address speaks Postgres's protocol."""
    host = _first(url.host or url.query.get("host") or "localhost")
    port = int(_first(url.port or url.query.get("port") or 5432))
    if host.startswith("/"):
        reader, writer = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
    else:
        reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(_SSL_REQUEST)
        if await reader.read(1) not in (b"S", b"N"):
            raise ConnectionError("not a Postgres server, or one that is starting or stopping")
    finally:
        writer.close()


def _first(value: object) -> str:
    """Of several hosts (libpq takes a list), the first."""
    one = value[0] if isinstance(value, tuple) else value
    return str(one).split(",")[0]


def _ask_redis(client: Redis, shards: int) -> tuple[list[ShardBacklog] | None, dict[str, int] | None]:
    try:
        counted = cast("dict[bytes, bytes]", client.hgetall(keys.STATS))
        return backlog.look(client, shards), {name.decode(): int(value) for name, value in counted.items()}
    except (RedisError, TryAgainLater) as exc:
        log.warning("metrics without redis", error=type(exc).__name__)
        return None, None
