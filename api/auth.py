"""Accounts: sign up, sign in, who am I. For programs a bearer token, for the chat page a cookie with the same token in it."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Form, Request, status
from fastapi.responses import JSONResponse, Response

from api import metrics
from api.dependencies import CurrentUser, in_thread, settings_of
from api.errors import EmailTaken, Unauthorized, problems
from api.schemas import Credentials, TokenOut, UserOut
from api.tokens import clear_cookie, require_own_page, set_cookie
from worker.accounts import Account, create_account, find_account, get_account
from worker.codec import rfc3339, to_microseconds
from worker.text import is_unicode

router = APIRouter(prefix="/api/auth", tags=["accounts"])

Username = Annotated[str, Form(description="The e-mail address")]
PasswordField = Annotated[str, Form(json_schema_extra={"format": "password"})]
GrantType = Annotated[str | None, Form(pattern="^password$")]


@router.post("/register", status_code=status.HTTP_201_CREATED, response_model=UserOut, responses=problems(409, 422, 503))
async def register(request: Request, credentials: Credentials) -> UserOut:
    """Makes an account. The e-mail address is kept in lower case."""
    password_hash = await request.app.state.passwords.hash(credentials.password.get_secret_value())
    account = await in_thread(request, partial(create_account, credentials.email, password_hash, _seconds(request)))
    if account is None:
        raise EmailTaken()
    return _public(account)


@router.post("/token", response_model=TokenOut, responses=problems(401, 422, 503))
async def token(request: Request, username: Username, password: PasswordField, grant_type: GrantType = None) -> TokenOut:
    """Signs in a program (OAuth2 password flow)."""
    account = await _authenticate(request, username, password)
    tokens = request.app.state.tokens
    return TokenOut(access_token=tokens.issue(account.id), expires_in=tokens.lifetime_seconds)


@router.get("/me", response_model=UserOut, responses=problems(401, 503))
async def me(request: Request, user: CurrentUser) -> UserOut:
    """The account that the token belongs to."""
    account = await in_thread(request, partial(get_account, user.id, _seconds(request)))
    if account is None:
        raise Unauthorized()
    return _public(account)


@router.post("/session", response_model=UserOut, responses=problems(401, 403, 422, 503))
async def sign_in(request: Request, username: Username, password: PasswordField, grant_type: GrantType = None) -> Response:
    """Signs in the chat page: the token goes into an HttpOnly cookie."""
    require_own_page(request)
    account = await _authenticate(request, username, password)
    response = JSONResponse(_public(account).model_dump())
    tokens = request.app.state.tokens
    set_cookie(request, response, tokens.issue(account.id), tokens.lifetime_seconds)
    return response


@router.delete("/session", status_code=status.HTTP_204_NO_CONTENT, responses=problems(403))
async def sign_out(request: Request) -> Response:
    """Signs the chat page out: the browser forgets the token."""
    require_own_page(request)
    response = Response(status_code=status.HTTP_204_NO_CONTENT)
    clear_cookie(request, response)
    return response


async def _authenticate(request: Request, username: str, password: str) -> Account:
    """The account; for anything that is wrong the same answer, after the same work."""
    address = username.lower() if "\x00" not in username and is_unicode(username) else ""
    account = await in_thread(request, partial(find_account, address, _seconds(request)))
    right = await request.app.state.passwords.verify(password, account.password_hash if account else None)
    if account is None or not right:
        metrics.SIGN_INS.labels("refused").inc()
        raise Unauthorized("Wrong e-mail address or password.")
    metrics.SIGN_INS.labels("accepted").inc()
    return account


def _seconds(request: Request) -> float:
    return settings_of(request).postgres_timeout_seconds


def _public(account: Account) -> UserOut:
    return UserOut(id=account.id, email=account.email, created_at=rfc3339(to_microseconds(account.created_at)))
