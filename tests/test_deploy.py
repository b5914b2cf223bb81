"""The files for Docker and `.env.example`: what they promise can be read in them, and is. Nothing is started but one small script."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dotenv import dotenv_values

from api.__main__ import RunnerSettings
from worker.broker import make_app
from worker.settings import Settings

ROOT = Path(__file__).parent.parent
COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE_TEXT)["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
SETTINGS = {name.upper() for name in Settings.model_fields}
RUNNING = ("api", "worker", "beat", "flower")
OURS = ("secrets", "migrate", *RUNNING)
STORES = ("postgres", "redis", "broker")
FOR_COMPOSE = {"CHATKEEP_PORT", "CHATKEEP_FLOWER_PORT", "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS"}


class TestCompose:
    def test_services_are_the_ones_that_the_contract_names(self) -> None:
        assert set(SERVICES) == {*OURS, *STORES}
        assert SERVICES["postgres"]["image"] == "postgres:18"
        assert SERVICES["redis"]["image"] == SERVICES["broker"]["image"] == "redis:8"
        assert {SERVICES[name]["image"] for name in OURS} == {"chatkeep"}

    def test_one_service_builds_our_image_and_nobody_pulls_it(self) -> None:
        assert [name for name in SERVICES if "build" in SERVICES[name]] == ["secrets"]
        assert {SERVICES[name]["pull_policy"] for name in OURS} == {"never"}

    def test_only_the_api_and_flower_are_published_and_only_on_loopback(self) -> None:
        published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
        assert set(published) == {"api", "flower"}
        assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
        assert not any(service.get("network_mode") == "host" for service in SERVICES.values())

    @pytest.mark.parametrize("name", [*OURS, *STORES])
    def test_service_has_no_privilege_that_it_does_not_need(self, name: str) -> None:
        service = SERVICES[name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "user", "devices", "pid", "ipc"} & set(service)
        assert ("cap_add" in service) == (name in STORES)

    def test_what_ends_by_itself_is_not_restarted_and_all_else_is(self) -> None:
        once = {name for name, service in SERVICES.items() if service["restart"] == "no"}
        assert once == {"secrets", "migrate"}
        assert {service["restart"] for name, service in SERVICES.items() if name not in once} == {"unless-stopped"}

    def test_order_of_the_start(self) -> None:
        for store in STORES:
            assert SERVICES[store]["depends_on"] == {"secrets": {"condition": "service_completed_successfully"}}
        assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
        for name in RUNNING:
            assert SERVICES[name]["depends_on"] == {
                "redis": {"condition": "service_healthy"},
                "broker": {"condition": "service_healthy"},
                "migrate": {"condition": "service_completed_successfully"},
            }

    @pytest.mark.parametrize("name", [*STORES, *RUNNING])
    def test_service_has_a_health_check_with_a_bound(self, name: str) -> None:
        check = SERVICES[name]["healthcheck"]
        assert check["test"]
        assert {"interval", "timeout", "retries", "start_period"} <= set(check)

    def test_store_that_is_away_does_not_make_the_api_unhealthy(self) -> None:
        check = " ".join(SERVICES["api"]["healthcheck"]["test"])
        assert "/livez" in check
        assert "/readyz" not in check

    def test_python_in_the_file_compiles(self) -> None:
        scripts = [SERVICES["secrets"]["command"][2], *(SERVICES[name]["healthcheck"]["test"][-1] for name in ("api", "beat", "flower"))]
        for script in scripts:
            compile(script, "docker-compose.yml", "exec")

    def test_commands_are_those_of_the_contract(self) -> None:
        commands = {name: " ".join(SERVICES[name]["command"]) for name in OURS}
        assert commands["migrate"] == "alembic upgrade head"
        assert commands["api"].startswith("uvicorn api.app:app ")
        assert re.search(r"celery (--quiet )?-A worker\.app worker\b", commands["worker"])
        assert re.search(r"celery (--quiet )?-A worker\.app beat\b", commands["beat"])
        assert re.search(r"celery (--quiet )?-A worker\.app flower\b.* --read-only\b", commands["flower"])

    def test_redis_keeps_what_it_acknowledges_and_has_its_password_from_a_file(self) -> None:
        assert _redis_options("redis") == {
            "--appendonly": "yes",
            "--appendfsync": "always",
            "--no-appendfsync-on-rewrite": "no",
            "--save": "",
            "--maxmemory-policy": "noeviction",
            "--hide-user-data-from-log": "yes",
            "--slowlog-log-slower-than": "-1",
        }

    def test_broker_keeps_nothing_and_has_a_password_of_its_own(self) -> None:
        assert _redis_options("broker") == {"--appendonly": "no", "--save": "", "--maxmemory-policy": "noeviction"}
        assert SERVICES["broker"]["volumes"] == ["broker-secrets:/run/secrets:ro"]
        assert "/data" in SERVICES["broker"]["tmpfs"]

    def test_postgres_writes_no_statement_and_no_row_into_its_log(self) -> None:
        assert SERVICES["postgres"]["command"] == ["postgres", "-c", "log_min_error_statement=panic", "-c", "log_error_verbosity=terse"]

    def test_data_lies_in_named_volumes(self) -> None:
        named = yaml.safe_load(COMPOSE_TEXT)["volumes"]
        assert "postgres-data:/var/lib/postgresql" in SERVICES["postgres"]["volumes"]
        assert "redis-data:/data" in SERVICES["redis"]["volumes"]
        assert {volume.split(":")[0] for service in SERVICES.values() for volume in service["volumes"]} == set(named)

    def test_process_is_given_the_time_that_it_may_take_to_end(self) -> None:
        settings = Settings(_env_file=None, database_url="postgresql://u:p@h/d", redis_url="redis://h", jwt_secret="0123456789abcdef" * 2)
        conf = make_app(settings).conf
        assert _seconds(SERVICES["worker"]["stop_grace_period"]) > max(conf.task_time_limit, conf.worker_soft_shutdown_timeout)
        streams = re.search(r"--timeout-graceful-shutdown=(\d+)", " ".join(SERVICES["api"]["command"]))
        assert streams
        assert _seconds(SERVICES["api"]["stop_grace_period"]) > int(streams[1]) + settings.shutdown_grace_seconds

    @pytest.mark.skipif(shutil.which("docker") is None, reason="no docker here")
    def test_compose_itself_takes_the_file(self) -> None:
        if subprocess.run(["docker", "compose", "version"], check=False, capture_output=True, timeout=30).returncode != 0:
            pytest.skip("no docker compose here")
        checked = subprocess.run(
            ["docker", "compose", "config", "--quiet"], cwd=ROOT, check=False, capture_output=True, text=True, timeout=30
        )
        assert (checked.returncode, checked.stderr) == (0, "")


class TestSecrets:
    def test_nothing_in_the_file_has_a_default_but_ports(self) -> None:
        names = re.findall(r"(?<!\$)\$\{?(\w+)", COMPOSE_TEXT.replace("$$", ""))
        assert set(names) == {"CHATKEEP_PORT", "CHATKEEP_FLOWER_PORT"}

    def test_settings_are_handed_on_by_name_alone(self) -> None:
        for name in ("migrate", *RUNNING):
            assert not any(SERVICES[name]["environment"].values())

    def test_stores_get_no_secret_by_their_environment_or_command_line(self) -> None:
        assert SERVICES["postgres"]["environment"] == {
            "POSTGRES_USER": "chatkeep",
            "POSTGRES_DB": "chatkeep",
            "POSTGRES_PASSWORD_FILE": "/run/secrets/password",
        }
        for name in ("redis", "broker"):
            assert "environment" not in SERVICES[name]
            assert "requirepass" not in " ".join(SERVICES[name]["command"])

    def test_each_service_sees_only_its_own_and_only_one_may_write(self) -> None:
        seen = {name: {v for v in service["volumes"] if "secrets" in v} for name, service in SERVICES.items()}
        assert seen.pop("secrets") == {
            "app-secrets:/secrets/app",
            "postgres-secrets:/secrets/postgres",
            "redis-secrets:/secrets/redis",
            "broker-secrets:/secrets/broker",
        }
        assert seen.pop("postgres") == {"postgres-secrets:/run/secrets:ro"}
        assert seen.pop("redis") == {"redis-secrets:/run/secrets:ro"}
        assert seen.pop("broker") == {"broker-secrets:/run/secrets:ro"}
        assert set(map(frozenset, seen.values())) == {frozenset({"app-secrets:/secrets/app:ro"})}

    def test_image_has_the_directories_that_secrets_are_drawn_into(self) -> None:
        """A new volume takes over the owner of the directory that it is mounted on; without one it would be root's."""
        [made] = re.findall(r"install -d .*?((?: /secrets\S*)+)", DOCKERFILE)
        assert set(made.split()) == {"/secrets", *(volume.split(":")[1] for volume in SERVICES["secrets"]["volumes"])}

    def test_secrets_are_drawn_once_and_are_others_in_another_installation(self, tmp_path: Path) -> None:
        first = _draw_secrets(tmp_path / "first")
        assert _draw_secrets(tmp_path / "first") == first
        second = _draw_secrets(tmp_path / "second")
        stores = {"postgres/password", "redis/redis.conf", "broker/redis.conf"}
        assert set(first) == set(second) == {*stores, "app/jwt-secret", "app/flower-password", "app/env"}
        assert all(first[name] != second[name] for name in first)
        drawn = [first[name].split()[-1] for name in first if name != "app/env"]
        assert len(set(drawn)) == 5
        assert all(len(secret) >= 48 for secret in drawn)

    def test_only_what_is_missing_is_drawn(self, tmp_path: Path) -> None:
        before = _draw_secrets(tmp_path)
        (tmp_path / "app" / "jwt-secret").unlink()
        (tmp_path / "app" / "jwt-secret.new").write_text("half of a")  # the draft of one that was killed
        after = _draw_secrets(tmp_path)
        assert {name for name in before if before[name] != after[name]} == {"app/jwt-secret", "app/env"}

    def test_drawn_secrets_are_good_settings_and_the_environment_goes_before_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in SETTINGS:
            monkeypatch.delenv(name, raising=False)
        drawn = _draw_secrets(tmp_path)
        monkeypatch.setenv("REDIS_URL", "redis://elsewhere")
        monkeypatch.setenv("JWT_SECRET", "")  # a name in .env with nothing behind it
        settings = Settings(_env_file=tmp_path / "app" / "env")
        password = drawn["postgres/password"].strip()
        assert settings.database_url.get_secret_value() == f"postgresql://chatkeep:{password}@postgres:5432/chatkeep"
        assert settings.redis_url.get_secret_value() == "redis://elsewhere"
        assert settings.broker_url == f"redis://:{drawn['broker/redis.conf'].split()[-1]}@broker:6379/0"
        assert settings.jwt_secret.get_secret_value() == drawn["app/jwt-secret"].strip()


