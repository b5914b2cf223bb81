"""Guessing passwords has an end, for each address and each network, and leaves no address behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import redis as redis_py
from fastapi import Request
from starlette.testclient import TestClient
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from api.app import create_app
from api.attempts import WINDOW_MINUTES, network_of
from tests.api.conftest import EMAIL, PASSWORD
from tests.api.test_errors import assert_problem
from worker import keys
from worker.embedded import EmbeddedValkey
from worker.settings import Settings

TOKEN, SESSION, REGISTER = "/api/auth/token", "/api/auth/session", "/api/auth/register"
OWN_PAGE = {"Sec-Fetch-Site": "same-origin"}
PER_ADDRESS, PER_NETWORK, SIGN_UPS = 3, 8, 4


@pytest.fixture
def small(settings: Settings) -> Settings:
    limits = {"sign_ins_per_address_max": PER_ADDRESS, "sign_ins_per_network_max": PER_NETWORK, "sign_ups_per_network_max": SIGN_UPS}
    return settings.model_copy(update=limits)


@pytest.fixture
def client(small: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(small), raise_server_exceptions=False, client=("192.0.2.1", 1)) as client:
        assert register(client, EMAIL).status_code == 201
        yield client


def register(client: TestClient, email: str) -> httpx2.Response:
    return client.post(REGISTER, json={"email": email, "password": PASSWORD})


def attempt(client: TestClient, email: str = EMAIL, password: str = "a guess", path: str = TOKEN, **headers: str) -> httpx2.Response:
    return client.post(path, data={"username": email, "password": password}, headers=headers)


def refused(answer: httpx2.Response, seconds: int = WINDOW_MINUTES * 60) -> bool:
    if answer.status_code != 429:
        return False
    assert_problem(answer, 429)
    assert answer.json()["type"] == "urn:chatkeep:too-many-attempts"
    assert seconds - 30 < int(answer.headers["retry-after"]) <= seconds
    return True


class TestPerAddress:
    def test_right_password_is_not_taken_after_too_many_wrong_ones(self, client: TestClient) -> None:
        for _ in range(PER_ADDRESS):
            assert attempt(client).status_code == 401
        assert refused(attempt(client, password=PASSWORD))
        assert refused(attempt(client, password=PASSWORD, path=SESSION, **OWN_PAGE))
        assert refused(attempt(client, EMAIL.upper(), password=PASSWORD))
        assert attempt(client, "bob@example.org").status_code == 401

    def test_unknown_address_is_refused_in_the_same_way(self, client: TestClient) -> None:
        answers = {email: [attempt(client, email) for _ in range(PER_ADDRESS + 1)] for email in (EMAIL, "nobody@example.org")}
        known, unknown = answers.values()
        assert [one.status_code for one in known] == [one.status_code for one in unknown] == [401] * PER_ADDRESS + [429]
        assert [one.content for one in known] == [one.content for one in unknown]

    def test_signing_in_sets_it_back(self, client: TestClient) -> None:
        for _ in range(2):
            assert attempt(client).status_code == 401
            assert attempt(client, password=PASSWORD).status_code == 200
        assert attempt(client).status_code == 401

    def test_two_processes_count_together(self, client: TestClient, small: Settings) -> None:
        for _ in range(PER_ADDRESS):
            attempt(client)
        with TestClient(create_app(small), client=("192.0.2.2", 1)) as other:
            assert refused(attempt(other, password=PASSWORD))

    def test_nothing_that_is_no_address_gets_past_it(self, client: TestClient) -> None:
        for odd in ("\x00", "x" * 10_000):
            assert [attempt(client, odd).status_code for _ in range(PER_ADDRESS + 1)] == [401] * PER_ADDRESS + [429]


class TestPerNetwork:
    def test_many_addresses_from_one_network(self, client: TestClient) -> None:
        for number in range(PER_NETWORK):
            assert attempt(client, f"{number}@example.org").status_code == 401
        assert refused(attempt(client, password=PASSWORD))

    def test_one_cannot_say_to_be_from_elsewhere(self, client: TestClient) -> None:
        answers = [
            attempt(client, f"{number}@example.org", **{"X-Forwarded-For": f"198.51.100.{number}", "Forwarded": f"for=198.51.100.{number}"})
            for number in range(PER_NETWORK + 1)
        ]
        assert refused(answers[-1])

    def test_proxy_that_is_trusted_can(self, small: Settings) -> None:
        app: Any = ProxyHeadersMiddleware(create_app(small), trusted_hosts="192.0.2.7")  # type: ignore[arg-type]  # uvicorn's own ASGI types
        with TestClient(app, client=("192.0.2.7", 1)) as proxy:
            for number in range(PER_NETWORK):
                assert attempt(proxy, f"{number}@example.org", **{"X-Forwarded-For": "198.51.100.1"}).status_code == 401
            assert refused(attempt(proxy, "x@example.org", **{"X-Forwarded-For": "10.0.0.1, 198.51.100.1"}))
            assert attempt(proxy, "x@example.org", **{"X-Forwarded-For": "198.51.100.2"}).status_code == 401

    @pytest.mark.parametrize(
        ("host", "network"),
        [
            ("192.0.2.1", "192.0.2.1"),
            ("::ffff:192.0.2.1", "192.0.2.1"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
            ("2001:db8:1:2:ffff::1", "2001:db8:1:2::"),
            ("2001:db8:1:3::1", "2001:db8:1:3::"),
            ("fe80::1%eth0", "fe80::"),
            ("a socket", "a socket"),
            ("127.0.0.1", ""),
            ("::1", ""),
            ("::ffff:127.0.0.1", ""),
        ],
    )
    def test_network_of_an_address(self, host: str, network: str) -> None:
        assert network_of(Request({"type": "http", "client": (host, 1), "headers": []})) == network
        assert network_of(Request({"type": "http", "client": None, "headers": []})) == ""


class TestSigningUp:
    def test_this_machine_is_no_network(self, small: Settings) -> None:
        with TestClient(create_app(small), client=("127.0.0.1", 1)) as client:
            for number in range(SIGN_UPS + 1):
                body = {"email": f"{number}@example.org", "password": "correct horse battery"}
                assert client.post("/api/auth/register", json=body).status_code == 201

    def test_from_one_network(self, client: TestClient) -> None:
        for number in range(SIGN_UPS - 1):
            assert register(client, f"{number}@example.org").status_code == 201
        assert refused(register(client, "one.more@example.org"), 3600)

    def test_as_one_address(self, settings: Settings) -> None:
        with TestClient(create_app(settings.model_copy(update={"sign_ins_per_address_max": 2}))) as client:
            assert [register(client, EMAIL).status_code for _ in range(3)] == [201, 409, 429]

    def test_what_is_not_valid_does_not_count(self, client: TestClient) -> None:
        for _ in range(SIGN_UPS):
            assert register(client, "no address").status_code == 422
        assert register(client, "bob@example.org").status_code == 201


class TestInRedis:
    def test_nobody_is_named_and_everything_expires(self, client: TestClient, redis_url: str) -> None:
        attempt(client)
        with redis_py.Redis.from_url(redis_url) as redis:
            found = {name: redis.pttl(name) for name in redis.scan_iter(f"{keys.ATTEMPTS}*")}
        assert len(found) == 4
        assert all(0 < left <= 3_600_000 for left in found.values())
        assert not any(word in str(found) for word in ("ann", "example", "192.0.2"))

    def test_without_redis_nobody_signs_in(self, client: TestClient, valkey: EmbeddedValkey) -> None:
        valkey.kill()
        for answer in (attempt(client, password=PASSWORD), register(client, "bob@example.org")):
            assert_problem(answer, 503)
            assert int(answer.headers["retry-after"]) > 0
        valkey.start()
        assert attempt(client, password=PASSWORD).status_code == 200

    def test_without_limits_redis_is_not_asked(self, settings: Settings, redis_url: str) -> None:
        off = dict.fromkeys(("sign_ins_per_address_max", "sign_ins_per_network_max", "sign_ups_per_network_max"), 0)
        with TestClient(create_app(settings.model_copy(update=off))) as client, redis_py.Redis.from_url(redis_url) as redis:
            assert register(client, EMAIL).status_code == 201
            assert attempt(client, password=PASSWORD).status_code == 200
            assert list(redis.scan_iter(f"{keys.ATTEMPTS}*")) == []
