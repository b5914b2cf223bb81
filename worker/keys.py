"""The names of all Redis keys, and the arithmetic of ids. Nothing else builds a key.

Every key of a shard shares one hash tag, so that a Redis Cluster keeps a shard together and one script may touch all of it.
`{s07}` below is shard 7, `<c>` a conversation's id, `<u>` a user's.

Per shard, never expiring:

| key | type | holds |
| --- | --- | --- |
| `ck:{s07}:log` | stream | the **pending log**: one entry for each thing that Postgres does not know yet, in the order of acknowledgement |
| `ck:{s07}:clock` | string | the last tick that an id was made of; its absence means a wiped Redis (NEED_SEED) |
| `ck:{s07}:committed` | string | every id up to here is in Postgres: decides `state` |
| `ck:{s07}:bytes` | string | bytes that the log's entries take, for the backlog limit |
| `ck:{s07}:turns` | hash | the replies that have begun and not ended: `<conversation>:<user>` → token |
| `ck:{s07}:users` | hash | bytes of the log for each user, for a fair share of it |
| `ck:{s07}:wake` | string | a flush was asked for and has not begun; a lease, so that a lost task is asked for again |
| `ck:{s07}:seed` | string | the token of whoever asks Postgres where the clock stood, for 2.5 s; a wipe takes it along, a seed ends it |

Per conversation, without expiry while its field `l` is not 0 (pending), else expiring `CACHE_TTL_SECONDS` after the last use:

| key | type | holds |
| --- | --- | --- |
| `ck:{s07}:c:<c>` | hash | the conversation, see below |
| `ck:{s07}:m:<c>` | stream | the latest messages without a gap; pending ones are never dropped |
| `ck:{s07}:k:<c>` | hash | retry keys: key → `<message id>:<hash of the request>`; field `?`: who last asked Postgres for one |
| `ck:{s07}:load:<c>` | string | the lease of whoever loads it from Postgres; a trim ends it, so that a late loader's token no longer fits |
| `ck:{s07}:turn:<c>` | string | the lease of the reply that is being written; its token fences the writer |
| `ck:{s07}:reply:<c>` | stream | the events of that reply, for whoever follows it; gone a minute after the last |
| `ck:{s07}:stop:<c>` | string | the token of a turn that somebody asked to stop |

The fields of an entry of the log: `k` kind, `u` user, `t` when it was appended (microseconds), `b` body, `x` retry key, `a` the title that
a message gave its conversation (of a new conversation: the hash of the request), `n` how many entries of the same call come after it.

The conversation's fields: `u` owner, `t` title, `s` created and `a` last activity (microseconds), `m` the last message's id, `l` the last
pending entry's id or 0, `w` 1 if the cached messages begin with the conversation's first, `k` 1 if all of its retry keys are here, `d` 1 if
it is deleted (a tombstone), `r` the token of the call that created it.

A retry key is `k:<the client's>` (of the second message of a call `1:k:…`, and so on) or `r:<id of the message that is replied to>`.

Per user:

| key | type | holds |
| --- | --- | --- |
| `ck:{s07}:u:<u>` | sorted set | the conversations with pending entries, by the last pending entry's id |
| `ck:{s07}:n:<u>` | hash | retry keys of created conversations: key → `<conversation id>:<created>:<hash>`; `*`: all here, `?` as above |
| `ck:{s07}:e:<u>` | stream | what happened to the user's conversations, while somebody reads it; expires two minutes after |
| `ck:{s07}:mm:<u>` | string | how many messages the user has written in this minute; expires with it |
| `ck:{s07}:cd:<u>` | string | how many conversations the user has begun in these 24 hours; expires with them |
| `ck:{s07}:loadu:<u>` | string | the lease of whoever loads these from Postgres |

A crash of any process leaves all of it valid: each script is one step, and what was appended stays until a trim that follows its commit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from worker.settings import SHARD_SLOTS

EPOCH_MICROSECONDS = 1_767_225_600_000_000
"""2026-01-01T00:00:00Z. Ticks count from here, so that ids stay below 2**53 until 2070."""
TICK_MICROSECONDS = 10
ID_LIMIT = 1 << 53

SHARDS = "ck:shards"
"""The number of shards this installation was made with; another is refused at start."""
WORKERS = "ck:workers"
"""Host → when a task last began or ended there."""
ENDED = "ck:ended"
"""A stream of the sign-ins that were ended while an access token of theirs may still be good; expires with the last of them."""
ATTEMPTS = "ck:try"
"""Counters of tries to sign in or up, by the `limits` library: `ck:try:LIMITER/<what>/<keyed hash>/…`; each expires with its window."""
OUTSIDE = "ck:outside"
"""`ck:outside:<hash of issuer and subject>` → the user; expires after a day."""
STATS = "ck:stats"
"""Counters that the workers keep for /metrics."""


def outside(issuer: str, subject: str) -> str:
    return f"{OUTSIDE}:" + hashlib.sha256(f"{issuer} {subject}".encode()).hexdigest()  # no issuer has a space in it


def shard_of_user(user_id: int, shards: int) -> int:
    """The shard that holds all of a user's conversations."""
    return user_id % shards