class TestImage:
    def test_it_is_made_of_pythons_image_and_nothing_else_from_outside(self) -> None:
        assert set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) == {"python:3.13-slim"}
        assert not re.search(r"^# *syntax", DOCKERFILE, re.MULTILINE | re.IGNORECASE)
        assert not re.search(r"\b(curl|wget|apt-get|ADD)\b", DOCKERFILE)

    def test_every_package_is_checked_against_its_hash(self) -> None:
        installs = [line for line in re.split(r"&&|\n(?=[A-Z])", DOCKERFILE) if " install " in line and " pip " in line]
        assert installs
        assert all("--require-hashes" in line for line in installs)

    def test_nobody_is_root_in_it(self) -> None:
        last_stage = DOCKERFILE.rsplit("\nFROM ", 1)[1]
        assert re.findall(r"^USER (\S+)", last_stage, re.MULTILINE) == ["10001:10001"]

    def test_build_sees_only_what_it_copies(self) -> None:
        rules = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        assert rules[0] == "*"
        let_in = {rule[1:] for rule in rules if rule.startswith("!")}
        copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
        assert let_in == {source for sources in copied for source in sources.split()}

    @pytest.mark.parametrize("name", ["Dockerfile", ".dockerignore", "docker-compose.yml", ".env.example"])
    def test_no_address_of_a_package_index_is_written_down(self, name: str) -> None:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"index-url|trusted-host|find-links|pypi\.org", text, re.IGNORECASE)
        assert set(re.findall(r"https?://([\w.-]+)", text)) <= {"127.0.0.1"}


