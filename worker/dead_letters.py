"""What Postgres refused, for an operator: `python -m worker.dead_letters list|show|replay|drop`.

A dead letter is a log entry that could not be inserted: planted, damaged, or a bug of ours. `list` shows no content; `show` does.
`replay` inserts it under the id it was acknowledged with, once what stood in its way is mended.
"""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sqlalchemy import text

from worker import keys
from worker.codec import RawEntry, decode_entry
from worker.database import raw_cursor, transaction
from worker.errors import BadEntry, ChatkeepError
from worker.persist import decode_batch, persist_batch, try_lock, unreadable
from worker.redis import connect_sync
from worker.scripts import run
from worker.settings import get_settings

SECONDS = 30.0
cli = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
out = Console()

Ids = Annotated[list[int], typer.Argument(help="The dead letters' ids, as `list` shows them")]


@cli.command("list")
def list_letters(
    everything: Annotated[bool, typer.Option("--all", help="Also those that were replayed")] = False,
    limit: Annotated[int, typer.Option(min=1, help="How many at the most, the latest first")] = 100,
) -> None:
    """Lists dead letters, without their content."""
    where = "" if everything else "WHERE replayed_at IS NULL "
    with transaction(seconds=SECONDS, read_only=True, role="worker") as connection:
        query = f"SELECT id, shard, entry_id, reason, error, created_at, replayed_at FROM dead_letter {where}ORDER BY id DESC LIMIT :limit"
        rows = connection.execute(text(query), {"limit": limit}).all()
    table = Table("id", "shard", "log entry", "reason", "error", "since", "replayed")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row))
    out.print(table if rows else "No dead letters.")


@cli.command()
def show(letter: Annotated[int, typer.Argument(help="The dead letter's id")]) -> None:
    """Shows one dead letter with its content."""
    with transaction(seconds=SECONDS, read_only=True, role="worker") as connection:
        query = text("SELECT id, shard, entry_id, reason, error, created_at, replayed_at, entry FROM dead_letter WHERE id = :id")
        row = connection.execute(query, {"id": letter}).mappings().one_or_none()
    if row is None:
        raise typer.BadParameter(f"there is no dead letter {letter}; `list` shows which there are")
    for name, value in row.items():
        out.print(f"{name}: {value}", markup=False, highlight=False)


@cli.command()
def replay(letters: Ids) -> None:
    """Inserts dead letters again, each in a transaction of its own. Safe to repeat."""
    failed = 0
    for letter in track(letters, description="Replaying", console=Console(stderr=True), disable=len(letters) < 10):
        outcome = replay_one(letter)
        failed += outcome is not None
        out.print(f"{letter}: {outcome or 'replayed'}")
    if failed:
        raise typer.Exit(1)


@cli.command()
def drop(letters: Ids, yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False) -> None:
    """Deletes dead letters for good."""
    if not yes:
        typer.confirm(f"Delete {len(letters)} dead letters and their content for good?", abort=True)
    with transaction(seconds=SECONDS, role="worker") as connection:
        dropped = connection.execute(text("DELETE FROM dead_letter WHERE id = ANY(:ids)"), {"ids": letters}).rowcount
    out.print(f"{dropped} dropped")
    if dropped < len(set(letters)):
        raise typer.Exit(1)


def replay_one(letter: int) -> str | None:
    """Inserts one; answers why it could not be, or None if it is in Postgres now."""
    settings = get_settings()
    with transaction(seconds=SECONDS, role="worker") as connection, raw_cursor(connection) as cursor:
        row = connection.execute(
            text("SELECT shard, entry_id, entry, replayed_at FROM dead_letter WHERE id = :id FOR UPDATE"), {"id": letter}
        ).one_or_none()
        if row is None:
            return "there is no such dead letter"
        if row.replayed_at is not None:
            return None
        entry = RawEntry.of(row.entry_id.encode(), unreadable(row.entry))
        if not try_lock(cursor, [row.shard]):
            return "its shard is being flushed; try again"
        persisted = persist_batch(cursor, settings.shards, decode_batch({row.shard: [entry]}), by_hand=True)
        if persisted.dead:
            return "refused again, see `show`"
        connection.execute(text("UPDATE dead_letter SET replayed_at = now() WHERE id = :id"), {"id": letter})
    _forget(row.shard, entry)
    return None


def _forget(shard: int, entry: RawEntry) -> None:
    """The cached copy of the conversation lacks what was replayed."""
    try:
        conversation = decode_entry(entry.id, entry.fields).conversation_id
    except BadEntry:
        return
    names = [name(shard, conversation) for name in (keys.conversation, keys.messages, keys.retry_keys, keys.loading)]
    with closing(connect_sync(get_settings())) as client:
        if not run(client, "forget", names, []):
            out.print("(its conversation is in use: readers see it when the cached copy has expired)")


if __name__ == "__main__":
    try:
        cli()
    except ChatkeepError as exc:
        sys.exit(f"chatkeep: {exc.detail}")
