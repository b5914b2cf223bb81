"""Accounts: sign up, sign in, stay so, sign out, who am I. For programs bearer tokens, for the chat page cookies with the same in them."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import structlog
from fastapi import APIRouter, Form, Request, status
from fastapi.responses import JSONResponse, Response

from api import metrics
from api.attempts import Attempts
from api.dependencies import CurrentUser, in_thread, settings_of
from api.errors import EmailTaken, Unauthorized, Unprocessable, problems
from api.schemas import Credentials, TokenOut, UserOut
from api.tokens import COOKIE, REFRESH_COOKIE, clear_cookies, require_own_page, set_cookies
from worker.accounts import Account, create_account, find_account, get_account
from worker.codec import rfc3339, to_microseconds
from worker.ended import EndedSignIns
from worker.pending import in_time
from worker.sign_ins import Copied, RefreshTokens, SignIn
from worker.text import is_unicode

log = structlog.get_logger(__name__)
router = APIRouter(prefix="/api/auth", tags=["accounts"])

Username = Annotated[str, Form(description="The e-mail address")]
PasswordField = Annotated[str, Form(json_schema_extra={"format": "password"})]
GrantType = Annotated[str | None, Form(pattern="^password$")]
RefreshField = Annotated[str, Form(json_schema_extra={"format": "password"})]
RefreshGrant = Annotated[str | None, Form(pattern="^refresh_token$")]


@router.post("/register", status_code=status.HTTP_201_CREATED, response_model=UserOut, responses=problems(409, 422, 429, 503))
async def register(request: Request, credentials: Credentials) -> UserOut:
    """Makes an account. The e-mail address is kept in lower case."""
    async with in_time():
        await _attempts(request).sign_up(request, credentials.email)
        password_hash = await request.app.state.passwords.hash(credentials.password.get_secret_value())
        account = await in_thread(request, partial(create_account, credentials.email, password_hash, _seconds(request)))
    if account is None:
        raise EmailTaken()
    return _public(account)


@router.post("/token", response_model=TokenOut, responses=problems(401, 422, 429, 503))
async def token(request: Request, username: Username, password: PasswordField, grant_type: GrantType = None) -> TokenOut:
    """Signs in a program (OAuth2 password flow)."""
    async with in_time():
        account = await _authenticate(request, username, password)
        return _tokens(request, await _begin(request, account))


@router.post("/refresh", response_model=TokenOut, responses=problems(401, 422, 503))
async def refresh(request: Request, refresh_token: RefreshField, grant_type: RefreshGrant = None) -> TokenOut:
    """Gives a program new tokens for its refresh token, which is thereby used up.

    One that was used before ends the sign-in: somebody has a copy of it.
    """
    return _tokens(request, await _renew(request, refresh_token))


@router.post("/logout", status_code=status.HTTP_204_NO_CONTENT, responses=problems(401, 422, 503))
async def logout(request: Request, user: CurrentUser) -> Response:
    """Signs a program out: neither of its tokens is good any more, and its streams end."""
    if user.sign_in is None:
        raise Unprocessable("This token belongs to no sign-in of ours; it is good until it expires.")
    await _end(request, user.id, user.sign_in)
    return Response(status_code=status.HTTP_204_NO_CONTENT)


@router.get("/me", response_model=UserOut, responses=problems(401, 503))
async def me(request: Request, user: CurrentUser) -> UserOut:
    """The account that the token belongs to."""
    account = await in_thread(request, partial(get_account, user.id, _seconds(request)))
    if account is None:
        raise Unauthorized()
    return _public(account)


@router.post("/session", response_model=UserOut, responses=problems(401, 403, 422, 429, 503))
async def sign_in(request: Request, username: Username, password: PasswordField, grant_type: GrantType = None) -> Response:
    """Signs in the chat page: the tokens go into HttpOnly cookies."""
    require_own_page(request)
    async with in_time():
        account = await _authenticate(request, username, password)
        begun = await _begin(request, account)
    return _with_cookies(request, JSONResponse(_public(account).model_dump()), begun)


@router.post("/session/refresh", status_code=status.HTTP_204_NO_CONTENT, responses=problems(401, 403, 503))
async def renew(request: Request) -> Response:
    """Gives the chat page new cookies for its refresh cookie."""
    require_own_page(request)
    renewed = await _renew(request, request.cookies.get(REFRESH_COOKIE, ""))
    return _with_cookies(request, Response(status_code=status.HTTP_204_NO_CONTENT), renewed)


@router.delete("/session", status_code=status.HTTP_204_NO_CONTENT, responses=problems(403, 503))
async def sign_out(request: Request) -> Response:
    """Signs the chat page out: neither of its tokens is good any more, its streams end, and the browser forgets the cookies."""
    require_own_page(request)
    user = request.app.state.tokens.verify(request.cookies.get(COOKIE, ""))
    if user is not None and user.sign_in is not None:
        await _end(request, user.id, user.sign_in)
    elif kept := await _renewed(request, request.cookies.get(REFRESH_COOKIE, "")):
        await _end(request, kept.user_id, kept.id)
    response = Response(status_code=status.HTTP_204_NO_CONTENT)
    clear_cookies(request, response)
    return response


async def _begin(request: Request, account: Account) -> SignIn:
    tokens: RefreshTokens = request.app.state.refresh_tokens
    made, ended = await in_thread(request, partial(tokens.begin, account.id, _seconds(request)))
    _ended(request).note(ended)
    return made


async def _renew(request: Request, refresh_token: str) -> SignIn:
    renewed = await _renewed(request, refresh_token)
    if renewed is None:
        raise Unauthorized("Sign in again: this refresh token is not good (any more).")
    return renewed


async def _renewed(request: Request, refresh_token: str) -> SignIn | None:
    tokens: RefreshTokens = request.app.state.refresh_tokens
    found = await in_thread(request, partial(tokens.renew, refresh_token, _seconds(request)))
    if not isinstance(found, Copied):
        return found
    metrics.SIGN_INS.labels("copied").inc()
    log.warning("refresh token used twice, sign-in ended")
    _ended(request).note([found.id])
    return None


async def _end(request: Request, user_id: int, sign_in_id: str) -> None:
    """In Postgres first: whoever is told of a failure is still signed in, as far as anybody can tell, and may repeat it."""
    await in_thread(request, partial(RefreshTokens.end, user_id, sign_in_id, _seconds(request)))
    await _ended(request).end(sign_in_id)


def _tokens(request: Request, sign_in: SignIn) -> TokenOut:
    tokens = request.app.state.tokens
    return TokenOut(access_token=tokens.issue(sign_in.user_id, sign_in.id), expires_in=tokens.lifetime_seconds, refresh_token=sign_in.token)


def _with_cookies(request: Request, response: Response, sign_in: SignIn) -> Response:
    issued = _tokens(request, sign_in)
    kept_seconds = request.app.state.refresh_tokens.lifetime_seconds
    set_cookies(request, response, issued.access_token, issued.expires_in, issued.refresh_token, kept_seconds)
    return response


def _ended(request: Request) -> EndedSignIns:
    ended: EndedSignIns = request.app.state.ended
    return ended


async def _authenticate(request: Request, username: str, password: str) -> Account:
    """The account; for anything that is wrong the same answer, after the same work."""
    address = username.lower() if "\x00" not in username and is_unicode(username) else ""
    await _attempts(request).sign_in(request, username.lower())
    account = await in_thread(request, partial(find_account, address, _seconds(request)))
    right = await request.app.state.passwords.verify(password, account.password_hash if account else None)
    if account is None or not right:
        metrics.SIGN_INS.labels("refused").inc()
        raise Unauthorized("Wrong e-mail address or password.")
    await _attempts(request).signed_in(username.lower())
    metrics.SIGN_INS.labels("accepted").inc()
    return account


def _attempts(request: Request) -> Attempts:
    attempts: Attempts = request.app.state.attempts
    return attempts


def _seconds(request: Request) -> float:
    return settings_of(request).postgres_timeout_seconds


def _public(account: Account) -> UserOut:
    return UserOut(id=account.id, email=account.email, created_at=rfc3339(to_microseconds(account.created_at)))
