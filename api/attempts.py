"""How often one address, and one network, may try to sign in or up.

Counted in Redis with the `limits` library, so that all API processes count together. A counter ends with its window, and is named after a
keyed hash: neither an e-mail address nor an IP address stands in Redis. A try counts before the password is looked at, whatever comes of
it, and so for an address without an account as well; signing in sets the address's counter back.

Redis away: nobody signs in (503). Counting for each process alone would let tries through by the number of processes, and nothing that one
signs in for works without Redis.
"""

from __future__ import annotations

import hmac
import time
from ipaddress import IPv6Address, ip_address
from math import ceil
from typing import Any

from fastapi import Request
from limits import RateLimitItem, RateLimitItemPerHour, RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter
from redis.asyncio import Redis as AsyncRedis

from worker import keys
from worker.errors import TooManyAttempts
from worker.redis import answered
from worker.settings import Settings

WINDOW_MINUTES = 5
_V6_NETWORK_BITS = 64
"""What one household or server is given at the least; any address in it is the same person's choice."""


class Attempts:
    """The counters of one installation. Each call raises `TooManyAttempts`, or `RedisUnavailable`."""

    def __init__(self, client: AsyncRedis, settings: Settings) -> None:
        pool: Any = client.connection_pool  # handed on to redis-py as it is; the library's own types do not know it
        storage = RedisStorage("async+redis://", implementation="redispy", key_prefix=keys.ATTEMPTS, connection_pool=pool)
        self._limiter = FixedWindowRateLimiter(storage)
        self._key = hmac.digest(settings.jwt_secret.get_secret_value().encode(), b"chatkeep attempts", "sha256")
        self._seconds = settings.redis_timeout_seconds
        self._per_address = _per_window(settings.sign_ins_per_address_max)
        self._per_network = _per_window(settings.sign_ins_per_network_max)
        self._sign_ups = RateLimitItemPerHour(settings.sign_ups_per_network_max) if settings.sign_ups_per_network_max else None

    async def sign_in(self, request: Request, address: str) -> None:
        """One try to sign in."""
        await self._count(self._per_network, "in-from", network_of(request))
        await self._count(self._per_address, "in-as", address)

    async def signed_in(self, address: str) -> None:
        """It succeeded: the tries before it were its owner's."""
        if self._per_address is not None:
            await answered(self._limiter.clear(self._per_address, "in-as", self._hash(address)), self._seconds)

    async def sign_up(self, request: Request, address: str) -> None:
        """One try to make an account."""
        await self._count(self._sign_ups, "up-from", network_of(request))
        await self._count(self._per_address, "up-as", address)

    async def _count(self, limit: RateLimitItem | None, what: str, whose: str) -> None:
        if limit is None or not whose or await answered(self._limiter.hit(limit, what, self._hash(whose)), self._seconds):
            return
        window = await answered(self._limiter.get_window_stats(limit, what, self._hash(whose)), self._seconds)
        raise TooManyAttempts(max(1, ceil(window.reset_time - time.time())))

    def _hash(self, text: str) -> str:
        return hmac.digest(self._key, text.encode("utf-8", "surrogatepass"), "sha256").hex()[:32]


def network_of(request: Request) -> str:
    """Where a request comes from: an IPv4 address, or the /64 of an IPv6 one; '' for this machine itself.

    What comes from loopback is a program of the operator's, or a proxy that nobody has told us of: counted as one, everybody behind it
    would be locked out by the first who guesses.

    It is the peer's address; where that is a proxy of `FORWARDED_ALLOW_IPS`, uvicorn has put in its place what the proxy says
    (`X-Forwarded-For`), and nobody else's word counts.
    """
    host = request.client.host if request.client else ""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_loopback:
        return ""
    if isinstance(address, IPv6Address):
        return str(IPv6Address(int(address) >> (128 - _V6_NETWORK_BITS) << (128 - _V6_NETWORK_BITS)))
    return str(address)


def _per_window(most: int) -> RateLimitItem | None:
    return RateLimitItemPerMinute(most, WINDOW_MINUTES) if most else None
