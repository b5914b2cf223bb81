"""Puts Chatkeep into `peers_bench.py`, beside the libraries that people use today (row 16): `peers_bench.py bench --adapter <this file>`.

It runs in the peers' Python, which has none of Chatkeep's packages, so everything of ours is another process (`benchmarks/peers_stand.py`,
run by CHATKEEP_PYTHON in CHATKEEP_ROOT) and is spoken to over HTTP. The peers are called as libraries: that is their advantage. A turn is
one request with two messages, as it is one call of theirs. What is read or written is known to Redis, as in a service that runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from typing import Any

import psycopg  # type: ignore[import-not-found]  # the peers' Python has it
from peers_bench import Adapter, HttpClient, seed_pairs, uid  # type: ignore[import-not-found]  # given with PEERS_BENCH

SHARDS, SLOTS = 16, 64
FIRST_CONVERSATION, FIRST_MESSAGE = 1_000, 1_000_000


class Chatkeep(Adapter):  # type: ignore[misc]  # the peers' module has no types
    name, title, pk, kind, needs = (
        "chatkeep",
        "Chatkeep over HTTP: 1 uvicorn, 1 worker, beat, Valkey fsynced always",
        ["psycopg"],
        "async",
        "pg",
    )
    guarantee, idem, order = "fsynced in Valkey, then committed in batches", "yes by retry key", "id"

    async def create(self) -> None:
        self._ours("alembic", "upgrade", "head")

    async def seed(self, sizes: dict[int, int]) -> None:
        with psycopg.connect(self.env.dsn) as connection, connection.cursor() as cursor:
            people = sorted({uid(number) for number in sizes})
            cursor.executemany(
                'INSERT INTO "user" (id, email, password_hash) OVERRIDING SYSTEM VALUE VALUES (%s, %s, %s)',
                [(user, f"user{user}@example.org", "x") for user in people],
            )
            cursor.executemany(
                "INSERT INTO conversation (id, user_id, title, created_at, updated_at) VALUES (%s, %s, 'seeded', now(), now())",
                [(conversation_id(number), uid(number)) for number in sizes],
            )
            columns = "conversation_id, id, user_id, role, content, created_at, status"
            with cursor.copy(f"COPY message ({columns}) FROM STDIN") as copy:
                tick = FIRST_MESSAGE
                left = {number: seed_pairs(number, count) for number, count in sizes.items()}
                while left:  # round robin, as live traffic would lie in the heap
                    for number in list(left):
                        if not left[number]:
                            del left[number]
                            continue
                        for role, text in zip(("user", "assistant"), left[number].pop(0), strict=True):
                            tick += 1
                            row = (
                                conversation_id(number),
                                tick * SLOTS + uid(number) % SHARDS,
                                uid(number),
                                role,
                                text,
                                "now()",
                                "complete",
                            )
                            copy.write_row(row)

    async def open(self, writers: int) -> None:
        self.stand: Any = subprocess.Popen(
            [os.environ["CHATKEEP_PYTHON"], "-m", "benchmarks.peers_stand", self._url()],
            cwd=os.environ["CHATKEEP_ROOT"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        told = json.loads(self._line())
        self.pids = told["pids"]
        self.head = {int(user): f"Host: x\r\nAuthorization: Bearer {token}\r\n" for user, token in told["tokens"].items()}
        loop = asyncio.get_running_loop()
        self.clients = [(await loop.create_connection(HttpClient, "127.0.0.1", told["port"]))[1] for _ in range(writers)]
        for number in range(1002):
            await self.read(number)

    async def turn(self, w: int, conv: int, user: str, assistant: str) -> None:
        said = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        body = json.dumps({"messages": said}).encode()
        head = (
            f"POST {path(conv)}/batch HTTP/1.1\r\n{self.head[uid(conv)]}Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        await self.clients[w].ask(head.encode() + body)

    async def read(self, conv: int) -> list[Any]:
        answer = await self.clients[0].ask(f"GET {path(conv)}?limit=50 HTTP/1.1\r\n{self.head[uid(conv)]}\r\n".encode())
        items: list[Any] = json.loads(answer)["items"]
        return items

    async def drain(self) -> None:
        self.stand.stdin.write("drain\n")
        self.stand.stdin.flush()
        self._line()

    async def close(self) -> None:
        for client in self.clients:
            client.t.close()
        self.stand.stdin.close()
        self.stand.wait(60)

    def _line(self) -> str:
        line: str = self.stand.stdout.readline()
        if not line:
            raise RuntimeError("Chatkeep's stand has ended")
        return line

    def _url(self) -> str:
        return f"postgresql://{self.env.user}@127.0.0.1:{self.env.pg_port}/{self.env.db}?sslmode=disable"

    def _ours(self, *module: str) -> None:
        env = os.environ | {"DATABASE_URL": self._url(), "DATABASE_URL_UNPOOLED": self._url()}
        subprocess.run([os.environ["CHATKEEP_PYTHON"], "-m", *module], cwd=os.environ["CHATKEEP_ROOT"], env=env, check=True, timeout=120)


def conversation_id(number: int) -> int:
    return int((FIRST_CONVERSATION + number) * SLOTS + uid(number) % SHARDS)


def path(number: int) -> str:
    return f"/api/conversations/{conversation_id(number)}/messages"


ADAPTERS = [Chatkeep]
