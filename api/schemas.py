"""The shapes of HTTP: every body that is taken and every answer that is given.

What is taken is strict: unknown fields are refused, `"1"` is not a number, and text that Postgres would not take is a 422 before anything
is acknowledged. Text is never trimmed or normalised. Answers with messages are put together from stored bytes (`worker/codec.py`), so their
classes here are what the documentation shows and the tests compare with.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, WithJsonSchema, model_validator

from worker.errors import NotFound
from worker.keys import ID_LIMIT
from worker.pending import MESSAGES_PER_CALL_MAX
from worker.settings import get_settings
from worker.text import TITLE_CHARS_MAX, check_text, is_unicode

EMAIL_CHARS_MAX = 254
PASSWORD_CHARS_MIN = 8
PASSWORD_CHARS_MAX = 128

MESSAGE_CHARS_MAX: ContextVar[int | None] = ContextVar("message_chars_max", default=None)
"""Set by the app for each request; outside of one, the process's settings say it."""

_LOCAL = r"[a-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[a-z0-9!#$%&'*+/=?^_`{|}~-]+)*"
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_EMAIL = re.compile(rf"(?=.{{1,64}}@){_LOCAL}@(?:{_LABEL}\.)+{_LABEL}")


def _check_content(value: str) -> str:
    return check_text(value, MESSAGE_CHARS_MAX.get() or get_settings().message_chars_max)


def _check_title(value: str) -> str:
    return check_text(value, TITLE_CHARS_MAX)


def _check_email(value: str) -> str:
    address = value.lower()
    if len(value) > EMAIL_CHARS_MAX or not value.isascii() or not _EMAIL.fullmatch(address):
        raise ValueError("must be an e-mail address, such as ann@example.org")
    return address


def _check_password(value: SecretStr) -> SecretStr:
    password = value.get_secret_value()
    if not PASSWORD_CHARS_MIN <= len(password) <= PASSWORD_CHARS_MAX:
        raise ValueError(f"must have {PASSWORD_CHARS_MIN} to {PASSWORD_CHARS_MAX} characters")
    if "\x00" in password or not is_unicode(password):
        raise ValueError("must not contain NUL characters or lone surrogates")
    return value


def parse_id(value: object) -> int:
    """An id out of a path. What can be nobody's id is answered like one that is not the caller's: `NotFound`."""
    text = str(value)
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and text[0] != "0") or int(text) >= ID_LIMIT:
        raise NotFound()
    return int(text)


Content = Annotated[str, AfterValidator(_check_content), WithJsonSchema({"type": "string", "minLength": 1, "maxLength": 100_000})]
Title = Annotated[str, AfterValidator(_check_title), WithJsonSchema({"type": "string", "minLength": 1, "maxLength": TITLE_CHARS_MAX})]
Email = Annotated[str, AfterValidator(_check_email), WithJsonSchema({"type": "string", "format": "email", "maxLength": EMAIL_CHARS_MAX})]
Password = Annotated[
    SecretStr,
    AfterValidator(_check_password),
    WithJsonSchema({"type": "string", "format": "password", "minLength": PASSWORD_CHARS_MIN, "maxLength": PASSWORD_CHARS_MAX}),
]
PathId = Annotated[int, BeforeValidator(parse_id)]
Id = Annotated[int, Field(ge=1, lt=ID_LIMIT)]
Time = Annotated[str, Field(json_schema_extra={"format": "date-time"}, examples=["2026-11-20T09:30:00.000000Z"])]


class Body(BaseModel):
    """What is taken: nothing unknown, nothing converted, and no input in an error's text."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class Credentials(Body):
    email: Email
    password: Password


class NewConversation(Body):
    title: Title | None = None


class ConversationChange(Body):
    title: Title


class NewMessage(Body):
    role: Literal["user", "assistant"]
    content: Content


class NewMessages(Body):
    """Messages that are stored together: all of them or none, in this order, next to each other."""

    messages: Annotated[list[NewMessage], Field(min_length=1, max_length=MESSAGES_PER_CALL_MAX)]


class ChatStart(Body):
    """A new conversation, with a title or without, or one to go on with."""

    title: Title | None = None
    conversation_id: Id | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> ChatStart:
        if self.title is not None and self.conversation_id is not None:
            raise ValueError("give a title for a new conversation, or the conversation_id of one to go on with, not both")
        return self


class ChatMessage(Body):
    message: Content


IDEMPOTENCY_KEY = r"[\x21-\x7e]{1,200}"
PAGE_MAX, PAGE_DEFAULT = 200, 50


@dataclass(frozen=True, slots=True)
class Page:
    """Which page of a history is asked for; without `before` and `after`, the latest."""

    limit: int
    before: int | None = None
    after: int | None = None


# Answers


class UserOut(BaseModel):
    """`email` is null for an account of an outside identity provider."""

    id: Id
    email: str | None
    created_at: Time


class TokenOut(BaseModel):
    access_token: str
    token_type: Literal["bearer"] = "bearer"  # noqa: S105 - the name of a scheme
    expires_in: int
    refresh_token: str


class ConversationOut(BaseModel):
    id: Id
    user_id: Id
    title: str | None
    created_at: Time
    updated_at: Time


class ConversationPage(BaseModel):
    items: list[ConversationOut]
    next_cursor: str | None


class MessageOut(BaseModel):
    id: Id
    conversation_id: Id
    user_id: Id
    role: Literal["user", "assistant"]
    content: str
    created_at: Time
    status: Literal["complete", "incomplete"]
    state: Literal["pending", "committed"]


class MessagesOut(BaseModel):
    items: list[MessageOut]


class MessagePage(BaseModel):
    items: list[MessageOut]
    has_older: bool
    has_newer: bool


class Session(BaseModel):
    session_id: str
    conversation_id: Id


class ChatTurn(Session):
    reply: str
    user_message: MessageOut
    assistant_message: MessageOut


class SessionHistory(Session):
    items: list[MessageOut]
    has_older: bool
    has_newer: bool


class FieldError(BaseModel):
    loc: list[str | int]
    message: str


class ProblemOut(BaseModel):
    """RFC 9457; `errors` only with status 422."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldError] | None = None


class CheckOut(BaseModel):
    ok: bool
    detail: str | None = None


class Liveness(BaseModel):
    status: Literal["ok"] = "ok"


class ReadinessOut(BaseModel):
    status: Literal["ok", "degraded", "unavailable"]
    checks: dict[str, CheckOut]