class TestSettingsAreListed:
    """Three lists for people, which a new setting has to enter."""

    def test_env_example_has_every_setting_once(self) -> None:
        listed = [name for name, _ in _env_example()]
        runner = {name.upper() for name in RunnerSettings.model_fields}
        assert len(listed) == len(set(listed))
        assert set(listed) == SETTINGS | runner | FOR_COMPOSE

    def test_env_example_says_the_defaults(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in SETTINGS:
            monkeypatch.delenv(name, raising=False)
        needed = {"database_url": "postgresql://u:p@h/d", "redis_url": "redis://h", "jwt_secret": "0123456789abcdef" * 2}
        told = {name.lower(): value for name, value in _env_example() if name in SETTINGS and value}
        assert not told.keys() & needed.keys()
        assert Settings(_env_file=None, **needed, **told) == Settings(_env_file=None, **needed)
        silent = SETTINGS - {name.upper() for name in (*told, *needed)}
        assert all(Settings.model_fields[name.lower()].default is None for name in silent)

    def test_copied_as_it_is_it_sets_nothing(self) -> None:
        assert dotenv_values(ROOT / ".env.example") == {}

    def test_readme_has_every_setting(self) -> None:
        section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Settings\n")[1].split("\n## ")[0]
        assert set(re.findall(r"^\| `([A-Z_]+)` \|", section, re.MULTILINE)) == SETTINGS

    def test_compose_hands_every_setting_on(self) -> None:
        for name in ("migrate", "worker", "beat"):
            assert set(SERVICES[name]["environment"]) == SETTINGS
        assert set(SERVICES["api"]["environment"]) == SETTINGS | {"WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS"}
        assert set(SERVICES["flower"]["environment"]) == SETTINGS | {"FLOWER_BASIC_AUTH"}


def _env_example() -> list[tuple[str, str]]:
    """The names and what stands behind them; each is commented out, which `test_copied_as_it_is_it_sets_nothing` sees to."""
    return re.findall(r"^#([A-Z][A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(encoding="utf-8"), re.MULTILINE)


def _draw_secrets(root: Path) -> dict[str, str]:
    """Runs the script of the service `secrets` on volumes below `root`; answers with every finished file."""
    for volume in ("app", "postgres", "redis", "broker"):
        (root / volume).mkdir(parents=True, exist_ok=True)
    python, option, script = SERVICES["secrets"]["command"]
    assert (python, option) == ("python", "-c")
    assert '"/secrets"' in script
    subprocess.run([sys.executable, option, script.replace('"/secrets"', repr(str(root)))], check=True, timeout=30)
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in files if path.suffix != ".new"}


def _seconds(duration: str) -> int:
    assert duration.endswith("s")
    return int(duration.removesuffix("s"))


def _redis_options(service: str) -> dict[str, str]:
    program, config, *options = SERVICES[service]["command"]
    assert (program, config) == ("redis-server", "/run/secrets/redis.conf")
    return dict(zip(options[::2], options[1::2], strict=True))
