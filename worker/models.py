"""The tables: what Postgres keeps, and what it refuses by itself.

| table | one row is | who writes it |
| --- | --- | --- |
| `user` | an account | the API, at once (an account is not a message) |
| `sign_in` | a device that is signed in, with the hash of its refresh token (`worker/sign_ins.py`) | the API, at once |
| `conversation` | a conversation; with `deleted_at` the tombstone of one, which no late batch gets past | the flush |
| `message` | a committed message | the flush |
| `dead_letter` | a log entry that Postgres refused, as readable JSON, until an operator replays or drops it | the flush |
| `shard` | the highest id that a shard has committed, which seeds the id clock of a wiped Redis | the flush |

Conversation, message and log-entry ids are made at the acknowledgement (`worker/keys.py`), never here. The composite foreign key
`(conversation_id, user_id)` makes Postgres itself refuse a message in another user's conversation.

`message` has no index on `id` alone. Ids are unique by construction, and without one the planner has a single way to read a
history: down `(conversation_id, id)`, whatever its statistics say.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlmodel import Field, SQLModel

KEY_CHARS_MAX = 200
"""Of a client's Idempotency-Key. It is stored behind a prefix (`k:` a client's, `r:` a reply's), so its columns are wider."""

SUBJECT_CHARS_MAX = 255
"""What OpenID Connect allows a provider to call somebody."""


class Table(SQLModel):
    """What the tables have in common: one MetaData, in which every constraint gets a name that a migration can drop it by."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )


class User(Table, table=True):
    """An account: with an e-mail address (in lower case) and a password, or of an outside identity provider, which vouches for it."""

    __tablename__ = "user"
    __table_args__ = (
        UniqueConstraint("email"),
        UniqueConstraint("issuer", "subject"),
        CheckConstraint("char_length(email) <= 254", name="email_length"),
        CheckConstraint(f"char_length(issuer) <= 500 AND char_length(subject) <= {SUBJECT_CHARS_MAX}", name="subject_length"),
        CheckConstraint(
            "(email IS NOT NULL AND password_hash IS NOT NULL AND issuer IS NULL AND subject IS NULL) OR "
            "(email IS NULL AND password_hash IS NULL AND issuer IS NOT NULL AND subject IS NOT NULL)",
            name="ours_or_outside",
        ),
    )

    id: int = Field(default=None, sa_column=Column(BigInteger, Identity(), primary_key=True))
    email: str | None = Field(default=None, sa_column=Column(Text), repr=False)
    password_hash: str | None = Field(default=None, sa_column=Column(Text), repr=False)
    created_at: datetime = Field(default=None, sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))
    issuer: str | None = Field(default=None, sa_column=Column(Text))
    subject: str | None = Field(default=None, sa_column=Column(Text), repr=False)


class SignIn(Table, table=True):
    """A device that is signed in. `token_hash` is of the one refresh token that is good now; `renewals` counts those before it."""

    __tablename__ = "sign_in"
    __table_args__ = (Index("ix_sign_in_user_id_renewed_at", "user_id", text("renewed_at DESC")),)

    id: str = Field(sa_column=Column(Text, primary_key=True))
    user_id: int = Field(sa_column=Column(BigInteger, ForeignKey("user.id", ondelete="CASCADE"), nullable=False))
    token_hash: str = Field(sa_column=Column(String(64), nullable=False), repr=False)
    renewals: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default=text("0")))
    created_at: datetime = Field(default=None, sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))
    renewed_at: datetime = Field(default=None, sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))
    expires_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False))


class Conversation(Table, table=True):
    """A conversation; with `deleted_at`, the tombstone of one."""

    __tablename__ = "conversation"
    __table_args__ = (
        UniqueConstraint("id", "user_id"),
        Index(
            "ix_conversation_user_id_updated_at_id",
            "user_id",
            text("updated_at DESC"),
            text("id DESC"),
            postgresql_where=text("deleted_at IS NULL"),
        ),
        Index(
            "uq_conversation_user_id_idempotency_key",
            "user_id",
            "idempotency_key",
            unique=True,
            postgresql_where=text("idempotency_key IS NOT NULL"),
        ),
    )

    id: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    user_id: int = Field(sa_column=Column(BigInteger, ForeignKey("user.id"), nullable=False))
    title: str | None = Field(default=None, sa_column=Column(String(200)), repr=False)
    created_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False))
    updated_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False))
    deleted_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    idempotency_key: str | None = Field(default=None, sa_column=Column(String(KEY_CHARS_MAX + 10)))
    request_hash: str | None = Field(default=None, sa_column=Column(String(64)))


class Message(Table, table=True):
    """A committed message. Its content stays out of `repr`, and so out of logs and tracebacks."""

    __tablename__ = "message"
    __table_args__ = (
        PrimaryKeyConstraint("conversation_id", "id"),
        ForeignKeyConstraint(["conversation_id", "user_id"], ["conversation.id", "conversation.user_id"]),
        CheckConstraint("role IN ('user', 'assistant')", name="role"),
        CheckConstraint("status IN ('complete', 'incomplete')", name="status"),
        Index(
            "uq_message_conversation_id_idempotency_key",
            "conversation_id",
            "idempotency_key",
            unique=True,
            postgresql_where=text("idempotency_key IS NOT NULL"),
        ),
    )

    conversation_id: int = Field(sa_column=Column(BigInteger, nullable=False, autoincrement=False))
    id: int = Field(sa_column=Column(BigInteger, nullable=False, autoincrement=False))
    user_id: int = Field(sa_column=Column(BigInteger, ForeignKey("user.id"), nullable=False))
    role: str = Field(sa_column=Column(Text, nullable=False))
    content: str = Field(sa_column=Column(Text, nullable=False), repr=False)
    created_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False))
    status: str = Field(sa_column=Column(Text, nullable=False))
    idempotency_key: str | None = Field(default=None, sa_column=Column(String(KEY_CHARS_MAX + 10)))


class DeadLetter(Table, table=True):
    """A log entry that Postgres refused: never lost, never blocking its shard. `error` is a class and an SQLSTATE, never data."""

    __tablename__ = "dead_letter"
    __table_args__ = (UniqueConstraint("shard", "entry_id"),)

    id: int = Field(default=None, sa_column=Column(BigInteger, Identity(), primary_key=True))
    entry_id: str = Field(sa_column=Column(Text, nullable=False))
    shard: int = Field(sa_column=Column(Integer, nullable=False))
    reason: str = Field(sa_column=Column(Text, nullable=False))
    error: str = Field(sa_column=Column(Text, nullable=False))
    entry: str = Field(sa_column=Column(Text, nullable=False), repr=False)
    created_at: datetime = Field(default=None, sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))
    replayed_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))


class Shard(Table, table=True):
    """Where a shard has got to. `shards` is the number of shards that this installation was made with."""

    __tablename__ = "shard"

    number: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    shards: int = Field(sa_column=Column(Integer, nullable=False))
    last_id: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default=text("0")))
