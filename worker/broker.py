"""How Celery is configured, for whoever talks to the broker: the worker, beat, Flower, and the API's wake-ups.

Celery carries hints ("shard 7 has work"), never data: everything in the broker may be lost, doubled, late or out of order
(it has been, see the proofs in celery #4354, #7651, #8030) and no message suffers.
"""

from __future__ import annotations

import ssl
from typing import Any

from celery import Celery

from worker.flush import FLUSH_LOOP_SECONDS
from worker.settings import Settings

SWEEP_SECONDS = 2.0


def make_app(settings: Settings) -> Celery:
    """A Celery application on these settings; it connects when it is used."""
    app = Celery("chatkeep", include=["worker.tasks"], set_as_current=False)
    app.conf.update(_configuration(settings))
    return app


def _configuration(settings: Settings) -> dict[str, Any]:
    time_limit = settings.flush_timeout_seconds + FLUSH_LOOP_SECONDS + 10
    return {
        "broker_url": settings.broker_url,
        "broker_use_ssl": {"ssl_cert_reqs": ssl.CERT_REQUIRED} if settings.broker_url.startswith("rediss://") else None,
        # Nobody reads results, and a result backend would fill the same Redis.
        "task_ignore_result": True,
        # Acknowledged to the broker after the work, and given back when a child is killed: a flush may run twice.
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "worker_prefetch_multiplier": 1,
        # Longer than a flush can take by its own deadlines: this only ends a child that is stuck outside of them.
        "task_time_limit": time_limit,
        "task_serializer": "json",
        "accept_content": ["json"],
        # A worker keeps trying for ever; the default gives up after 47 minutes.
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "worker_cancel_long_running_tasks_on_connection_loss": True,
        "worker_soft_shutdown_timeout": 10,
        "broker_transport_options": {
            # A task of a killed worker comes back after this; must be longer than any task runs.
            "visibility_timeout": max(120, int(time_limit * 2)),
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
            # Half-open connections: without a socket time-out a publish waits for ever and the health checks never run.
            "socket_timeout": 10,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
        # In memory: a killed beat leaves no broken schedule file. Any number of beats is harmless, a sweep is idempotent.
        "beat_scheduler": "celery.beat:Scheduler",
        # No `expires`: it compares two machines' clocks, and a worker an hour ahead would drop every sweep.
        "beat_schedule": {"sweep": {"task": "sweep", "schedule": SWEEP_SECONDS}},
        # For Flower. Arguments hold a shard and nothing else.
        "worker_send_task_events": True,
        "worker_hijack_root_logger": False,
        "worker_proc_alive_timeout": 30,
    }
