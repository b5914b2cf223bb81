"""The JSON that the yardsticks take and answer."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field


class NewConversation(BaseModel):
    title: str | None = None


class ConversationOut(BaseModel):
    id: int
    user_id: int
    title: str | None
    created_at: datetime


class NewMessage(BaseModel):
    role: Literal["user", "assistant"]
    content: str = Field(min_length=1, max_length=100_000)


class MessageOut(BaseModel):
    id: int
    conversation_id: int
    user_id: int
    role: str
    content: str
    created_at: datetime


class Page(BaseModel):
    items: list[MessageOut]
