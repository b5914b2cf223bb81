"""`python -m benchmarks.fill 200000 1:42,2:43`: appends messages to these (user:conversation), through `PendingLog.append`.

A backlog for the benchmarks of the flush, built faster than over HTTP. Nobody is woken: the caller holds the flushes.
"""

from __future__ import annotations

import asyncio
import sys

from benchmarks.load import sentence
from worker.pending import PendingLog
from worker.redis import connect
from worker.settings import get_settings

AT_ONCE = 400


async def fill(count: int, conversations: list[tuple[int, int]]) -> None:
    """Round robin over the conversations."""
    client = connect(get_settings(), name="benchmark-fill")
    log = PendingLog(client, get_settings(), wake=lambda shard: None)
    try:
        for start in range(0, count, AT_ONCE):
            some = (conversations[i % len(conversations)] for i in range(start, min(start + AT_ONCE, count)))
            await asyncio.gather(*(log.append(user, number, "user", sentence(number + start)) for user, number in some))
    finally:
        await log.close()
        await client.aclose()


if __name__ == "__main__":
    pairs = [pair.split(":") for pair in sys.argv[2].split(",")]
    asyncio.run(fill(int(sys.argv[1]), [(int(user), int(number)) for user, number in pairs]))
