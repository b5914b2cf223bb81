"""direct: SQLModel on psycopg2; each message is added, committed and read back, as in SQLModel's tutorial."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated

import sqlalchemy as sa
from fastapi import Depends, FastAPI, HTTPException
from sqlmodel import Field, Session, SQLModel, col, create_engine, select

from benchmarks.yardsticks.bodies import ConversationOut, MessageOut, NewConversation, NewMessage, Page
from benchmarks.yardsticks.tokens import UserId


class Conversation(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True, sa_type=sa.BigInteger)
    user_id: int = Field(index=True, sa_type=sa.BigInteger)
    title: str | None = None
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC), sa_type=sa.DateTime(timezone=True))


class Message(SQLModel, table=True):
    __table_args__ = (sa.Index("ix_message_conversation_id_id", "conversation_id", "id"),)

    id: int | None = Field(default=None, primary_key=True, sa_type=sa.BigInteger)
    conversation_id: int = Field(foreign_key="conversation.id", sa_type=sa.BigInteger)
    user_id: int = Field(sa_type=sa.BigInteger)
    role: str
    content: str
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC), sa_type=sa.DateTime(timezone=True))


engine = create_engine(os.environ["YARDSTICK_DATABASE_URL"].replace("postgresql://", "postgresql+psycopg2://"), pool_size=40)
SQLModel.metadata.create_all(engine)
app = FastAPI()


def get_session() -> Iterator[Session]:
    with Session(engine) as session:
        yield session


DatabaseSession = Annotated[Session, Depends(get_session)]


@app.post("/api/conversations/", status_code=201, response_model=ConversationOut)
def create_conversation(session: DatabaseSession, user_id: UserId, body: NewConversation) -> Conversation:
    conversation = Conversation(user_id=user_id, title=body.title)
    session.add(conversation)
    session.commit()
    session.refresh(conversation)
    return conversation


@app.post("/api/conversations/{conversation_id}/messages", status_code=201, response_model=MessageOut)
def add_message(session: DatabaseSession, conversation_id: int, user_id: UserId, body: NewMessage) -> Message:
    check_owner(session, conversation_id, user_id)
    message = Message(conversation_id=conversation_id, user_id=user_id, role=body.role, content=body.content)
    session.add(message)
    session.commit()
    session.refresh(message)
    return message


@app.get("/api/conversations/{conversation_id}/messages", response_model=Page)
def list_messages(session: DatabaseSession, conversation_id: int, user_id: UserId, limit: int = 50) -> dict[str, list[Message]]:
    check_owner(session, conversation_id, user_id)
    latest = select(Message).where(Message.conversation_id == conversation_id).order_by(sa.desc(col(Message.id))).limit(limit)
    return {"items": list(reversed(session.exec(latest).all()))}


def check_owner(session: Session, conversation_id: int, user_id: int) -> None:
    conversation = session.get(Conversation, conversation_id)
    if conversation is None or conversation.user_id != user_id:
        raise HTTPException(404, "no such conversation")
