"""Refresh tokens: each is good once, a copy ends the sign-in, and Postgres keeps none of them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests import core
from worker import sign_ins
from worker.settings import Settings
from worker.sign_ins import GRACE_SECONDS, Copied, RefreshTokens, SignIn

EMPTIED = True
SECONDS = 10.0


@pytest.fixture
def tokens(settings: Settings) -> RefreshTokens:
    return RefreshTokens("a test of refresh tokens only", 3600)


@pytest.fixture
def first(tokens: RefreshTokens) -> SignIn:
    return tokens.begin(core.make_user(), SECONDS)[0]


def renewed(tokens: RefreshTokens, token: str) -> SignIn:
    found = tokens.renew(token, SECONDS)
    assert isinstance(found, SignIn)
    return found


def pass_time(seconds: float) -> None:
    """As if the last renewals were this much longer ago."""
    core.ask("UPDATE sign_in SET renewed_at = renewed_at - make_interval(secs => %s), expires_at = expires_at - make_interval(secs => %s)",
             seconds, seconds)  # fmt: skip


def left() -> list[str]:
    return [row[0] for row in core.ask("SELECT id FROM sign_in ORDER BY created_at")]


class TestRenewal:
    def test_each_token_is_followed_by_another(self, tokens: RefreshTokens, first: SignIn) -> None:
        seen = {first.token}
        token = first.token
        for _ in range(5):
            pass_time(GRACE_SECONDS + 1)
            found = renewed(tokens, token)
            assert (found.id, found.user_id) == (first.id, first.user_id)
            assert found.token not in seen
            seen.add(token := found.token)
        assert core.ask("SELECT renewals FROM sign_in") == [(5,)]

    def test_two_tabs_at_once_get_the_same(self, tokens: RefreshTokens, first: SignIn) -> None:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda _: renewed(tokens, first.token), range(4)))
        assert len({one.token for one in found}) == 1
        assert core.ask("SELECT renewals FROM sign_in") == [(1,)]
        renewed(tokens, found[0].token)

    def test_one_token_is_judged_by_one_at_a_time(self, tokens: RefreshTokens, first: SignIn, monkeypatch: pytest.MonkeyPatch) -> None:
        judge, judging, most = tokens._links_to, 0, 0

        def slowly(*arguments: Any) -> int | None:
            nonlocal judging, most
            judging += 1
            most = max(most, judging)
            time.sleep(0.2)
            judging -= 1
            return judge(*arguments)

        monkeypatch.setattr(tokens, "_links_to", slowly)
        with ThreadPoolExecutor(3) as threads:
            assert len({found.token for found in threads.map(lambda _: renewed(tokens, first.token), range(3))}) == 1
        assert most == 1

    def test_it_begins_the_lifetime_anew(self, tokens: RefreshTokens, first: SignIn) -> None:
        pass_time(3500)
        pass_token = renewed(tokens, first.token).token
        pass_time(3500)
        renewed(tokens, pass_token)

    def test_one_that_has_run_out_is_not_renewed(self, tokens: RefreshTokens, first: SignIn) -> None:
        pass_time(3601)
        assert tokens.renew(first.token, SECONDS) is None

    def test_it_outlives_a_change_of_the_secret(self, first: SignIn) -> None:
        renewed(RefreshTokens("another secret", 3600), first.token)


class TestCopies:
    def test_token_that_was_used_before_ends_the_sign_in(self, tokens: RefreshTokens, first: SignIn) -> None:
        second = renewed(tokens, first.token)
        pass_time(GRACE_SECONDS + 1)
        assert tokens.renew(first.token, SECONDS) == Copied(first.id)
        assert left() == []
        assert tokens.renew(second.token, SECONDS) is None

    def test_older_one_ends_it_even_at_once(self, tokens: RefreshTokens, first: SignIn) -> None:
        renewed(tokens, renewed(tokens, renewed(tokens, first.token).token).token)
        assert tokens.renew(first.token, SECONDS) == Copied(first.id)

    def test_thief_in_the_grace_is_noticed_at_the_next_renewal(self, tokens: RefreshTokens, first: SignIn) -> None:
        owners, thiefs = renewed(tokens, first.token).token, renewed(tokens, first.token).token
        pass_time(900)
        renewed(tokens, owners)
        pass_time(GRACE_SECONDS + 1)
        assert tokens.renew(thiefs, SECONDS) == Copied(first.id)

    def test_other_sign_ins_of_the_user_stay(self, tokens: RefreshTokens, first: SignIn) -> None:
        other, _ = tokens.begin(first.user_id, SECONDS)
        renewed(tokens, first.token)
        pass_time(GRACE_SECONDS + 1)
        assert isinstance(tokens.renew(first.token, SECONDS), Copied)
        assert left() == [other.id]

    @pytest.mark.parametrize("part", [0, 1, 2])
    def test_what_is_made_up_ends_nothing(self, tokens: RefreshTokens, first: SignIn, part: int) -> None:
        stranger, _ = tokens.begin(core.make_user(), SECONDS)
        parts = first.token.split(".")
        parts[part] = stranger.token.split(".")[part]
        assert tokens.renew(".".join(parts), SECONDS) is None
        assert left() == [first.id, stranger.id]

    @pytest.mark.parametrize(
        "token", ["", ".", "..", "1.x", "x.y.z", "0.a.b", "-1.a.b", "1.a.\x00", f"{1 << 53}.a.b", "1.ä.b", "1." + "a" * 300 + ".b"]
    )
    def test_what_is_no_token_does_not_even_reach_postgres(self, token: str) -> None:
        assert sign_ins._parts(token) is None
        assert RefreshTokens("x", 60).renew(token, 0.0) is None


class TestKeeping:
    def test_postgres_keeps_no_token(self, tokens: RefreshTokens, first: SignIn) -> None:
        second = renewed(tokens, first.token)
        stored = str(core.ask("SELECT * FROM sign_in"))
        assert first.id in stored
        assert not any(token.split(".")[2] in stored for token in (first.token, second.token))
        assert first.token not in repr(first)

    def test_those_that_have_run_out_are_cleared_away(self, tokens: RefreshTokens, first: SignIn) -> None:
        pass_time(3601)
        second, ended = tokens.begin(first.user_id, SECONDS)
        assert (left(), ended) == ([second.id], [])

    def test_number_is_bounded_and_the_one_that_was_idle_longest_goes(
        self, tokens: RefreshTokens, first: SignIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sign_ins, "PER_USER_MAX", 3)
        pass_time(60)
        second, third = (tokens.begin(first.user_id, SECONDS)[0] for _ in range(2))
        renewed(tokens, first.token)
        core.ask("UPDATE sign_in SET renewed_at = renewed_at - interval '1 minute' WHERE id = %s RETURNING id", second.id)
        fourth, ended = tokens.begin(first.user_id, SECONDS)
        assert ended == [second.id]
        assert left() == [first.id, third.id, fourth.id]

    def test_end_of_none_is_no_error(self, tokens: RefreshTokens, first: SignIn) -> None:
        for _ in range(2):
            tokens.end(first.user_id, first.id, SECONDS)
        tokens.end(first.user_id + 1, first.id, SECONDS)
        assert left() == []
