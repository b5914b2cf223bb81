"""The two calls that a chat makes all the time, past FastAPI's dependencies.

Of the CPU that an append takes in this process, what FastAPI does before the route's first line (dependencies, headers, body) was the
largest part: 155 of 550 µs. A route that is marked with `@fast(handler)`, on a router of `FastRoute`s, asks that handler first. The
handler takes the ordinary case only: where anything is unusual or wrong it answers None, and the route itself does the same over again,
as documented, with its own words for what is wrong. So the two differ in speed alone (`tests/api/test_fast.py` compares them).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from api.schemas import IDEMPOTENCY_KEY, PAGE_DEFAULT, PAGE_MAX, Page, parse_id
from worker.keys import ID_LIMIT

FastHandler = Callable[[Request], Awaitable[Response | None]]
Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
Model = TypeVar("Model", bound=BaseModel)

_KEY = re.compile(IDEMPOTENCY_KEY)
_QUERY = re.compile(rb"(?:limit=(\d{1,3}))?(?:(?:^|&)(before|after)=([1-9]\d{0,15}))?")


def fast(handler: FastHandler) -> Callable[[Endpoint], Endpoint]:
    """Marks a route's function."""

    def mark(endpoint: Endpoint) -> Endpoint:
        endpoint.fast = handler  # type: ignore[attr-defined]
        return endpoint

    return mark


class FastRoute(APIRoute):
    """Documented like any other; asks its fast handler first, if it has one."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        ordinary = super().get_route_handler()
        if not hasattr(self.endpoint, "fast"):
            return ordinary

        async def handle(request: Request) -> Response:
            return await self.endpoint.fast(request) or await ordinary(request)  # type: ignore[attr-defined]

        return handle


def path_id(request: Request, name: str) -> int:
    """An id out of the path; raises `NotFound` as the route does."""
    return parse_id(request.path_params[name])


def usual_key(request: Request) -> tuple[bool, str | None]:
    """Whether the Idempotency-Key is as it should be, and the key, if there is one."""
    key = request.headers.get("idempotency-key")
    return key is None or _KEY.fullmatch(key) is not None, key


async def usual_body(request: Request, model: type[Model]) -> Model | None:
    """The body, if it is JSON and valid."""
    if request.headers.get("content-type") != "application/json":
        return None
    try:
        return model.model_validate_json(await request.body())
    except ValidationError:
        return None


def usual_page(request: Request) -> Page | None:
    """The page of a history that is asked for, if it is one."""
    found = _QUERY.fullmatch(request.scope["query_string"])
    if found is None:
        return None
    limit, side, number = int(found[1] or PAGE_DEFAULT), found[2], int(found[3] or 0)
    if not 1 <= limit <= PAGE_MAX or number >= ID_LIMIT:
        return None
    return Page(limit, number if side == b"before" else None, number if side == b"after" else None)
