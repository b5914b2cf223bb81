"""Accounts, tokens and the page's cookie."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable
from contextlib import closing
from importlib import import_module
from typing import Any

import jwt
import psycopg2
import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from starlette.testclient import TestClient

from api import tokens
from api.app import create_app
from api.passwords import Busy, Passwords
from api.tokens import ALGORITHM, AUDIENCE, COOKIE, ISSUER, PURPOSE, REFRESH_COOKIE, Tokens
from tests.api.conftest import EMAIL, PASSWORD
from tests.processes import frozen_server
from worker.embedded import EmbeddedPostgres
from worker.settings import Settings, get_settings

REGISTER, TOKEN, ME, SESSION = "/api/auth/register", "/api/auth/token", "/api/auth/me", "/api/auth/session"
OWN_PAGE = {"Sec-Fetch-Site": "same-origin"}
FORM = {"username": EMAIL, "password": PASSWORD}
JSON = {"Content-Type": "application/json"}
BAD_ADDRESSES = (
    *("", "ann", "ann@", "@example.org", "ann@example", "ann@@example.org", "ann@example..org", "ann@-example.org", "ann@example.org."),
    *(" ann@example.org", "ann@example.org\n", "ann @example.org", "ann@exa mple.org", ".ann@example.org", "a..n@example.org"),
    *("änn@example.org", "ann@exämple.org", "ann\x00@example.org", "\ud800@example.org", "a" * 65 + "@example.org"),
    *("ann@" + "a.b" * 90 + ".org", "<ann@example.org>", 'ann"@example.org', None, 1, ["ann@example.org"], True),
)


class TestRegister:
    def test_new_account_has_the_contracts_shape(self, client: TestClient) -> None:
        answer = client.post(REGISTER, json={"email": "Ann@Example.ORG", "password": PASSWORD})
        assert answer.status_code == 201
        assert set(answer.json()) == {"id", "email", "created_at"}
        assert answer.json()["email"] == "ann@example.org"
        assert len(answer.json()["created_at"]) == len("2026-11-20T09:30:00.000000Z")

    def test_address_is_taken_in_any_case(self, client: TestClient, bearer: dict[str, str]) -> None:
        answer = client.post(REGISTER, json={"email": EMAIL.upper(), "password": "another password"})
        assert (answer.status_code, answer.headers["content-type"]) == (409, "application/problem+json")

    def test_who_has_waited_for_a_hash_is_answered_in_time_while_postgres_is_frozen(
        self, client: TestClient, postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def hash_in_a_crowd(_: Passwords, __: str) -> str:
            await asyncio.sleep(1)
            return "hash"

        monkeypatch.setattr(Passwords, "hash", hash_in_a_crowd)
        with frozen_server(postgres):
            started = time.monotonic()
            answer = client.post(REGISTER, json={"email": EMAIL, "password": PASSWORD})
            seconds = time.monotonic() - started
        assert answer.status_code == 503
        assert seconds < 2.4, "1.9 s, and not a second for the one and nearly two for the other"

    def test_bad_address_is_refused(self, client: TestClient) -> None:
        for email in BAD_ADDRESSES:
            answer = client.post(REGISTER, content=json.dumps({"email": email, "password": PASSWORD}), headers=JSON)
            assert (email, answer.status_code) == (email, 422)
            assert answer.json()["errors"][0]["loc"] == ["body", "email"]

    def test_good_address_is_taken(self, client: TestClient) -> None:
        for email in ("a@b.co", "first.last+tag@sub.example.org", "o'hara@example.org", "x" * 64 + "@example.org"):
            assert client.post(REGISTER, json={"email": email, "password": PASSWORD}).status_code == 201

    def test_bad_password_is_refused_and_not_repeated(self, client: TestClient) -> None:
        for password in ("", "1234567", "x" * 129, "has a \x00 in it", "lone \udc00 surrogate", 12345678, None, ["12345678"]):
            answer = client.post(REGISTER, content=json.dumps({"email": EMAIL, "password": password}), headers=JSON)
            assert (password, answer.status_code) == (password, 422)
            assert answer.json()["errors"][0]["loc"] == ["body", "password"]
            assert not isinstance(password, str) or not password or password not in answer.text

    def test_password_works_exactly_as_it_was_given(self, client: TestClient) -> None:
        for number, password in enumerate(("12345678", "x" * 128, "пароль с пробелом", "🔑" * 128, " leading and trailing ")):
            email = f"user{number}@example.org"
            assert client.post(REGISTER, json={"email": email, "password": password}).status_code == 201
            assert client.post(TOKEN, data={"username": email, "password": password}).status_code == 200
            assert client.post(TOKEN, data={"username": email, "password": password + " "}).status_code == 401

    def test_password_is_kept_as_argon2id(self, client: TestClient, bearer: dict[str, str], database_url: str) -> None:
        (stored,) = _as_owner(database_url, 'SELECT password_hash FROM "user"')
        assert stored.startswith("$argon2id$v=19$m=19456,t=2,p=1$")


class TestToken:
    def test_answer_has_the_contracts_shape(self, client: TestClient, bearer: dict[str, str]) -> None:
        answer = client.post(TOKEN, data={**FORM, "grant_type": "password", "scope": ""})
        assert answer.status_code == 200
        assert set(answer.json()) == {"access_token", "token_type", "expires_in", "refresh_token"}
        assert answer.json()["token_type"] == "bearer"
        assert answer.json()["expires_in"] == 900
        assert answer.headers["cache-control"] == "no-store"

    def test_lifetime_is_the_settings(self, settings: Settings) -> None:
        with TestClient(create_app(settings.model_copy(update={"access_token_seconds": 86400}))) as client:
            client.post(REGISTER, json={"email": EMAIL, "password": PASSWORD})
            answer = client.post(TOKEN, data=FORM).json()
        claims = jwt.decode(answer["access_token"], options={"verify_signature": False})
        assert answer["expires_in"] == claims["exp"] - claims["iat"] == 86400

    def test_unknown_user_is_answered_like_a_wrong_password(self, client: TestClient, bearer: dict[str, str]) -> None:
        wrong = client.post(TOKEN, data={"username": EMAIL, "password": "wrong password"})
        for username in ("nobody@example.org", "\x00", "ann@example.org\x00", "x" * 100_000, "not an address"):
            unknown = client.post(TOKEN, data={"username": username, "password": PASSWORD})
            assert wrong.status_code == unknown.status_code == 401
            assert wrong.content == unknown.content
            assert wrong.headers["www-authenticate"] == unknown.headers["www-authenticate"] == "Bearer"

    def test_unknown_user_costs_as_much_work_as_a_wrong_password(self, client: TestClient, bearer: dict[str, str]) -> None:
        """By the processor's time of this process, which others on the machine hardly change."""
        least = dict.fromkeys((EMAIL, "nobody@example.org"), float("inf"))
        for _ in range(8):
            for username in least:
                started = time.process_time()
                assert client.post(TOKEN, data={"username": username, "password": "wrong password"}).status_code == 401
                least[username] = min(least[username], time.process_time() - started)
        known, unknown = least.values()
        assert 0.6 < unknown / known < 1.6

    def test_incomplete_form_is_refused(self, client: TestClient) -> None:
        for form in ({}, {"username": EMAIL}, {"password": PASSWORD}, {**FORM, "grant_type": "client_credentials"}):
            assert client.post(TOKEN, data=form).status_code == 422

    def test_json_is_no_form(self, client: TestClient, bearer: dict[str, str]) -> None:
        assert client.post(TOKEN, json=FORM).status_code == 422


