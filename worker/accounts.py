"""Accounts in Postgres. Unlike a message, an account is not acknowledged before it is there.

A transaction here sees the account that it names, by e-mail address or by id, and no other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import text

from worker.database import read, transaction


@dataclass(frozen=True, slots=True)
class Account:
    """An account; the e-mail address in lower case."""

    id: int
    email: str = field(repr=False)
    created_at: datetime
    password_hash: str = field(repr=False)


def create_account(email: str, password_hash: str, seconds: float) -> Account | None:
    """The new account, or None if the address is taken."""
    with transaction(seconds=seconds, email=email) as connection:
        row = connection.execute(
            text(
                'INSERT INTO "user" (email, password_hash) VALUES (:email, :password_hash) '
                "ON CONFLICT (email) DO NOTHING RETURNING id, email, created_at, password_hash"
            ),
            {"email": email, "password_hash": password_hash},
        ).one_or_none()
    return None if row is None else Account(*row)


def find_account(email: str, seconds: float) -> Account | None:
    """The account with this address (in lower case)."""
    with read(seconds, email=email) as connection:
        row = connection.execute(
            text('SELECT id, email, created_at, password_hash FROM "user" WHERE email = :email'), {"email": email}
        ).one_or_none()
    return None if row is None else Account(*row)


def get_account(user_id: int, seconds: float) -> Account | None:
    """The account with this id."""
    with read(seconds, user=user_id) as connection:
        row = connection.execute(
            text('SELECT id, email, created_at, password_hash FROM "user" WHERE id = :id'), {"id": user_id}
        ).one_or_none()
    return None if row is None else Account(*row)


def ask_postgres(seconds: float) -> None:
    """Raises `PostgresUnavailable` unless Postgres answers and has our tables."""
    with read(seconds) as connection:
        connection.execute(text('SELECT FROM "user" WHERE id = 0'))
