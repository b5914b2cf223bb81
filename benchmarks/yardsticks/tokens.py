"""The bearer token, checked the way FastAPI's tutorial does it."""

from __future__ import annotations

import os
from typing import Annotated

import jwt
from fastapi import Depends, HTTPException
from fastapi.security import OAuth2PasswordBearer

_SECRET = os.environ["JWT_SECRET"]
_bearer = OAuth2PasswordBearer(tokenUrl="/api/auth/token")


async def current_user_id(token: Annotated[str, Depends(_bearer)]) -> int:
    try:
        claims = jwt.decode(token, _SECRET, algorithms=["HS256"], audience="chatkeep-api", issuer="chatkeep")
    except jwt.InvalidTokenError:
        raise HTTPException(401, "not signed in") from None
    return int(claims["sub"])


UserId = Annotated[int, Depends(current_user_id)]
