"""The names of the keys, and the arithmetic of ids."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from worker import keys
from worker.settings import SHARD_SLOTS

OF_SHARDS = [keys.log, keys.clock, keys.seeding, keys.committed, keys.backlog_bytes, keys.wake]
OF_MORE = [
    *(keys.conversation, keys.messages, keys.retry_keys, keys.loading, keys.turn),
    *(keys.changed, keys.created_keys, keys.loading_user),
]


def microseconds(*moment: int) -> int:
    return int(datetime(*moment, tzinfo=UTC).timestamp()) * 1_000_000


def test_all_keys_of_a_shard_lie_in_one_slot_of_a_cluster_and_no_two_are_alike() -> None:
    for shard in range(SHARD_SLOTS):
        names = [name(shard) for name in OF_SHARDS] + [name(shard, number) for name in OF_MORE for number in (1, 2, 1 << 52)]
        assert len(set(names)) == len(names)
        assert len({key_slot(name.encode()) for name in names}) == 1
    assert len({keys.log(shard) for shard in range(SHARD_SLOTS)}) == SHARD_SLOTS


def test_ids_are_below_2_53_until_2070_and_none_is_given_by_two_shards() -> None:
    assert keys.first_id_at(microseconds(2070, 1, 1), 63) < keys.ID_LIMIT == 1 << 53
    assert keys.first_id_at(microseconds(2000, 1, 1), 5) == 5
    moment = microseconds(2026, 11, 21)
    assert len({keys.first_id_at(moment, shard) for shard in range(64)}) == 64
    assert keys.first_id_at(moment, 63) < keys.first_id_at(moment + keys.TICK_MICROSECONDS, 0)


@given(st.integers(keys.EPOCH_MICROSECONDS, microseconds(2070, 1, 1)), st.integers(0, 63))
def test_an_id_tells_its_shard_and_about_its_time(moment: int, shard: int) -> None:
    number = keys.first_id_at(moment, shard)
    assert keys.shard_of_id(number) == shard
    assert 0 <= moment - keys.microseconds_of(number) < keys.TICK_MICROSECONDS


@pytest.mark.parametrize(
    ("entry_id", "number"),
    [
        (b"179434769364481-0", 179434769364481),
        (b"%d-0" % ((1 << 53) - 1), (1 << 53) - 1),
        (b"179434769364481-1", None),
        (b"0-1", None),
        (b"0-0", None),
        (b"%d-0" % (1 << 53), None),
        (b"%d-%d" % ((1 << 64) - 1, (1 << 64) - 1), None),
    ],
)
def test_only_an_append_numbers_entries_so(entry_id: bytes, number: int | None) -> None:
    assert keys.entry_number(entry_id) == number
