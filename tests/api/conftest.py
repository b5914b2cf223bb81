"""The whole API on this test's stores, and somebody who has signed up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.app import create_app
from worker.settings import Settings

EMAIL = "ann@example.org"
PASSWORD = "correct horse battery"


@pytest.fixture
def app(settings: Settings) -> FastAPI:
    return create_app(settings)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def bearer(client: TestClient) -> dict[str, str]:
    """The header of a user who has just signed up."""
    return sign_up(client, EMAIL)


@pytest.fixture
def conversation(client: TestClient, bearer: dict[str, str]) -> int:
    """A conversation of that user."""
    return int(client.post("/api/conversations/", json={}, headers=bearer).json()["id"])


def sign_up(client: TestClient, email: str) -> dict[str, str]:
    """A new user's header."""
    assert client.post("/api/auth/register", json={"email": email, "password": PASSWORD}).status_code == 201
    answer = client.post("/api/auth/token", data={"username": email, "password": PASSWORD})
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}
