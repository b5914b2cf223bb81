"""People who use the API over HTTP, for tests that look at it from outside."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import httpx2

T = TypeVar("T")

ANSWER_SECONDS = 10.0
"""What a test waits for one answer: far more than the API may take, so that a hang is seen as a hang and not as a slow machine."""
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
JSON = {"Content-Type": "application/json"}


def browser(url: str, headers: dict[str, str] | None = None) -> httpx2.Client:
    """An HTTP client. Loading the certificates of the world, which nobody asks for here, would take it 40 ms."""
    return httpx2.Client(base_url=url, headers=headers, timeout=ANSWER_SECONDS, verify=False, trust_env=False)


class Person:
    """One user, with a token, at one API process."""

    def __init__(self, url: str, user_id: int, token: str) -> None:
        self.id = user_id
        self.token = token
        self.http = browser(url, {"Authorization": f"Bearer {token}"})

    def at(self, url: str) -> Person:
        """The same person at another process."""
        return Person(url, self.id, self.token)

    def start(self, title: str | None = None, *, key: str | None = None) -> dict[str, Any]:
        """A new conversation."""
        return ok(self.http.post("/api/conversations", json={"title": title} if title else {}, headers=keyed(key)), 201)

    def say(self, conversation: int, content: str, role: str = "user", *, key: str | None = None) -> dict[str, Any]:
        """An acknowledged message."""
        return ok(self.post(conversation, content, role, key=key), 201)

    def post(self, conversation: int, content: str, role: str = "user", *, key: str | None = None) -> httpx2.Response:
        """The answer to a message, whatever it is."""
        return self.http.post(f"/api/conversations/{conversation}/messages", json={"role": role, "content": content}, headers=keyed(key))

    def chat(self, conversation: int, message: str, *, key: str | None = None) -> httpx2.Response:
        """The answer to a turn, whatever it is."""
        return self.http.post(f"/api/chat/{conversation}/message", json={"message": message}, headers=keyed(key))

    def stream(self, conversation: int, message: str, *, key: str | None = None) -> httpx2.Response:
        """A turn as a stream, read to its end."""
        headers = keyed(key) | {"Accept": "text/event-stream"}
        return self.http.post(f"/api/chat/{conversation}/message", json={"message": message}, headers=headers)

    def look(self, conversation: int) -> dict[str, Any]:
        """A conversation."""
        return ok(self.http.get(f"/api/conversations/{conversation}"))

    def page(self, conversation: int, **query: Any) -> dict[str, Any]:
        """A page of a history."""
        return ok(self.http.get(f"/api/conversations/{conversation}/messages", params=query))

    def history(self, conversation: int) -> list[dict[str, Any]]:
        """All of a history, walked from the latest page to the first."""
        page = self.page(conversation, limit=200)
        messages: list[dict[str, Any]] = page["items"]
        while page["has_older"]:
            page = self.page(conversation, limit=200, before=messages[0]["id"])
            messages = page["items"] + messages
        return messages

    def contents(self, conversation: int) -> list[str]:
        """What was said, in order."""
        return [message["content"] for message in self.history(conversation)]

    def conversations(self, **query: Any) -> dict[str, Any]:
        """A page of the conversation list."""
        return ok(self.http.get("/api/conversations", params=query))

    def walk(self, limit: int) -> Iterator[dict[str, Any]]:
        """Every conversation, page by page."""
        page = self.conversations(limit=limit)
        yield from page["items"]
        while page["next_cursor"] is not None:
            page = self.conversations(limit=limit, cursor=page["next_cursor"])
            yield from page["items"]


def sign_up(url: str, email: str, password: str = "correct horse battery") -> Person:
    """A new account, signed in over HTTP."""
    with browser(url) as http:
        user = ok(http.post("/api/auth/register", json={"email": email, "password": password}), 201)
        token = ok(http.post("/api/auth/token", data={"username": email, "password": password}))
    return Person(url, user["id"], token["access_token"])


def keyed(key: str | None) -> dict[str, str]:
    """The header of a retry key, if there is one."""
    return {} if key is None else {"Idempotency-Key": key}


def ok(answer: httpx2.Response, status: int = 200) -> Any:
    """What was answered, if it was this."""
    assert answer.status_code == status, f"{answer.status_code} {answer.text[:500]}"
    return answer.json()


def problem(answer: httpx2.Response, status: int) -> dict[str, Any]:
    """The members of an error, if it is this one and of the shape that every error has."""
    assert answer.status_code == status, f"{answer.status_code} {answer.text[:500]}"
    assert answer.headers["content-type"] == "application/problem+json"
    told: dict[str, Any] = answer.json()
    assert set(told) == {"type", "title", "status", "detail"} | ({"errors"} if status == 422 else set())
    assert told["status"] == status
    assert all(isinstance(told[name], str) and told[name] for name in ("type", "title", "detail"))
    if status == 503:
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    return told


def events(answer: httpx2.Response) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream, (name, data), of which each must have an id."""
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text[:500]
    found = []
    for block in answer.text.replace("\r\n", "\n").split("\n\n"):
        fields: dict[str, str] = {}
        for line in block.split("\n"):
            name, _, value = line.partition(": ")
            if name:  # not a comment
                fields[name] = fields[name] + "\n" + value if name in fields else value
        if fields:
            assert set(fields) == {"event", "data", "id"}, fields
            assert fields["id"]
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def until(condition: Callable[[], T], what: str, seconds: float = 20.0) -> T:
    """What the condition gives as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.02)
    return found
