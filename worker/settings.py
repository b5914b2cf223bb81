"""The settings, read once from the environment or `.env`. Each has a line in the README; a test compares the two."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Annotated

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from worker.errors import ConfigurationError

SHARD_SLOTS = 64
"""Ids are `tick * SHARD_SLOTS + shard`, so there can never be more shards than this."""

_MAKE_ONE = "make one with: python -c 'import secrets; print(secrets.token_urlsafe(48))'"
_WELL_KNOWN_SECRETS = ("secret", "changeme", "change-me", "change_me", "password", "your-secret", "example", "default")


class Settings(BaseSettings):
    """What an operator may choose. A unit ends each name that has one."""

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore", hide_input_in_errors=True)

    database_url: SecretStr
    database_url_unpooled: SecretStr | None = None
    redis_url: SecretStr
    celery_broker_url: SecretStr | None = None

    jwt_secret: SecretStr
    access_token_seconds: Annotated[int, Field(ge=60, le=30 * 86400)] = 900
    refresh_token_seconds: Annotated[int, Field(ge=60, le=366 * 86400)] = 30 * 86400
    """Without being renewed for this long, a sign-in ends; each renewal begins it anew."""
    sign_ins_per_address_max: Annotated[int, Field(ge=0)] = 20
    sign_ins_per_network_max: Annotated[int, Field(ge=0)] = 600
    """Tries in five minutes (`api/attempts.py`). A network may be a whole office; one that is guessing needs thousands."""
    sign_ups_per_network_max: Annotated[int, Field(ge=0)] = 1000

    cache_ttl_seconds: Annotated[int, Field(ge=1, le=30 * 86400)] = 900
    cache_messages_max: Annotated[int, Field(ge=1, le=100_000)] = 200
    """Committed messages of one conversation that stay in Redis; pending ones always do."""

    flush_interval_ms: Annotated[int, Field(ge=1, le=60_000)] = 100
    flush_batch_max: Annotated[int, Field(ge=1, le=100_000)] = 5000
    pending_bytes_max: Annotated[int, Field(ge=1)] = 1 << 30
    pending_bytes_per_user_max: Annotated[int, Field(ge=1)] = 1 << 27
    """One user's fair share of the backlog (128 MiB of 1 GiB): beyond it only this user is refused."""
    shards: Annotated[int, Field(ge=1, le=SHARD_SLOTS)] = 16

    oidc_issuer: str | None = None
    oidc_audience: str | None = None

    messages_per_minute_max: Annotated[int, Field(ge=0)] = 300_000
    conversations_per_day_max: Annotated[int, Field(ge=0)] = 100_000
    """Of one user; 0: no limit. No person comes near: they end a client that has run wild, and a program may be somebody's import."""

    message_chars_max: Annotated[int, Field(ge=1, le=1_000_000)] = 100_000
    body_bytes_max: Annotated[int, Field(ge=1024)] = 1 << 20

    redis_timeout_seconds: Annotated[float, Field(gt=0, le=10)] = 1.5
    """Below the 2 s in which a write that cannot be kept has to be refused."""
    postgres_timeout_seconds: Annotated[float, Field(gt=0, le=60)] = 1.8
    """Bounds a read of the API, connecting included: also below those 2 s. A sleeping Neon may need a second try."""
    flush_timeout_seconds: Annotated[float, Field(gt=0, le=600)] = 20.0
    """Bounds one flush transaction, connecting included."""
    postgres_pool_size: Annotated[int, Field(ge=1, le=100)] = 8

    llm_base_url: str | None = None
    llm_api_key: SecretStr | None = None
    llm_model: str | None = None
    llm_timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = 120.0

    reply_idle_seconds: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """A model that is silent for longer has failed."""
    reply_chars_max: Annotated[int, Field(ge=1, le=1_000_000)] = 100_000
    streams_per_user_max: Annotated[int, Field(ge=1, le=10_000)] = 20
    """Open event streams of one user, in each API process."""
    shutdown_grace_seconds: Annotated[float, Field(ge=0, le=600)] = 8.0
    """Running replies may take this long to end at a shutdown; then they are kept as incomplete."""

    unsafe_durability: bool = False
    log_level: str = "INFO"

    @field_validator("jwt_secret")
    @classmethod
    def _strong(cls, value: SecretStr) -> SecretStr:
        secret = value.get_secret_value()
        if len(secret.encode()) < 32:
            raise ValueError(f"must be at least 32 bytes; {_MAKE_ONE}")
        if len(set(secret)) < 8 or any(word in secret.lower() for word in _WELL_KNOWN_SECRETS):
            raise ValueError(f"is a well-known or trivial value; {_MAKE_ONE}")
        return value

    @field_validator("oidc_issuer")
    @classmethod
    def _encrypted(cls, value: str | None) -> str | None:
        if value is not None and not re.match(r"https://[^/\s]+|http://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?(/|$)", value):
            raise ValueError("must be an https:// address (http:// on this machine only)")
        return value

    @model_validator(mode="after")
    def _together(self) -> Settings:
        if self.llm_base_url and not self.llm_model:
            raise ValueError("LLM_BASE_URL needs LLM_MODEL")
        if (self.oidc_issuer is None) != (self.oidc_audience is None):
            raise ValueError("OIDC_ISSUER and OIDC_AUDIENCE belong together")
        if self.refresh_token_seconds < self.access_token_seconds:
            raise ValueError("REFRESH_TOKEN_SECONDS must not be less than ACCESS_TOKEN_SECONDS")
        return self

    @property
    def broker_url(self) -> str:
        """Celery's broker, in the spelling that kombu knows (`unix://` is `redis+socket://` there)."""
        url = (self.celery_broker_url or self.redis_url).get_secret_value()
        return url.replace("unix://", "redis+socket://", 1) if url.startswith("unix://") else url


@lru_cache
def get_settings() -> Settings:
    """The settings of this process; raises `ConfigurationError` with one line for each setting that is missing or wrong."""
    try:
        return Settings()
    except ValidationError as exc:
        raise ConfigurationError("; ".join(_line(error["loc"], error["msg"]) for error in exc.errors())) from None


def _line(loc: tuple[int | str, ...], message: str) -> str:
    name = "_".join(str(part) for part in loc).upper()
    return f"{name}: {message} (set it in the environment or .env)" if name else message
