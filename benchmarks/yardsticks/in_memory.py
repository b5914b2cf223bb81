"""dict: conversations and messages in dicts of this process."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import count

from fastapi import FastAPI, HTTPException

from benchmarks.yardsticks.bodies import ConversationOut, MessageOut, NewConversation, NewMessage, Page
from benchmarks.yardsticks.tokens import UserId

app = FastAPI()
conversations: dict[int, ConversationOut] = {}
messages: dict[int, list[MessageOut]] = {}
conversation_ids = count(1)
message_ids = count(1)


@app.post("/api/conversations/", status_code=201)
async def create_conversation(user_id: UserId, body: NewConversation) -> ConversationOut:
    created = ConversationOut(id=next(conversation_ids), user_id=user_id, title=body.title, created_at=datetime.now(UTC))
    conversations[created.id] = created
    messages[created.id] = []
    return created


@app.post("/api/conversations/{conversation_id}/messages", status_code=201)
async def add_message(conversation_id: int, user_id: UserId, body: NewMessage) -> MessageOut:
    check_owner(conversation_id, user_id)
    message = MessageOut(
        id=next(message_ids),
        conversation_id=conversation_id,
        user_id=user_id,
        role=body.role,
        content=body.content,
        created_at=datetime.now(UTC),
    )
    messages[conversation_id].append(message)
    return message


@app.get("/api/conversations/{conversation_id}/messages")
async def list_messages(conversation_id: int, user_id: UserId, limit: int = 50) -> Page:
    check_owner(conversation_id, user_id)
    return Page(items=messages[conversation_id][-limit:])


def check_owner(conversation_id: int, user_id: int) -> None:
    conversation = conversations.get(conversation_id)
    if conversation is None or conversation.user_id != user_id:
        raise HTTPException(404, "no such conversation")
