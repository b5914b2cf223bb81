"""best direct: asyncpg on Chatkeep's own tables (the same columns, indexes and keys), one statement for each message.

The composite foreign key `(conversation_id, user_id)` does the check of the owner, so that the insert is the only round trip; asyncpg's
question at the return of each connection is switched off, because nothing here leaves state in a session. What it does less than Chatkeep:
it does not move the conversation's last activity, and gives it no title.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import asyncpg  # type: ignore[import-untyped]  # it ships no types
from fastapi import FastAPI, Header, HTTPException

from benchmarks.yardsticks.bodies import ConversationOut, MessageOut, NewConversation, NewMessage, Page
from benchmarks.yardsticks.tokens import UserId

CREATE = (
    "INSERT INTO conversation (id, user_id, title, created_at, updated_at) VALUES (nextval('direct_ids'), $1, $2, now(), now()) "
    "RETURNING id, user_id, title, created_at"
)
INSERT = (
    "INSERT INTO message (conversation_id, id, user_id, role, content, created_at, status, idempotency_key) "
    "VALUES ($1, nextval('direct_ids'), $2, $3, $4, now(), 'complete', $5) ON CONFLICT DO NOTHING RETURNING id, created_at"
)
AGAIN = "SELECT id, created_at FROM message WHERE conversation_id = $1 AND user_id = $2 AND idempotency_key = $3"
LATEST = (
    "SELECT id, conversation_id, user_id, role, content, created_at FROM message WHERE user_id = $2 "
    "AND (conversation_id, id) > ($1, 0) AND (conversation_id, id) < ($1, 9223372036854775807) "
    "ORDER BY conversation_id DESC, id DESC LIMIT $3"
)


async def no_reset(connection: asyncpg.Connection) -> None:
    return None


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with asyncpg.create_pool(os.environ["YARDSTICK_DATABASE_URL"], min_size=16, max_size=16, reset=no_reset) as pool:
        await pool.execute("CREATE SEQUENCE IF NOT EXISTS direct_ids")
        app.state.pool = pool
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/api/conversations/", status_code=201)
async def create_conversation(user_id: UserId, body: NewConversation) -> ConversationOut:
    return ConversationOut(**await app.state.pool.fetchrow(CREATE, user_id, body.title))


@app.post("/api/conversations/{conversation_id}/messages", status_code=201)
async def add_message(
    conversation_id: int, user_id: UserId, body: NewMessage, idempotency_key: Annotated[str | None, Header(max_length=200)] = None
) -> MessageOut:
    try:
        row = await app.state.pool.fetchrow(INSERT, conversation_id, user_id, body.role, body.content, idempotency_key)
    except asyncpg.ForeignKeyViolationError:
        raise HTTPException(404, "no such conversation") from None
    if row is None:
        row = await app.state.pool.fetchrow(AGAIN, conversation_id, user_id, idempotency_key)
    return MessageOut(id=row["id"], conversation_id=conversation_id, user_id=user_id, created_at=row["created_at"], **body.model_dump())


@app.get("/api/conversations/{conversation_id}/messages")
async def list_messages(conversation_id: int, user_id: UserId, limit: int = 50) -> Page:
    rows = await app.state.pool.fetch(LATEST, conversation_id, user_id, limit)
    return Page(items=[MessageOut(**row) for row in reversed(rows)])