class TestMe:
    def test_tells_who_it_is(self, client: TestClient, bearer: dict[str, str]) -> None:
        answer = client.get(ME, headers=bearer)
        assert answer.status_code == 200
        assert answer.json()["email"] == EMAIL

    def test_deleted_user_is_nobody(self, client: TestClient, bearer: dict[str, str], database_url: str) -> None:
        assert _as_owner(database_url, 'DELETE FROM "user" RETURNING email') == (EMAIL,)
        assert client.get(ME, headers=bearer).status_code == 401

    def test_without_a_token_it_is_nobody(self, client: TestClient) -> None:
        for header in (None, "", "Bearer", "Bearer ", "Basic YTpi", "Token x", "Bearer x", "Bearer a.b.c", "Bearer \xff.\xff.\xff"):
            answer = client.get(ME, headers=[] if header is None else [(b"Authorization", header.encode("latin-1"))])
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["content-type"] == "application/problem+json"

    def test_scheme_is_taken_in_any_case(self, client: TestClient, bearer: dict[str, str]) -> None:
        assert client.get(ME, headers={"Authorization": bearer["Authorization"].replace("Bearer", "bEARER")}).status_code == 200

    def test_verifying_a_token_does_not_need_postgres(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        import_module("worker.app")  # it keeps the settings that it was made with
        monkeypatch.setenv("DATABASE_URL", "postgresql://nobody:nothing@127.0.0.1:1/nowhere")
        get_settings.cache_clear()
        with TestClient(create_app(get_settings())) as client:
            token = Tokens(settings.jwt_secret.get_secret_value(), 600).issue(1)
            good, bad = (client.get(ME, headers={"Authorization": f"Bearer {one}"}) for one in (token, token[:-2]))
        assert bad.status_code == 401
        assert (good.status_code, int(good.headers["retry-after"]) > 0) == (503, True)


def _claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "1", "iat": now, "exp": now + 600, "typ": PURPOSE}
    return {name: value for name, value in (claims | changes).items() if value is not None}


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


