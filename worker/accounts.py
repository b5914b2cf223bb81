"""Accounts in Postgres. Unlike a message, an account is not acknowledged before it is there.

A transaction here sees the account that it names, by e-mail address, by id, or by what it is called at an outside identity provider, and
no other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import text

from worker.database import read, transaction


@dataclass(frozen=True, slots=True)
class Account:
    """An account; the e-mail address in lower case. One of an outside identity provider has neither address nor password."""

    id: int
    email: str | None = field(repr=False)
    created_at: datetime
    password_hash: str | None = field(repr=False)


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


def outside_account(issuer: str, subject: str, seconds: float) -> int:
    """The id of the account that this provider calls so; it is made the first time."""
    named = {"issuer": issuer, "subject": subject}
    find = text('SELECT id FROM "user" WHERE issuer = :issuer AND subject = :subject')
    with read(seconds, outside=(issuer, subject)) as connection:
        found = connection.execute(find, named).scalar_one_or_none()
    if found is None:
        with transaction(seconds=seconds, outside=(issuer, subject)) as connection:
            connection.execute(
                text('INSERT INTO "user" (issuer, subject) VALUES (:issuer, :subject) ON CONFLICT (issuer, subject) DO NOTHING'), named
            )
            found = connection.execute(find, named).scalar_one()
    return int(found)


def ask_postgres(seconds: float) -> None:
    """Raises `PostgresUnavailable` unless Postgres answers and has our tables."""
    with read(seconds) as connection:
        connection.execute(text('SELECT FROM "user" WHERE id = 0'))
