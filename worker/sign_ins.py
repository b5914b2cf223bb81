"""Sign-ins in Postgres: one for each device, kept up by a refresh token that changes with each use.

A refresh token is `<user>.<sign-in>.<secret>`. Each secret is made from the one before it with a key that only the API has, so a secret and
its successors form a chain, of which Postgres knows the hash of the last link. From a token that is shown, walking forward says what it is:

| the token is | | then |
| --- | --- | --- |
| the last link | the one that is good now | it is renewed: the next link takes its place |
| the one before it, for `GRACE_SECONDS` | two tabs renew at once, or an answer was lost | the same successor again |
| any older one | it was copied: one of two holders has gone on without the other | the sign-in ends, for both |
| no link of it | made up | nothing happens |

One row a sign-in is all that this needs, however often it is renewed. A thief who is quick enough to use a token in its grace gets the very
successor that its owner has, so the next renewal still shows that there are two of them.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from base64 import urlsafe_b64encode
from dataclasses import dataclass, field

from sqlalchemy import text

from worker.database import transaction
from worker.keys import ID_LIMIT

GRACE_SECONDS = 30
"""Longer than any call may take with its repetitions (15 s on the page)."""
PER_USER_MAX = 100
"""A new one beyond it ends the one that was renewed longest ago."""
CHAIN_MAX = 20_000
"""Half a year of renewals every quarter of an hour; walking it takes 50 ms. An older link is answered like one that was made up."""
_TOKEN_CHARS_MAX = 200


@dataclass(frozen=True, slots=True)
class SignIn:
    """A sign-in, and its refresh token that is good now."""

    id: str
    user_id: int
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Copied:
    """A refresh token was used that had been used before; this sign-in is ended."""

    id: str


class RefreshTokens:
    """The chains of one secret. Each call is one transaction, bounded by `seconds`; raises `PostgresUnavailable`."""

    def __init__(self, secret: str, lifetime_seconds: int) -> None:
        self._key = hmac.digest(secret.encode(), b"chatkeep refresh tokens", "sha256")
        self.lifetime_seconds = lifetime_seconds

    def begin(self, user_id: int, seconds: float) -> tuple[SignIn, list[str]]:
        """A new sign-in, and those that had to end for it. Those that have run out are cleared away."""
        made, secret = secrets.token_urlsafe(16), secrets.token_urlsafe(32)
        with transaction(seconds=seconds, user=user_id) as connection:
            cleared = connection.execute(_CLEAR, {"user": user_id, "kept": PER_USER_MAX - 1}).all()
            values = {"id": made, "user": user_id, "hash": _hash(secret), "lifetime": self.lifetime_seconds}
            connection.execute(_INSERT, values)
        return SignIn(made, user_id, f"{user_id}.{made}.{secret}"), [row.id for row in cleared if row.good]

    def renew(self, token: str, seconds: float) -> SignIn | Copied | None:
        """The sign-in with its next token; None for a token that is nobody's, or too old."""
        parts = _parts(token)
        if parts is None:
            return None
        user_id, sign_in, secret = parts
        row_is = {"id": sign_in, "user": user_id}
        with transaction(seconds=seconds, user=user_id) as connection:
            row = connection.execute(_LOCK, row_is | {"grace": GRACE_SECONDS}).one_or_none()
            used = None if row is None else self._links_to(secret, row.token_hash, min(row.renewals, CHAIN_MAX))
            if row is None or used is None:
                return None
            if used > 1 or (used == 1 and not row.recent):
                connection.execute(_DELETE, row_is)
                return Copied(sign_in)
            successor = self._successor(secret)
            if used == 0:
                connection.execute(_RENEW, row_is | {"hash": _hash(successor), "lifetime": self.lifetime_seconds})
        return SignIn(sign_in, user_id, f"{user_id}.{sign_in}.{successor}")

    @staticmethod
    def end(user_id: int, sign_in: str, seconds: float) -> None:
        """Ends a sign-in; there may be none."""
        with transaction(seconds=seconds, user=user_id) as connection:
            connection.execute(_DELETE, {"id": sign_in, "user": user_id})

    def _successor(self, secret: str) -> str:
        return urlsafe_b64encode(hmac.digest(self._key, secret.encode(), "sha256")).rstrip(b"=").decode()

    def _links_to(self, secret: str, last_hash: str, links_max: int) -> int | None:
        """How many links lie between this secret and the last one; None if it is of another chain."""
        for links in range(links_max + 1):
            if hmac.compare_digest(_hash(secret), last_hash):
                return links
            secret = self._successor(secret)
        return None


def _parts(token: str) -> tuple[int, str, str] | None:
    user, _, rest = token.partition(".")
    sign_in, _, secret = rest.partition(".")
    if not (token.isascii() and len(token) <= _TOKEN_CHARS_MAX and user.isdigit() and len(user) <= 16 and sign_in and secret):
        return None
    return (int(user), sign_in, secret) if 0 < int(user) < ID_LIMIT and "\x00" not in token else None


def _hash(secret: str) -> str:
    """Plain SHA-256 is enough for 256 bits that nobody chose."""
    return hashlib.sha256(secret.encode()).hexdigest()


_CLEAR = text("""
    DELETE FROM sign_in WHERE user_id = :user AND (expires_at <= now() OR id IN (
        SELECT id FROM sign_in WHERE user_id = :user AND expires_at > now() ORDER BY renewed_at DESC, id OFFSET :kept))
    RETURNING id, expires_at > now() AS good
""")
_INSERT = text("""
    INSERT INTO sign_in (id, user_id, token_hash, expires_at) VALUES (:id, :user, :hash, now() + make_interval(secs => :lifetime))
""")
_LOCK = text("""
    SELECT token_hash, renewals, renewed_at > now() - make_interval(secs => :grace) AS recent
    FROM sign_in WHERE id = :id AND user_id = :user AND expires_at > now() FOR UPDATE
""")
_RENEW = text("""
    UPDATE sign_in SET token_hash = :hash, renewals = renewals + 1, renewed_at = now(),
           expires_at = now() + make_interval(secs => :lifetime)
    WHERE id = :id AND user_id = :user
""")
_DELETE = text("DELETE FROM sign_in WHERE id = :id AND user_id = :user")