SECRET = "a-test-of-tokens-only-3f9c1e7b5d2a"


def _refused(token: str) -> bool:
    return Tokens(SECRET, 600).verify(token) is None


class TestForgedTokens:
    """Each is one change away from a token that is accepted."""

    def test_what_they_start_from_is_accepted(self) -> None:
        user = Tokens(SECRET, 600).verify(jwt.encode(_claims(), SECRET, ALGORITHM))
        assert user is not None
        assert user.id == 1

    def test_they_are_401_over_http(self, settings: Settings) -> None:
        client = TestClient(create_app(settings.model_copy(update={"jwt_secret": SecretStr(SECRET)})))
        for token in (jwt.encode(_claims(exp=None), SECRET, ALGORITHM), jwt.encode(_claims(), SECRET + "x", ALGORITHM)):
            answer = client.post("/api/conversations/", json={}, headers={"Authorization": f"Bearer {token}"})
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")

    @pytest.mark.parametrize("claim", ["exp", "iat", "sub", "aud", "iss", "typ"])
    def test_missing_claim(self, claim: str) -> None:
        assert _refused(jwt.encode(_claims(**{claim: None}), SECRET, ALGORITHM))

    @pytest.mark.parametrize(
        "changes",
        [
            *({"aud": "another-api"}, {"aud": [AUDIENCE, "another-api"]}, {"iss": "another"}, {"typ": "refresh"}, {"typ": True}),
            *(
                {"exp": int(time.time()) - 6},
                {"exp": "never"},
                {"exp": float("inf")},
                {"iat": int(time.time()) + 3600},
                {"nbf": int(time.time()) + 3600},
            ),
            *(
                {"sub": "0"},
                {"sub": "-1"},
                {"sub": "01"},
                {"sub": "1.0"},
                {"sub": " 1"},
                {"sub": "１"},
                {"sub": ""},
                {"sub": str(1 << 53)},
                {"sub": "9" * 5000},
            ),
        ],
    )
    def test_wrong_claim(self, changes: dict[str, Any]) -> None:
        assert _refused(jwt.encode(_claims(**changes), SECRET, ALGORITHM))

    def test_subject_that_is_no_string(self) -> None:
        signed = jwt.api_jws.PyJWS().encode(json.dumps(_claims() | {"sub": 1}).encode(), SECRET, ALGORITHM)
        assert _refused(signed)

    @pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "nOnE", ""])
    def test_no_signature(self, algorithm: str) -> None:
        head = _b64(json.dumps({"alg": algorithm, "typ": "JWT"}).encode())
        assert _refused(f"{head}.{_b64(json.dumps(_claims()).encode())}.")

    @pytest.mark.parametrize("algorithm", ["HS384", "HS512"])
    @pytest.mark.filterwarnings("ignore::jwt.InsecureKeyLengthWarning")
    def test_other_algorithm_with_our_secret(self, algorithm: str) -> None:
        assert _refused(jwt.encode(_claims(), SECRET, algorithm))

    def test_other_secret(self) -> None:
        assert _refused(jwt.encode(_claims(), SECRET + "x", ALGORITHM))

    @pytest.mark.parametrize("header", [{"jku": "http://127.0.0.1:1/"}, {"kid": "../../dev/null"}, {"jwk": {"kty": "oct", "k": "AA"}}])
    def test_header_cannot_bring_a_key_along(self, header: dict[str, Any]) -> None:
        assert _refused(jwt.encode(_claims(), "the attacker's own key, long enough", ALGORITHM, headers=header))

    def test_edited_payload(self) -> None:
        head, _, signature = jwt.encode(_claims(), SECRET, ALGORITHM).split(".")
        assert _refused(f"{head}.{_b64(json.dumps(_claims(sub='2')).encode())}.{signature}")

    @pytest.mark.parametrize(
        "change", [lambda t: t[:-3], lambda t: t + "AAAA", lambda t: t + ".", lambda t: "." + t, lambda t: t.replace(".", "", 1)]
    )
    def test_edited_token(self, change: Callable[[str], str]) -> None:
        assert _refused(change(jwt.encode(_claims(), SECRET, ALGORITHM)))

    def test_token_expires_although_it_was_verified_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokens, "LEEWAY_SECONDS", 0)
        verifier = Tokens(SECRET, 600)
        expiry = int(time.time()) + 2
        token = jwt.encode(_claims(exp=expiry), SECRET, ALGORITHM)
        assert verifier.verify(token) is not None
        time.sleep(expiry + 0.1 - time.time())
        assert verifier.verify(token) is None

    def test_remembers_a_bounded_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokens, "VERIFIED_MAX", 3)
        verifier = Tokens(SECRET, 600)
        for user_id in range(1, 10):
            assert verifier.verify(verifier.issue(user_id)) is not None
        assert len(verifier._verified) == 3

    def test_remembers_nothing_that_was_refused(self) -> None:
        verifier = Tokens(SECRET, 600)
        verifier.verify(jwt.encode(_claims(typ="refresh"), SECRET, ALGORITHM))
        assert verifier._verified == {}


