"""How the process starts, and how it does not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import redis
from starlette.testclient import TestClient

from api.app import create_app
from worker.errors import ConfigurationError
from worker.settings import Settings, get_settings

ROOT = Path(__file__).resolve().parent.parent.parent
GOOD = {
    "DATABASE_URL": "postgresql://a:b@127.0.0.1:1/c",
    "REDIS_URL": "redis://127.0.0.1:1/0",
    "JWT_SECRET": "0123456789abcdefghijklmnopqrstuv",
}


def start(tmp_path: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """What `uvicorn api.app:app` says, in an environment that has nothing else (and no `.env`)."""
    return subprocess.run(
        [sys.executable, "-m", "uvicorn", "--app-dir", str(ROOT), "api.app:app", "--port", "0"],
        check=False,
        cwd=tmp_path,
        env={"PATH": os.defpath, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


class TestStart:
    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"DATABASE_URL": ""}, "DATABASE_URL"),
            ({"JWT_SECRET": "changeme-changeme-changeme-changeme"}, "JWT_SECRET"),
            ({"REDIS_URL": "http://127.0.0.1/"}, "REDIS_URL"),
            ({"DATABASE_URL": "mysql://a:changeme@127.0.0.1/c"}, "DATABASE_URL"),
            ({"LLM_MODEL": "m"}, "LLM_BASE_URL"),
        ],
    )
    def test_setting_that_is_missing_or_wrong_is_one_line(self, tmp_path: Path, changes: dict[str, str], named: str) -> None:
        ended = start(tmp_path, GOOD | changes)
        assert ended.returncode != 0
        lines = [line for line in ended.stderr.splitlines() if line.startswith("chatkeep: ")]
        assert len(lines) == 1
        assert named in lines[0]
        assert "Traceback" not in ended.stderr + ended.stdout
        assert "changeme" not in ended.stderr

    def test_importing_needs_no_setting(self, tmp_path: Path) -> None:
        command = "import api.app, api.conversations, api.chat, api.auth, api.health, worker.pending, worker.redis"
        subprocess.run([sys.executable, "-c", command], cwd=ROOT, env={"PATH": os.defpath}, check=True, timeout=60)

    def test_libraries_are_left_out_of_garbage_collections(self) -> None:
        command = "import gc; from api.app import app; print(len(gc.get_objects()), gc.get_freeze_count())"
        environment = {"PATH": os.defpath, **GOOD}
        done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, env=environment, check=True, capture_output=True, timeout=60)
        looked_at, left_out = map(int, done.stdout.split()[-2:])
        assert looked_at < left_out / 20

    def test_model_without_an_address_is_refused_at_once(self, settings: Settings) -> None:
        with pytest.raises(ConfigurationError):
            create_app(settings.model_copy(update={"llm_model": "m"}))


class TestStop:
    def test_everything_that_was_opened_is_closed(self, settings: Settings, redis_url: str) -> None:
        with redis.Redis.from_url(redis_url) as admin:
            before = len(admin.client_list())
            with TestClient(create_app(get_settings())) as client:
                client.get("/readyz")
                client.get("/metrics")
                assert any(one["name"].startswith("chatkeep") for one in admin.client_list())
            assert not any(one["name"].startswith("chatkeep") for one in admin.client_list())
            assert len(admin.client_list()) <= before + 1  # Celery keeps one for its next task
        assert not any(thread.name.startswith(("postgres_", "passwords", "wakeups")) for thread in threading.enumerate())
