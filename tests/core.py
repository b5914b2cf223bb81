"""Helpers for tests of the core."""

from __future__ import annotations

import secrets

import sqlalchemy as sa

from worker.database import transaction


def make_user(email: str | None = None) -> int:
    """A user's row; its id."""
    with transaction(seconds=5) as connection:
        statement = sa.text('INSERT INTO "user" (email, password_hash) VALUES (:email, :hash) RETURNING id')
        return int(connection.execute(statement, {"email": email or f"{secrets.token_hex(6)}@example.org", "hash": "x"}).scalar_one())