class TestCookie:
    @pytest.fixture
    def signed_in(self, client: TestClient, bearer: dict[str, str]) -> TestClient:
        assert client.post(SESSION, data=FORM, headers=OWN_PAGE).status_code == 200
        return client

    def test_signing_in_sets_a_cookie_that_scripts_cannot_read(self, client: TestClient, bearer: dict[str, str]) -> None:
        answer = client.post(SESSION, data=FORM, headers=OWN_PAGE)
        assert answer.json()["email"] == EMAIL
        for cookie, path, seconds in ((COOKIE, "/", 900), (REFRESH_COOKIE, SESSION, 30 * 86400)):
            (told,) = [one for one in answer.headers.get_list("set-cookie") if one.startswith(cookie + "=")]
            attributes = set(told.lower().split("; ")[1:])
            assert attributes == {"httponly", "samesite=lax", f"path={path}", f"max-age={seconds}"}
            assert told.split("=")[1].split(";")[0] not in answer.text

    def test_cookie_is_secure_over_https(self, app: FastAPI) -> None:
        with TestClient(app, base_url="https://chat.example.org") as client:
            client.post(REGISTER, json={"email": EMAIL, "password": PASSWORD})
            answer = client.post(SESSION, data=FORM, headers=OWN_PAGE)
        assert all("secure" in told.lower().split("; ") for told in answer.headers.get_list("set-cookie"))

    def test_wrong_password_sets_none(self, client: TestClient, bearer: dict[str, str]) -> None:
        answer = client.post(SESSION, data={"username": EMAIL, "password": "wrong password"}, headers=OWN_PAGE)
        assert answer.status_code == 401
        assert "set-cookie" not in answer.headers

    def test_reads_with_the_cookie(self, signed_in: TestClient) -> None:
        assert signed_in.get(ME).status_code == 200

    def test_writes_with_the_cookie_only_from_our_own_page(self, signed_in: TestClient) -> None:
        cases: tuple[tuple[dict[str, str], int], ...] = (
            ({}, 403),
            ({"Sec-Fetch-Site": "same-origin"}, 201),
            ({"Sec-Fetch-Site": "cross-site"}, 403),
            ({"Sec-Fetch-Site": "same-site"}, 403),
            ({"Sec-Fetch-Site": "none"}, 403),
            ({"Sec-Fetch-Site": "cross-site", "Origin": "http://testserver"}, 403),
            ({"Origin": "http://testserver"}, 201),
            ({"Origin": "http://testserver:8080"}, 403),
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "http://testserver.evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Origin": ""}, 403),
        )
        for headers, status in cases:
            answer = signed_in.post("/api/conversations/", json={}, headers=headers)
            assert (headers, answer.status_code) == (headers, status)

    @pytest.mark.parametrize("method", ["POST", "DELETE"])
    def test_other_sites_can_neither_sign_in_nor_out(self, client: TestClient, bearer: dict[str, str], method: str) -> None:
        answer = client.request(method, SESSION, data=FORM if method == "POST" else None, headers={"Sec-Fetch-Site": "cross-site"})
        assert answer.status_code == 403
        assert "set-cookie" not in answer.headers

    def test_bearer_needs_no_origin_even_beside_a_cookie(self, signed_in: TestClient, bearer: dict[str, str]) -> None:
        assert signed_in.post("/api/conversations/", json={}, headers=bearer).status_code == 201

    def test_wrong_header_is_not_saved_by_a_cookie(self, signed_in: TestClient) -> None:
        assert signed_in.get(ME, headers={"Authorization": "Bearer x"}).status_code == 401

    def test_signing_out_takes_the_cookie_back(self, signed_in: TestClient) -> None:
        assert signed_in.delete(SESSION, headers=OWN_PAGE).status_code == 204
        assert signed_in.get(ME).status_code == 401


