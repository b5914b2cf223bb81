"""What is written for people about the settings is what the code does."""

from __future__ import annotations

import re

import pytest

from tests import schema
from worker.settings import Settings

NAMES = [name.upper() for name in Settings.model_fields]
FROM_ANOTHER = {"DATABASE_URL_UNPOOLED": "DATABASE_URL", "CELERY_BROKER_URL": "REDIS_URL"}
PROMISED = {
    **{"CACHE_TTL_SECONDS": "900", "FLUSH_INTERVAL_MS": "100", "FLUSH_BATCH_MAX": "5000", "PENDING_BYTES_MAX": str(1 << 30)},
    **{"UNSAFE_DURABILITY": "0", "MESSAGE_CHARS_MAX": "100000", "SHARDS": "16"},
}


def default_of(name: str) -> str:
    """A default as it is written for people: a number, a word, or the absence of one."""
    field = Settings.model_fields[name.lower()]
    if field.is_required():
        return "required"
    if field.default is None:
        return FROM_ANOTHER.get(name, "unset")
    if isinstance(field.default, bool):
        return str(int(field.default))
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


def test_readme_has_a_line_for_every_setting_and_its_default() -> None:
    readme = (schema.ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("\n## Settings\n", 1)[1].split("\n## ", 1)[0]
    told = re.findall(r"^\| `([A-Z_]+)` \| (.+) \| `?([^|`]+?)`? \|$", table, re.MULTILINE)
    assert {name: default for name, _, default in told} == {name: default_of(name) for name in NAMES}
    assert len(told) == len(NAMES) == table.count("\n| `")
    assert all(len(meaning) > 10 or name == "LLM_API_KEY" for name, meaning, _ in told)


def test_example_file_has_a_line_for_every_setting_and_its_default() -> None:
    """Each is commented out, so that a copy changes nothing; what has no default has no value, least of all a secret."""
    lines = (schema.ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    told = dict(line.removeprefix("#").split("=", 1) for line in lines if re.match(r"#?[A-Z_]+=", line))
    expected = {name: default_of(name) for name in NAMES}
    assert {name: told.get(name) for name in NAMES} == {
        name: "" if default in ("required", "unset", "DATABASE_URL", "REDIS_URL") else default for name, default in expected.items()
    }
    assert all(line.startswith("#") or not line.strip() for line in lines)


@pytest.mark.parametrize("name", PROMISED)
def test_defaults_are_those_of_the_contract(name: str) -> None:
    assert default_of(name) == PROMISED[name]
