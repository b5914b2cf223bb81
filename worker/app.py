"""The Celery processes: `celery -A worker.app worker|beat|flower`."""

from __future__ import annotations

import gc
import logging
import sys
from typing import Any

from celery.signals import setup_logging, worker_init, worker_process_init, worker_ready

from worker import health, logs
from worker.broker import make_app
from worker.errors import ChatkeepError, ConfigurationError
from worker.redis import connect_sync
from worker.settings import Settings, get_settings


def _settings() -> Settings:
    try:
        return get_settings()
    except ConfigurationError as exc:
        sys.exit(f"chatkeep: {exc}")


GARBAGE_AFTER = 100_000
"""Objects that a child makes before it looks for cycles. A batch of 5,000 is 40,000 objects and no cycle; looking at them again and again
(Python's default is 700) took a quarter of its CPU."""

TURN_SECONDS = 0.0005
"""How long a thread of a child may keep the others from running. While one decodes, another has statements to send to Postgres, which has
nothing to do meanwhile: with Python's default (5 ms) a backlog took a seventh longer."""

app = make_app(_settings())
app.set_current()


@setup_logging.connect
def _logs(**_: Any) -> None:
    logs.configure(get_settings().log_level)
    for noisy in ("celery.app.trace", "celery.worker.strategy", "celery.beat"):  # a line for each task; ours is one for each batch
        logging.getLogger(noisy).setLevel(logging.WARNING)


@worker_init.connect
def _check(**_: Any) -> None:
    """Refuses to start with another number of shards or a wrong address; stores that are away are no reason not to start."""
    from worker.tasks import check_installation

    try:
        check_installation()
    except ConfigurationError as exc:
        sys.exit(f"chatkeep: {exc}")
    except ChatkeepError as exc:
        print(f"chatkeep: {exc.detail}", file=sys.stderr)  # noqa: T201 - logs may not be set up yet


@worker_ready.connect
def _watch(**_: Any) -> None:
    """Ends this process if it stops working while there is work."""
    settings = get_settings()
    health.watch(connect_sync(settings, name="chatkeep-watch"), app, settings)


@worker_process_init.connect
def _forked(**_: Any) -> None:
    """A child opens its own connections: those of its parent would be shared by all children."""
    from worker.tasks import forget_clients

    forget_clients()
    gc.freeze()
    gc.set_threshold(GARBAGE_AFTER)
    sys.setswitchinterval(TURN_SECONDS)
