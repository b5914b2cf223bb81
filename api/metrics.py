"""`/metrics`: what this process has counted, and at each scrape what Redis says of the log and of the workers.

Counters of requests belong to one process: behind several, Prometheus should scrape each. What concerns the log and the flush is the same
from all of them. No label ever names a user, a conversation or an address.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from worker.backlog import ShardBacklog

disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the output, and rate() does not need them

CONTENT_TYPE = CONTENT_TYPE_LATEST
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

ACCEPTED = Counter("chatkeep_accepted", "Messages that were acknowledged (a replay is not counted again).", registry=REGISTRY)
PROBLEMS = Counter("chatkeep_problems", "Requests that were not done, by the kind of problem.", ["kind"], registry=REGISTRY)
REDIS_ERRORS = Counter("chatkeep_redis_errors", "Requests that failed because Redis could not be reached.", registry=REGISTRY)
POSTGRES_ERRORS = Counter("chatkeep_postgres_errors", "Requests that failed because Postgres could not be reached.", registry=REGISTRY)
SIGN_INS = Counter("chatkeep_sign_ins", "Attempts to sign in.", ["result"], registry=REGISTRY)
DURATION = Histogram(
    "chatkeep_request_duration_seconds",
    "From a request's arrival to the end of its answer, by route.",
    ["method", "route", "status"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0),
    registry=REGISTRY,
)
STARTED = "chatkeep.started"
"""In a request's scope, when somebody had it before `Durations`: since when."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def render(backlogs: Sequence[ShardBacklog] | None, stats: Mapping[str, int] | None) -> bytes:
    """Everything as Prometheus reads it. None: Redis did not answer, and what only it knows is left out."""
    at_scrape = CollectorRegistry()
    at_scrape.register(_FromRedis(backlogs, stats))
    return bytes(generate_latest(REGISTRY) + generate_latest(at_scrape))


class _FromRedis(Collector):
    def __init__(self, backlogs: Sequence[ShardBacklog] | None, stats: Mapping[str, int] | None) -> None:
        self._backlogs = backlogs
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        up = self._backlogs is not None and self._stats is not None
        yield GaugeMetricFamily("chatkeep_redis_up", "1 if Redis answered this scrape.", value=int(up))
        if self._backlogs is not None:
            yield from _backlog(self._backlogs)
        if self._stats is not None:
            yield from _flushes(self._stats)


def _backlog(backlogs: Sequence[ShardBacklog]) -> Iterator[Metric]:
    entries = GaugeMetricFamily("chatkeep_pending_entries", "Entries of the pending log that Postgres does not have yet.", labels=["shard"])
    size = GaugeMetricFamily("chatkeep_pending_bytes", "What these entries count for in PENDING_BYTES_MAX.", labels=["shard"])
    age = GaugeMetricFamily("chatkeep_pending_oldest_age_seconds", "Age of the oldest of them, 0 if there is none.", labels=["shard"])
    for one in backlogs:
        shard = [f"{one.shard:02d}"]
        entries.add_metric(shard, one.entries)
        size.add_metric(shard, one.bytes)
        age.add_metric(shard, one.oldest_age_seconds)
    yield from (entries, size, age)


def _flushes(stats: Mapping[str, int]) -> Iterator[Metric]:
    from worker.flush import BATCH_BUCKETS, SECONDS_BUCKETS  # here, because it starts Celery's application

    yield CounterMetricFamily("chatkeep_committed_messages", "Messages that workers wrote.", value=stats.get("flushed_messages", 0))
    yield CounterMetricFamily("chatkeep_dead_letters", "Entries that Postgres refused.", value=stats.get("dead_letters", 0))
    yield HistogramMetricFamily(
        "chatkeep_flush_batch_entries",
        "Entries that one flush transaction committed.",
        buckets=_cumulated(stats, "batch_le:", BATCH_BUCKETS),
        sum_value=stats.get("flushed_entries", 0),
    )
    yield HistogramMetricFamily(
        "chatkeep_flush_duration_seconds",
        "How long one took.",
        buckets=_cumulated(stats, "seconds_le:", SECONDS_BUCKETS),
        sum_value=stats.get("flush_microseconds", 0) / 1e6,
    )


def _cumulated(stats: Mapping[str, int], prefix: str, limits: Sequence[float]) -> list[tuple[str, float]]:
    total, buckets = 0, []
    for limit in (*map(str, limits), "+Inf"):
        total += stats.get(prefix + limit, 0)
        buckets.append((limit, float(total)))
    return buckets


class Durations:
    """Measures every request. The route's pattern is the label, so that ids do not make a series each."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0  # stays so if the client left before there was an answer

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started = scope.get(STARTED) or time.perf_counter()
        try:
            await self.app(scope, receive, note_status)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            observe(method, getattr(scope.get("route"), "path", "none"), status, time.perf_counter() - started)


def observe(method: str, route: str, status: int, seconds: float) -> None:
    """A request was answered."""
    _duration(method, route, status).observe(seconds)


@cache
def _duration(method: str, route: str, status: int) -> Histogram:
    """The series: looking it up takes longer than to add to it."""
    return DURATION.labels(method, route, str(status))
