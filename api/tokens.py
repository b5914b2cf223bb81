"""Access tokens, and who a request comes from. Verifying one touches neither store.

A token is a JWT with one algorithm, HS256. It comes as `Authorization: Bearer …`, or, for the chat page, in an HttpOnly cookie; a browser
sends a cookie along whoever asked for the request, so with a cookie whatever changes something must come from our own page.

It names its sign-in (`sid`), and is refused once that has ended (`worker/ended.py`). One that names none is good until it expires.
The tokens of an outside identity provider are `api/outside.py`'s.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, NamedTuple, cast
from urllib.parse import urlsplit

import jwt
from fastapi import Depends, Request
from fastapi.responses import Response
from fastapi.security import OAuth2PasswordBearer
from fastapi.security.utils import get_authorization_scheme_param
from starlette.datastructures import State

from api.errors import Forbidden, Unauthorized
from worker.ended import EndedSignIns
from worker.keys import ID_LIMIT

ALGORITHM = "HS256"
ISSUER = "chatkeep"
AUDIENCE = "chatkeep-api"
PURPOSE = "access"
LEEWAY_SECONDS = 5
"""Clocks of two API hosts may differ by this much."""
COOKIE = "chatkeep_token"
REFRESH_COOKIE = "chatkeep_refresh"
REFRESH_PATH = "/api/auth/session"
"""The refresh token goes nowhere else."""
VERIFIED_MAX = 10_000
"""Verified tokens that are remembered: 300 bytes each, and 20 µs saved on every request."""
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True, slots=True)
class User:
    """Whoever sent the request, with which sign-in, and until when (Unix time)."""

    id: int
    sign_in: str | None = None
    expires: float = float("inf")


class Tokens:
    """Issues and verifies tokens with one secret."""

    def __init__(self, secret: str, lifetime_seconds: int) -> None:
        self._secret = secret
        self.lifetime_seconds = lifetime_seconds
        self._verified: dict[str, User] = {}

    def issue(self, user_id: int, sign_in: str | None = None) -> str:
        """A new token for this user, of this sign-in."""
        now = int(time.time())
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": str(user_id), "iat": now, "exp": now + self.lifetime_seconds, "typ": PURPOSE}
        return jwt.encode(claims | ({"sid": sign_in} if sign_in else {}), self._secret, algorithm=ALGORITHM)

    def verify(self, token: str) -> User | None:
        """Whose token this is; None for anything that we did not issue, or that has expired."""
        known = self._verified.get(token)
        if known is not None and known.expires > time.time():
            return known
        try:
            claims = jwt.decode(
                token,
                self._secret,
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                issuer=ISSUER,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "iat", "sub", "aud", "iss"], "strict_aud": True, "enforce_minimum_key_length": True},
            )
        except jwt.InvalidTokenError:
            return None
        user_id, sign_in = _user_id(claims["sub"]), claims.get("sid")
        if user_id is None or claims.get("typ") != PURPOSE or not (sign_in is None or isinstance(sign_in, str)):
            return None
        if len(self._verified) >= VERIFIED_MAX:
            del self._verified[next(iter(self._verified))]
        user = self._verified[token] = User(user_id, sign_in, float(claims["exp"]))
        return user


def _user_id(subject: str) -> int | None:
    if not (subject.isascii() and subject.isdigit() and len(subject) <= 16):
        return None
    number = int(subject)
    return number if 0 < number < ID_LIMIT and str(number) == subject else None


class _BearerOrCookie(OAuth2PasswordBearer):
    """The dependency behind `CurrentUser`; as a subclass of FastAPI's, it brings the "Authorize" button of the documentation."""

    async def __call__(self, request: Request) -> User:  # type: ignore[override]  # FastAPI's answers the bare token
        token, in_header = credentials(request)
        state = request.app.state
        user: User | None = state.tokens.verify(token) if token else None
        if user is None and in_header and token and state.outside is not None:
            return cast(User, await state.outside.user(token))
        if user is None or (user.sign_in is not None and await state.ended.has_ended(user.sign_in)):
            raise Unauthorized()
        return user


current_user = _BearerOrCookie(tokenUrl="/api/auth/token", auto_error=False)
CurrentUser = Annotated[User, Depends(current_user)]


class Credentials(NamedTuple):
    """What a request brings along to say whose it is; '' is nothing."""

    token: str
    in_header: bool


def credentials(request: Request) -> Credentials:
    """The token of the header or of the cookie; raises `Unauthorized` and `Forbidden`."""
    header = request.headers.get("authorization")
    if header is not None:
        scheme, token = get_authorization_scheme_param(header)
        if scheme.lower() != "bearer":
            raise Unauthorized()
        return Credentials(token, in_header=True)
    token = request.cookies.get(COOKIE, "")
    if token and request.method not in _SAFE_METHODS:
        require_own_page(request)
    return Credentials(token, in_header=False)


def user_at_once(state: State, given: Credentials) -> User | None:
    """Who `current_user` would answer, if it would have to ask nobody for that: for `api/fast.py`."""
    user: User | None = state.tokens.verify(given.token) if given.token else None
    if user is None:
        return cast(User | None, state.outside.known(given.token)) if given.in_header and state.outside is not None else None
    ended: EndedSignIns = state.ended
    if user.sign_in is not None and (ended.is_stale or ended.knows(user.sign_in)):
        return None
    return user


def require_own_page(request: Request) -> None:
    """Raises `Forbidden` unless the browser says that our own page asked for this."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        own = site == "same-origin"
    else:  # a browser without it, or a page opened over plain HTTP from another machine
        origin = urlsplit(request.headers.get("origin", "")).netloc
        own = bool(origin) and origin.lower() == request.headers.get("host", "").lower()
    if not own:
        raise Forbidden()


def set_cookies(request: Request, response: Response, token: str, seconds: int, refresh_token: str, refresh_seconds: int) -> None:
    """Hands both tokens to the browser, out of reach of any script."""
    secure = request.url.scheme == "https"
    response.set_cookie(COOKIE, token, max_age=seconds, path="/", secure=secure, httponly=True, samesite="lax")
    response.set_cookie(
        REFRESH_COOKIE, refresh_token, max_age=refresh_seconds, path=REFRESH_PATH, secure=secure, httponly=True, samesite="lax"
    )


def clear_cookies(request: Request, response: Response) -> None:
    """Takes them back."""
    for name, path in ((COOKIE, "/"), (REFRESH_COOKIE, REFRESH_PATH)):
        response.delete_cookie(name, path=path, secure=request.url.scheme == "https", httponly=True, samesite="lax")
