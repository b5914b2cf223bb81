"""Which sign-ins have ended: known to every API process a moment after, without asking anybody at a request.

Their access tokens are good for a while yet by themselves. Whoever ends a sign-in says so in a stream in Redis; each process reads it every
`LOOK_SECONDS` and remembers what it read for as long as such a token may live, so that a request costs a look into a dictionary.

- In the process that ended it, a token is refused from that moment; in the others after `LOOK_SECONDS` and a call of Redis.
- A process that has not been able to look for `STALE_SECONDS` looks before it answers, and refuses (503) if it cannot: with Redis away
  nobody gets in by a token that was ended meanwhile. (Nearly every route needs Redis anyway.)
- A Redis that has lost its data is told again by each process what that one remembers. Only if all API processes were started anew at the
  same time is it forgotten, and such a token good until it expires (`ACCESS_TOKEN_SECONDS`). It cannot be renewed: that is in Postgres.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence

import structlog
from redis.asyncio import Redis as AsyncRedis

from worker import keys
from worker.errors import TryAgainLater
from worker.redis import answered
from worker.scripts import AsyncScripts
from worker.settings import Settings

log = structlog.get_logger(__name__)

LOOK_SECONDS = 0.25
STALE_SECONDS = 3.0
MARGIN_SECONDS = 60
"""For clocks that differ, and the leeway that a token is given."""
_COUNT = 1000
_START = "0-0"


class EndedSignIns:
    """What this process knows; `start` before use, `close` after. `on_end` is called once for each that it hears of."""

    def __init__(
        self, client: AsyncRedis, settings: Settings, on_end: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._client = client
        self._seconds = settings.redis_timeout_seconds
        self._lifetime = settings.access_token_seconds + MARGIN_SECONDS
        self._on_end = on_end
        self._clock = clock
        self._scripts = AsyncScripts(client, settings.redis_timeout_seconds)
        self._until: dict[str, float] = {}
        """In the order in which they end, because each is remembered for the same time."""
        self._unsent: set[str] = set()
        self._after = _START
        self._looked_at = float("-inf")
        self._looking = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Looks once, and then again and again."""
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        """Stops looking."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._scripts.close()

    async def has_ended(self, sign_in: str) -> bool:
        """Whether this sign-in was ended; raises `RedisUnavailable` where that is not known."""
        if sign_in not in self._until and self.is_stale:
            await self._look_if_stale()
        return sign_in in self._until

    @property
    def is_stale(self) -> bool:
        """Whether this process has not heard for so long that it does not know who has ended."""
        return self._clock() - self._looked_at > STALE_SECONDS

    def knows(self, sign_in: str) -> bool:
        """Whether this process has heard that this sign-in was ended."""
        return sign_in in self._until

    def note(self, sign_ins: Iterable[str]) -> None:
        """These have ended. The other processes are told at the next look, or as soon as Redis is there again."""
        for sign_in in sign_ins:
            self._unsent.add(sign_in)
            self._remember(sign_in)

    async def end(self, sign_in: str) -> None:
        """This one has ended, and the other processes are told; raises `RedisUnavailable` if they could not be (yet)."""
        self.note([sign_in])
        await self._send([sign_in])

    async def _look_if_stale(self) -> None:
        async with self._looking:
            if self.is_stale:
                await self._look()

    async def _watch(self) -> None:
        failing = False
        while True:
            try:
                async with self._looking:
                    await self._look()
                failing = False
            except TryAgainLater as exc:
                if not failing:
                    log.warning("ended sign-ins not read", error=type(exc).__name__)
                failing = True
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self) -> None:
        """Reads what is new, and says what Redis does not know (any more)."""
        asked_at = self._clock()
        self._forget()
        more = True
        while more:
            found, lost = await self._read()
            for entry_id, fields in found:
                self._after = entry_id.decode()
                self._remember(fields[b"i"].decode())
            more = len(found) == _COUNT
            if lost:  # or so old that nobody remembers anything; its ids may have begun anew
                more = self._after != _START  # read it from its start
                self._after = _START
                self._unsent.update(self._until)
        if self._unsent:
            await self._send(sorted(self._unsent))
        self._looked_at = asked_at

    async def _read(self) -> tuple[Sequence[tuple[bytes, dict[bytes, bytes]]], bool]:
        """What comes after the entry that was read last, and whether that one is gone."""
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.xread({keys.ENDED: self._after}, count=_COUNT)
            pipeline.xrange(keys.ENDED, self._after, self._after)
            streams, last = await answered(pipeline.execute(), self._seconds)
        found = streams[0][1] if streams else ()
        return found, not (found if self._after == _START else last)

    async def _send(self, sign_ins: Sequence[str]) -> None:
        kept_ms = (self._lifetime + MARGIN_SECONDS) * 1000  # longer than anybody remembers: a stream that is missing early was lost
        await self._scripts.run("end_sign_ins", [keys.ENDED], [kept_ms, *sign_ins])
        self._unsent.difference_update(sign_ins)

    def _remember(self, sign_in: str) -> None:
        if sign_in not in self._until:
            self._until[sign_in] = self._clock() + self._lifetime
            self._on_end(sign_in)

    def _forget(self) -> None:
        now = self._clock()
        while self._until and (first := next(iter(self._until))) and self._until[first] <= now:
            del self._until[first]
            self._unsent.discard(first)
