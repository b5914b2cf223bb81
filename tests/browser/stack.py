"""All of Chatkeep as processes of its own, with a model that the tests speak through, and a past to scroll through: `Stack`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from datetime import datetime, timedelta

import psycopg2
from psycopg2.extras import execute_values

from tests.browser.model import Model
from tests.processes import SHARDS, Api, Installation
from worker import keys
from worker.codec import to_microseconds


class Stack(Installation):
    """An installation whose API asks the test's own model."""

    def _make_processes(self) -> None:
        super()._make_processes()
        self.script = Model()
        self.script.start()
        self._stack.callback(self.script.stop)
        model = {"LLM_BASE_URL": self.script.url, "LLM_MODEL": "test", "LLM_API_KEY": "none"}
        self.api = self.processes["api"] = Api("api", self._claim, self._directory / "run", self.env | model)

    def store(self, user_id: int, title: str, messages: Sequence[tuple[datetime, str, str]]) -> int:
        """Puts a conversation of earlier days (time, role, content) straight into Postgres, as if it had been committed then; its id."""
        shard = keys.shard_of_user(user_id, SHARDS)
        first, last = messages[0][0], messages[-1][0]
        conversation = _id_at(first - timedelta(seconds=1), shard)
        rows = [(conversation, _id_at(at, shard), user_id, role, content, at, "complete") for at, role, content in messages]
        with closing(psycopg2.connect(self.postgres.url, connect_timeout=10)) as connection, connection, connection.cursor() as cursor:
            columns = "(id, user_id, title, created_at, updated_at)"
            cursor.execute(f"INSERT INTO conversation {columns} VALUES (%s, %s, %s, %s, %s)", (conversation, user_id, title, first, last))
            columns = "(conversation_id, id, user_id, role, content, created_at, status)"
            execute_values(cursor, f"INSERT INTO message {columns} VALUES %s", rows, page_size=1000)
        return conversation


def _id_at(moment: datetime, shard: int) -> int:
    return keys.first_id_at(to_microseconds(moment), shard)
