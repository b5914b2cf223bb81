"""Tokens of an outside identity provider: believed for their signature only, and their users are nobody else's."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import jwt
import pytest
import redis as redis_py
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import ValidationError
from starlette.testclient import TestClient

from api import outside
from api.app import create_app
from api.tokens import COOKIE
from tests import core
from tests.api.conftest import sign_up
from tests.api.provider import AUDIENCE, DISCOVERY, KEYS, Key, Provider, provider
from tests.api.test_errors import assert_problem
from worker import keys
from worker.accounts import outside_account
from worker.settings import Settings

ME, CONVERSATIONS = "/api/auth/me", "/api/conversations/"


@pytest.fixture(scope="module")
def running() -> Iterator[Provider]:
    with provider() as found:
        yield found


@pytest.fixture
def idp(running: Provider) -> Iterator[Provider]:
    before = dict(vars(running))
    running.asked.clear()
    yield running
    running.open.set()
    vars(running).update(before)


@pytest.fixture
def settings(settings: Settings, idp: Provider) -> Settings:
    return settings.model_copy(update={"oidc_issuer": idp.issuer, "oidc_audience": AUDIENCE})


def ask(client: TestClient, token: str, path: str = ME) -> httpx2.Response:
    return client.get(path, headers=bearer(token))


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


class TestUsers:
    def test_user_appears_on_first_use(self, client: TestClient, idp: Provider) -> None:
        made = client.post(CONVERSATIONS, json={"title": "mine"}, headers=bearer(idp.token()))
        assert made.status_code == 201
        me = ask(client, idp.token(jti="another token")).json()
        assert (me["id"], me["email"]) == (made.json()["user_id"], None)
        assert core.ask('SELECT id, email, password_hash, issuer, subject FROM "user"') == [(me["id"], None, None, idp.issuer, "ann")]

    def test_each_subject_is_somebody(self, client: TestClient, idp: Provider) -> None:
        ids = [ask(client, idp.token(sub=subject)).json()["id"] for subject in ("ann", "bob", "Ann", "ann ", "änn", "ann")]
        assert ids[0] == ids[-1]
        assert len(set(ids)) == 5

    def test_what_is_one_users_is_not_anothers(self, client: TestClient, idp: Provider) -> None:
        theirs = client.post(CONVERSATIONS, json={}, headers=bearer(idp.token())).json()["id"]
        assert_problem(ask(client, idp.token(sub="bob"), f"{CONVERSATIONS}{theirs}"), 404)

    def test_equal_address_takes_no_account_over(self, client: TestClient, idp: Provider) -> None:
        email = "ann@example.org"
        local = client.get(ME, headers=sign_up(client, email)).json()
        for named in ({"sub": email}, {"email": email, "email_verified": True}, {"sub": str(local["id"])}):
            me = ask(client, idp.token(**named)).json()
            assert (me["id"] != local["id"], me["email"]) == (True, None)
        assert client.post("/api/auth/token", data={"username": email, "password": "correct horse battery"}).status_code == 200

    def test_same_subject_of_another_issuer_is_somebody_else(self, settings: Settings) -> None:
        assert outside_account("https://one.example", "ann", 10) != outside_account("https://two.example", "ann", 10)
        assert outside_account("https://one.example", "ann", 10) == outside_account("https://one.example", "ann", 10)

    def test_known_user_needs_no_postgres(self, client: TestClient, idp: Provider, redis_url: str) -> None:
        ask(client, idp.token())
        with redis_py.Redis.from_url(redis_url) as redis:
            (name,) = redis.scan_iter(f"{keys.OUTSIDE}*")
            assert 0 < redis.ttl(name) <= outside.KNOWN_SECONDS
            assert b"ann" not in name
            redis.set(name, 4711)
        assert client.post(CONVERSATIONS, json={}, headers=bearer(idp.token(jti="new"))).json()["user_id"] == 4711

    def test_signing_out_is_the_providers(self, client: TestClient, idp: Provider) -> None:
        assert_problem(client.post("/api/auth/logout", headers=bearer(idp.token())), 422)


class TestGoodTokens:
    @pytest.mark.parametrize("algorithm", ["RS256", "RS512", "PS256", "ES256", "EdDSA"])
    def test_algorithms_with_a_public_key(self, settings: Settings, idp: Provider, algorithm: str) -> None:
        key = Key("another", algorithm)
        idp.keys = [idp.key.jwk, key.jwk]
        with TestClient(create_app(settings)) as client:
            assert ask(client, idp.token(key)).status_code == 200
            assert ask(client, idp.token()).status_code == 200

    def test_one_of_several_audiences(self, client: TestClient, idp: Provider) -> None:
        assert ask(client, idp.token(aud=["another", AUDIENCE])).status_code == 200

    @pytest.mark.parametrize("algorithm", ["RS384", "ES256"])
    def test_key_that_does_not_name_its_algorithm_or_itself(self, settings: Settings, idp: Provider, algorithm: str) -> None:
        key = Key("x", algorithm)
        idp.keys = [{name: value for name, value in key.jwk.items() if name not in ("alg", "kid", "use")}]
        with TestClient(create_app(settings)) as client:
            assert ask(client, idp.token(key, header={"kid": None})).status_code == 200

    def test_our_own_tokens_are_good_beside_them(self, client: TestClient, idp: Provider, bearer: dict[str, str]) -> None:
        assert client.get(ME, headers=bearer).json()["email"] == "ann@example.org"


class TestForgedTokens:
    """Each is one change away from a token that is accepted."""

    @pytest.mark.parametrize(
        "changes",
        [
            *({"aud": "another"}, {"aud": None}, {"aud": []}, {"iss": "https://another.example"}, {"iss": None}),
            *({"exp": None}, {"exp": 1}, {"exp": "never"}, {"nbf": 1 << 40}, {"iat": 1 << 40}),
            *({"sub": None}, {"sub": ""}, {"sub": "x" * 256}, {"sub": "a\x00b"}, {"sub": "\ud800"}),
        ],
        ids=str,
    )
    def test_wrong_claim(self, client: TestClient, idp: Provider, changes: dict[str, Any]) -> None:
        assert_problem(ask(client, idp.token(**changes)), 401)
        assert core.ask('SELECT count(*) FROM "user"') == [(0,)]

    def test_issuer_with_a_slash_more_is_another(self, client: TestClient, idp: Provider) -> None:
        assert_problem(ask(client, idp.token(iss=idp.issuer + "/")), 401)

    @pytest.mark.parametrize("named", [{}, {"kid": "first"}, {"kid": None}, {"jku": "http://127.0.0.1:1/keys"}], ids=str)
    def test_another_key(self, client: TestClient, idp: Provider, named: dict[str, Any]) -> None:
        assert_problem(ask(client, idp.token(Key("strangers"), header=named)), 401)

    def test_key_that_the_token_brings_along(self, client: TestClient, idp: Provider) -> None:
        key = Key("first")
        assert_problem(ask(client, idp.token(key, header={"jwk": key.jwk})), 401)

    @pytest.mark.parametrize("name", ["first", None])
    @pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
    def test_public_key_as_a_secret(self, client: TestClient, idp: Provider, algorithm: str, name: str | None) -> None:
        public = idp.key.private.public_key()
        for secret in (public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), idp.key.jwk["n"].encode()):
            signed = _sign_as_hmac(idp.claims(), secret, algorithm, name)
            assert_problem(ask(client, signed), 401)

    def test_secret_among_the_keys_signs_nothing(self, settings: Settings, idp: Provider) -> None:
        secret = b"a secret that is long enough for every algorithm that there is"
        jwk = {"kty": "oct", "k": jwt.utils.base64url_encode(secret).decode(), "kid": "s", "alg": "HS256", "use": "sig"}
        idp.keys = [idp.key.jwk, jwk]
        with TestClient(create_app(settings)) as client:
            assert_problem(ask(client, _sign_as_hmac(idp.claims(), secret, "HS256", "s")), 401)
            assert ask(client, idp.token()).status_code == 200

    @pytest.mark.parametrize("algorithm", ["none", "None", ""])
    def test_no_signature(self, client: TestClient, idp: Provider, algorithm: str) -> None:
        _, payload, _ = idp.token().split(".")
        head = jwt.utils.base64url_encode(b'{"alg":"%s","kid":"first"}' % algorithm.encode()).decode()
        assert_problem(ask(client, f"{head}.{payload}."), 401)

    def test_other_algorithm_than_the_keys(self, client: TestClient, idp: Provider) -> None:
        key = Key("first", "RS384")
        key.private = idp.key.private
        assert_problem(ask(client, idp.token(key)), 401)

    def test_key_that_is_for_encryption(self, settings: Settings, idp: Provider) -> None:
        key = Key("e", use="enc")
        idp.keys = [idp.key.jwk, key.jwk]
        with TestClient(create_app(settings)) as client:
            assert_problem(ask(client, idp.token(key)), 401)

    def test_our_secret_signs_nothing_of_theirs(self, client: TestClient, settings: Settings, idp: Provider) -> None:
        secret = settings.jwt_secret.get_secret_value()
        assert_problem(ask(client, jwt.encode(idp.claims(sub="1", typ="access"), secret, "HS256")), 401)

    def test_not_in_a_cookie(self, client: TestClient, idp: Provider) -> None:
        client.cookies.set(COOKIE, idp.token())
        assert_problem(client.get(ME), 401)

    def test_expires_although_it_was_verified_before(self, client: TestClient, idp: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(outside, "LEEWAY_SECONDS", 0)
        token = idp.token(exp=int(time.time()) + 2)
        assert ask(client, token).status_code == 200
        time.sleep(2.1)
        assert_problem(ask(client, token), 401)


class TestKeys:
    def test_they_are_fetched_once(self, client: TestClient, idp: Provider) -> None:
        for number in range(5):
            assert ask(client, idp.token(jti=str(number))).status_code == 200
        assert idp.asked == [DISCOVERY, KEYS]

    def test_new_key_is_fetched_but_not_for_every_stranger(
        self, client: TestClient, idp: Provider, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert ask(client, idp.token()).status_code == 200
        second = Key("second")
        idp.keys = [second.jwk]
        monkeypatch.setattr(outside, "PAUSE_SECONDS", 0.0)
        assert ask(client, idp.token(second)).status_code == 200
        assert_problem(ask(client, idp.token(jti="of the key that was taken back")), 401)
        monkeypatch.setattr(outside, "PAUSE_SECONDS", 30.0)
        idp.asked.clear()
        for number in range(20):
            assert_problem(ask(client, idp.token(Key("third", "ES256"), jti=str(number))), 401)
        assert idp.asked == []

    @pytest.mark.parametrize("trouble", ["status", "hangs", "issuer", "no keys", "too long", "not json", "elsewhere"])
    def test_without_keys_it_says_so_in_time(
        self, settings: Settings, idp: Provider, trouble: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        good = idp.document, idp.keys
        if trouble == "hangs":
            idp.open.clear()
        changes: dict[str, dict[str, Any]] = {
            "status": {"status": 500},
            "issuer": {"document": idp.document | {"issuer": "https://another.example"}},
            "no keys": {"keys": []},
            "too long": {"keys": [idp.key.jwk, {"x": "x" * outside.ANSWER_BYTES_MAX}]},
            "not json": {"document": "text"},
            "elsewhere": {"document": idp.document | {"jwks_uri": "http://127.0.0.1:1/keys"}},
        }
        vars(idp).update(changes.get(trouble, {}))
        with TestClient(create_app(settings), raise_server_exceptions=False) as client:
            started = time.monotonic()
            answer = ask(client, idp.token())
            assert time.monotonic() - started < 2
            assert_problem(answer, 503)
            assert answer.headers["retry-after"] == "2"
            assert_problem(ask(client, "x"), 401)
            idp.document, idp.keys, idp.status = *good, 200
            idp.open.set()
            monkeypatch.setattr(outside, "PAUSE_SECONDS_WITHOUT_KEYS", 0.0)
            time.sleep(0.3)
            assert ask(client, idp.token()).status_code == 200

    def test_known_keys_outlive_the_provider_for_a_while(self, client: TestClient, idp: Provider) -> None:
        assert ask(client, idp.token()).status_code == 200
        idp.status = 500
        tokens = client.app.state.outside._tokens  # type: ignore[attr-defined]
        tokens._fetched_at -= outside.KEYS_SECONDS + 1
        assert ask(client, idp.token(jti="a")).status_code == 200
        tokens._fetched_at -= outside.KEYS_SECONDS_MAX
        assert_problem(ask(client, idp.token(jti="b")), 503)


class TestSettings:
    @pytest.mark.parametrize(
        ("issuer", "audience"),
        [
            ("https://idp.example", None),
            (None, "x"),
            ("http://idp.example", "x"),
            ("idp.example", "x"),
            ("http://localhost.evil.example", "x"),
        ],
    )
    def test_wrong_ones_are_refused(self, settings: Settings, issuer: str | None, audience: str | None) -> None:
        values = settings.model_dump() | {"oidc_issuer": issuer, "oidc_audience": audience}
        with pytest.raises(ValidationError):
            Settings(_env_file=None, **values)  # type: ignore[call-arg]

    @pytest.mark.anyio
    async def test_keys_of_an_encrypted_issuer_come_encrypted(self, idp: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever can change what comes over plain HTTP would sign for everybody."""
        asked: list[str] = []

        async def get(_: Any, address: str) -> Any:
            asked.append(address)
            return {"issuer": "https://idp.example", "jwks_uri": "http://idp.example/keys", "keys": idp.keys}

        monkeypatch.setattr(outside.OutsideTokens, "_get", get)
        tokens = outside.OutsideTokens("https://idp.example", AUDIENCE)
        await tokens._fetch()
        assert (tokens._keys, asked) == ((), ["https://idp.example/.well-known/openid-configuration"])
        await tokens.close()


def _sign_as_hmac(claims: dict[str, Any], secret: bytes, algorithm: str, name: str | None) -> str:
    """PyJWT itself refuses to sign with a public key; an attacker does not."""
    head = {"alg": algorithm, "typ": "JWT"} | ({"kid": name} if name else {})
    encoded = b".".join(jwt.utils.base64url_encode(json.dumps(part).encode()) for part in (head, claims))
    digest = {"HS256": hashlib.sha256, "HS384": hashlib.sha384, "HS512": hashlib.sha512}[algorithm]
    return (encoded + b"." + jwt.utils.base64url_encode(hmac.new(secret, encoded, digest).digest())).decode()
