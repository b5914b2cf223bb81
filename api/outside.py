"""Tokens of an outside identity provider (OpenID Connect): `OIDC_ISSUER`, for `OIDC_AUDIENCE`.

A token is believed for its signature by one of the provider's keys, its issuer, its audience and its expiry. What it may be signed with
says the key, not the token; and only algorithms with a public key are known here, so that nobody signs with what the provider publishes.

The keys are those that the provider's discovery document leads to. They are fetched by a task of their own, at the start and then when a
token is there and they are `KEYS_SECONDS` old, or when its key is not among them, but never twice within `PAUSE_SECONDS`. Who comes
meanwhile goes on with the keys of before; without any, it waits a moment and is told to come again (503). A provider that is away for a
day is no reason to refuse anybody whose key is known.

Whoever the token names is a user from the first time on, known by issuer and subject alone: an e-mail address in it says nothing here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import httpx2
import jwt
import orjson
import structlog
from jwt import PyJWK
from redis.asyncio import Redis as AsyncRedis

from api.errors import Unauthorized
from api.tokens import LEEWAY_SECONDS, VERIFIED_MAX, User
from worker import keys
from worker.accounts import outside_account
from worker.errors import ConfigurationError, ProviderUnavailable
from worker.models import SUBJECT_CHARS_MAX
from worker.redis import answered
from worker.settings import Settings
from worker.text import is_unicode
from worker.threads import DatabaseThreads

log = structlog.get_logger(__name__)

KEYS_SECONDS = 600.0
KEYS_SECONDS_MAX = 86_400.0
"""Keys that the provider may have withdrawn long ago are not believed for ever."""
PAUSE_SECONDS = 30.0
PAUSE_SECONDS_WITHOUT_KEYS = 2.0
WAIT_SECONDS = 1.5
"""What a request waits for keys; below the 2 s within which everything is answered."""
FETCH_SECONDS = 10.0
ANSWER_BYTES_MAX = 256 * 1024
KNOWN_SECONDS = 86_400
"""How long Redis remembers which user a subject is, so that a write needs no Postgres."""
_RSA = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_CURVES = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512", "Ed25519": "EdDSA"}

Jwk = dict[str, Any]


class OutsideTokens:
    """Verifies the tokens of one provider; `start` before use, `close` after."""

    def __init__(self, issuer: str, audience: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.issuer = issuer
        self._audience = audience
        self._clock = clock
        self._keys: tuple[Jwk, ...] = ()
        self._fetched_at = self._asked_at = float("-inf")
        self._fetching: asyncio.Task[None] | None = None
        self._http = httpx2.AsyncClient(timeout=FETCH_SECONDS, follow_redirects=False)

    async def start(self) -> None:
        """Begins to fetch the keys; a provider that is away is no reason not to start."""
        self._fetch_soon()

    async def close(self) -> None:
        """Stops fetching."""
        if self._fetching:
            self._fetching.cancel()
            await asyncio.gather(self._fetching, return_exceptions=True)
        await self._http.aclose()

    async def verify(self, token: str) -> tuple[str, float] | None:
        """The subject of a good token, and when it expires; None for any other. Raises `ProviderUnavailable`."""
        header = self._header(token)
        if header is None:
            return None
        key = await self._key(header)
        if key is None:
            return None
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=[key.algorithm_name],
                audience=self._audience,
                issuer=self.issuer,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "sub", "aud", "iss"], "enforce_minimum_key_length": True},
            )
        except (jwt.PyJWTError, ValueError):  # ValueError: of cryptography, for a key that is none
            return None
        subject: str = claims["sub"]
        good = 0 < len(subject) <= SUBJECT_CHARS_MAX and "\x00" not in subject and is_unicode(subject)
        return (subject, float(claims["exp"])) if good else None

    def _header(self, token: str) -> Mapping[str, Any] | None:
        """The header of a token that says to be of this provider; nothing in it is believed yet."""
        try:
            whole = jwt.decode_complete(token, options={"verify_signature": False})
        except jwt.PyJWTError:
            return None
        header: Mapping[str, Any] = whole["header"]
        return header if whole["payload"].get("iss") == self.issuer and isinstance(header.get("alg"), str) else None

    async def _key(self, header: Mapping[str, Any]) -> PyJWK | None:
        if self._clock() - self._fetched_at > KEYS_SECONDS:
            self._fetch_soon()
        if not self._known():
            await self._fetched()
            if not self._known():
                raise ProviderUnavailable()
        found = self._find(header)
        if found is None and self._fetch_soon():  # it may be new
            await self._fetched()
            found = self._find(header)
        try:
            return PyJWK(found, header["alg"]) if found else None
        except jwt.PyJWTError:
            return None

    def _known(self) -> bool:
        return bool(self._keys) and self._clock() - self._fetched_at <= KEYS_SECONDS_MAX

    def _find(self, header: Mapping[str, Any]) -> Jwk | None:
        name = header.get("kid")
        found = [key for key in self._keys if header["alg"] in _algorithms(key) and (name is None or key.get("kid") == name)]
        return found[0] if len(found) == 1 else None

    def _fetch_soon(self) -> bool:
        """Whether the keys are being fetched."""
        if self._fetching is None:
            pause = PAUSE_SECONDS if self._known() else PAUSE_SECONDS_WITHOUT_KEYS
            if self._clock() - self._asked_at < pause:
                return False
            self._asked_at = self._clock()
            self._fetching = asyncio.get_running_loop().create_task(self._fetch())
        return True

    async def _fetched(self) -> None:
        if self._fetching is not None:
            await asyncio.wait({self._fetching}, timeout=WAIT_SECONDS)

    async def _fetch(self) -> None:
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                document = await self._get(self.issuer.rstrip("/") + "/.well-known/openid-configuration")
                if document.get("issuer") != self.issuer:
                    raise ValueError("the discovery document is of another issuer")
                address = str(document.get("jwks_uri"))
                if self.issuer.startswith("https://") and not address.startswith("https://"):
                    raise ValueError("the provider's keys are not to be had by https")
                told = (await self._get(address)).get("keys")
            found = tuple(key for key in told if isinstance(key, dict) and _algorithms(key)) if isinstance(told, list) else ()
            if not found:
                raise ValueError("the provider has no key for signatures")
            self._keys, self._fetched_at = found, self._clock()
        except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError, OSError, ValueError) as exc:
            log.warning("identity provider's keys not fetched", error=type(exc).__name__)
        finally:
            self._fetching = None

    async def _get(self, address: str) -> Jwk:
        body = b""
        async with self._http.stream("GET", address, headers={"Accept": "application/json"}) as answer:
            if answer.status_code != 200:
                raise ValueError("not 200")
            async for piece in answer.aiter_bytes():
                body += piece
                if len(body) > ANSWER_BYTES_MAX:
                    raise ValueError("too long")
        document = orjson.loads(body)
        if not isinstance(document, dict):
            raise ValueError("not an object")
        return document


class OutsideUsers:
    """Which of our users a token of the provider belongs to."""

    def __init__(self, tokens: OutsideTokens, settings: Settings, client: AsyncRedis, threads: DatabaseThreads) -> None:
        self._tokens = tokens
        self._issuer = tokens.issuer
        self._client = client
        self._threads = threads
        self._settings = settings
        self._verified: dict[str, User] = {}

    async def user(self, token: str) -> User:
        """Whose token this is, who may be new. Raises `Unauthorized`, `ProviderUnavailable` and, for a new token, what the stores raise."""
        known = self.known(token)
        if known is not None:
            return known
        found = await self._tokens.verify(token)
        if found is None:
            raise Unauthorized()
        subject, expires = found
        if len(self._verified) >= VERIFIED_MAX:
            del self._verified[next(iter(self._verified))]
        user = self._verified[token] = User(await self._id(subject), None, expires)
        return user

    def known(self, token: str) -> User | None:
        """Whose token this is, if it was asked before."""
        known = self._verified.get(token)
        return known if known is not None and known.expires > time.time() else None

    async def _id(self, subject: str) -> int:
        """From Redis, so that what somebody writes needs no Postgres; from Postgres the first time and once a day."""
        key = keys.outside(self._issuer, subject)
        told = await answered(self._client.get(key), self._settings.redis_timeout_seconds)
        if told is not None:
            return int(told)
        seconds = self._settings.postgres_timeout_seconds
        number = await self._threads.run(partial(outside_account, self._issuer, subject, seconds))
        await answered(self._client.set(key, number, ex=KNOWN_SECONDS), self._settings.redis_timeout_seconds)
        return number


def outside_tokens(settings: Settings) -> OutsideTokens | None:
    """The provider that the settings name, if any."""
    if settings.oidc_issuer is None or settings.oidc_audience is None:
        return None
    if not jwt.algorithms.has_crypto:
        raise ConfigurationError("OIDC_ISSUER needs the package `cryptography` (make install)")
    return OutsideTokens(settings.oidc_issuer, settings.oidc_audience)


def _algorithms(key: Jwk) -> frozenset[str]:
    """What this key may have signed with; nothing for a secret, or for one that is not for signatures."""
    operations = key.get("key_ops")
    if key.get("use", "sig") != "sig" or not (operations is None or (isinstance(operations, list) and "verify" in operations)):
        return frozenset()
    by_kind = {"RSA": _RSA, "EC": _of_curve(key), "OKP": _of_curve(key)}.get(str(key.get("kty")), frozenset[str]())
    named = key.get("alg")
    return by_kind if named is None else by_kind & {str(named)}


def _of_curve(key: Jwk) -> frozenset[str]:
    algorithm = _CURVES.get(str(key.get("crv")))
    return frozenset({algorithm} if algorithm else ())