class TestPasswords:
    def test_too_many_at_once_are_refused(self) -> None:
        async def rush() -> list[Any]:
            passwords = Passwords(threads=1, wait_seconds=0.01)
            return await asyncio.gather(*(passwords.hash("x" * 8) for _ in range(20)), return_exceptions=True)

        results = asyncio.run(rush())
        assert any(isinstance(result, str) for result in results)
        assert any(isinstance(result, Busy) for result in results)

    def test_the_event_loop_goes_on_meanwhile(self) -> None:
        async def turns_of_the_loop() -> int:
            task = asyncio.create_task(Passwords(threads=1).hash("x" * 8))
            turns = 0
            while not task.done():
                await asyncio.sleep(0)
                turns += 1
            return turns

        assert asyncio.run(turns_of_the_loop()) > 10

    def test_nobody_has_no_password(self) -> None:
        async def verify() -> tuple[bool, bool]:
            passwords = Passwords(threads=1)
            await passwords.start()
            return await passwords.verify("", None), await passwords.verify("\ud800", await passwords.hash("x" * 8))

        assert asyncio.run(verify()) == (False, False)


def _as_owner(database_url: str, statement: str) -> tuple[Any, ...] | None:
    """The only row of a statement that the product itself may not run."""
    with closing(psycopg2.connect(database_url)) as connection, connection, connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchone()
