"""Every error that Chatkeep raises on purpose.

    ChatkeepError
    ├── TryAgainLater            the same call may succeed later (503, Retry-After)
    │   ├── RedisUnavailable
    │   ├── PostgresUnavailable
    │   ├── TooSlow
    │   ├── ProviderUnavailable
    │   ├── NotDurable
    │   ├── BacklogFull
    │   ├── UserBacklogFull      (429)
    │   └── TooMany              (429) for a while, which it says
    │       ├── TooManyAttempts
    │       ├── TooManyMessages
    │       └── TooManyConversations
    └── Never                    the same call fails for ever
        ├── ConfigurationError
        ├── NotFound             also for what belongs to somebody else
        ├── KeyReused
        ├── TurnRunning
        ├── ReplyFailed
        ├── ReplyStopped
        ├── TooManyStreams
        └── BadEntry

Driver errors are translated once, at the edge where they arise; above it nobody catches `RedisError` or `psycopg2.Error`.
A docstring is the message a person reads. None of them carries message text, a token or an e-mail address.
"""

from __future__ import annotations


class ChatkeepError(Exception):
    """Something went wrong in Chatkeep."""

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail or (type(self).__doc__ or "").strip())

    @property
    def detail(self) -> str:
        """What happened and what to do next, for the caller."""
        return str(self)


class TryAgainLater(ChatkeepError):
    """Chatkeep cannot do this right now; try again in a few seconds."""

    retry_after_seconds = 1


class RedisUnavailable(TryAgainLater):
    """The pending log cannot be reached. The outcome of a write is unknown: repeat it with the same Idempotency-Key."""


class PostgresUnavailable(TryAgainLater):
    """The database cannot be reached, and what was asked for is not whole in the cache. Try again in a few seconds."""

    retry_after_seconds = 2


class TooSlow(TryAgainLater):
    """This took longer than 2 seconds and was given up. The outcome of a write is unknown: repeat it with the same Idempotency-Key."""


class ProviderUnavailable(TryAgainLater):
    """The identity provider that this token is of cannot be asked for its keys; try again in a few seconds."""

    retry_after_seconds = 2


class NotDurable(TryAgainLater):
    """Redis could lose what it acknowledges (see /readyz for the check that fails), so nothing is accepted."""

    retry_after_seconds = 5


class BacklogFull(TryAgainLater):
    """Too much is waiting to be written to the database; nothing more is accepted until it has caught up."""

    retry_after_seconds = 5


class UserBacklogFull(TryAgainLater):
    """Too much of yours is waiting to be written to the database; nothing more is accepted until it has caught up."""

    retry_after_seconds = 5


class TooMany(TryAgainLater):
    """Too many in a short time; try again later."""

    def __init__(self, retry_after_seconds: int = 60) -> None:
        super().__init__()
        self.retry_after_seconds = retry_after_seconds


class TooManyAttempts(TooMany):
    """Too many attempts for this e-mail address or from this network; try again in a few minutes."""


class TooManyMessages(TooMany):
    """Too many messages in a minute; nothing was stored. Go on when the minute is over."""


class TooManyConversations(TooMany):
    """Too many new conversations in a day; nothing was stored. Write in one that is there, or wait."""


class Never(ChatkeepError):
    """This call cannot succeed; change it before you repeat it."""


class ConfigurationError(Never):
    """A setting is missing or wrong."""


class NotFound(Never):
    """There is no such conversation."""


class KeyReused(Never):
    """This Idempotency-Key was used for a different request; use a new key for a new request."""


class TurnRunning(Never):
    """A reply is still being written in this conversation; wait for it to end."""


class ReplyFailed(Never):
    """The model gave no reply. Your message is stored; repeat the call with the same Idempotency-Key to try the reply again."""


class ReplyStopped(Never):
    """The reply was stopped before its first word; repeat the call with the same Idempotency-Key to try it again."""


class TooManyStreams(Never):
    """Too many event streams are open for this user; close one first."""


class BadEntry(Never):
    """A log entry cannot be read; it goes to the dead letters."""