def shard_of_id(any_id: int) -> int:
    """The shard that a conversation's, message's or log entry's id was made in."""
    return any_id % SHARD_SLOTS


def shards_of_ids(ids: Sequence[int]) -> list[int]:
    """Of each of them."""
    return [any_id % SHARD_SLOTS for any_id in ids]


def entry_number(entry_id: bytes) -> int | None:
    """The id that an append gave this entry of the log; None if no append can have (somebody planted it with `XADD log *`)."""
    number, _, sequence = entry_id.partition(b"-")
    return int(number) if sequence == b"0" and 0 < int(number) < ID_LIMIT else None


def microseconds_of(any_id: int) -> int:
    """About when an id was given, in Unix microseconds."""
    return any_id // SHARD_SLOTS * TICK_MICROSECONDS + EPOCH_MICROSECONDS


def first_id_at(microseconds: int, shard: int) -> int:
    """The lowest id that `shard` can have given at this time (Unix microseconds)."""
    return max(0, (microseconds - EPOCH_MICROSECONDS) // TICK_MICROSECONDS) * SHARD_SLOTS + shard


def log(shard: int) -> str:
    return f"ck:{{s{shard:02d}}}:log"


def clock(shard: int) -> str:
    return f"ck:{{s{shard:02d}}}:clock"


def seeding(shard: int) -> str:
    return f"ck:{{s{shard:02d}}}:seed"


def committed(shard: int) -> str:
    return f"ck:{{s{shard:02d}}}:committed"


def backlog_bytes(shard: int) -> str:
    return f"ck:{{s{shard:02d}}}:bytes"


def wake(shard: int) -> str:
    return f"ck:{{s{shard:02d}}}:wake"


def conversation(shard: int, conversation_id: int) -> str:
    return f"ck:{{s{shard:02d}}}:c:{conversation_id}"


def messages(shard: int, conversation_id: int) -> str:
    return f"ck:{{s{shard:02d}}}:m:{conversation_id}"


def retry_keys(shard: int, conversation_id: int) -> str:
    return f"ck:{{s{shard:02d}}}:k:{conversation_id}"


def of_conversation(shard: int, conversation_id: int) -> list[str]:
    """The three that a conversation consists of, in the order in which the scripts take them."""
    return [conversation(shard, conversation_id), messages(shard, conversation_id), retry_keys(shard, conversation_id)]


def loading(shard: int, conversation_id: int) -> str:
    return f"ck:{{s{shard:02d}}}:load:{conversation_id}"


def turn(shard: int, conversation_id: int) -> str:
    return f"ck:{{s{shard:02d}}}:turn:{conversation_id}"


def reply(shard: int, conversation_id: int) -> str:
    return f"ck:{{s{shard:02d}}}:reply:{conversation_id}"


def stop(shard: int, conversation_id: int) -> str:
    return f"ck:{{s{shard:02d}}}:stop:{conversation_id}"


def turns(shard: int) -> str:
    return f"ck:{{s{shard:02d}}}:turns"


def changed(shard: int, user_id: int) -> str:
    return f"ck:{{s{shard:02d}}}:u:{user_id}"


def created_keys(shard: int, user_id: int) -> str:
    return f"ck:{{s{shard:02d}}}:n:{user_id}"


def loading_user(shard: int, user_id: int) -> str:
    return f"ck:{{s{shard:02d}}}:loadu:{user_id}"


def messages_of_minute(shard: int, user_id: int) -> str:
    return f"ck:{{s{shard:02d}}}:mm:{user_id}"


def conversations_of_day(shard: int, user_id: int) -> str:
    return f"ck:{{s{shard:02d}}}:cd:{user_id}"


def events(shard: int, user_id: int) -> str:
    return f"ck:{{s{shard:02d}}}:e:{user_id}"


def users(shard: int) -> str:
    return f"ck:{{s{shard:02d}}}:users"
