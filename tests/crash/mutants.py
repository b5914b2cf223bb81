"""The test of the tests: bugs that are planted one at a time, each of which must turn the suite red. `make mutants`.

A mutant is a few replacements in the product's files, made in a copy of the tree. The tiers then run on the copy, the fastest first, until
one is red or two minutes are over. A green run without this gate would prove nothing.

    python -m tests.crash.mutants [name ...] [--tier model|points|nemesis] [--list]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS_MAX = 120.0
"""For all tiers together."""
TIERS = {
    "model": ("tests/crash/test_model.py", "-k", "promise"),
    "points": ("tests/crash/test_crash_points.py", "-k", "survives"),
    "nemesis": ("tests/crash/test_nemesis.py",),
}


@dataclass(frozen=True, slots=True)
class Edit:
    """A replacement; `old` stands in the file exactly once."""

    path: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Mutant:
    """A planted bug. `race` is its number in failure-modes, where it has one."""

    name: str
    what: str
    edits: tuple[Edit, ...]
    only: str = ""
    """The one tier that can see it, where the others cannot by their nature."""


_APPEND_ALL = (
    "        shard = self._shard(user_id, conversation_id)\n        script_keys = self._append_keys(shard, user_id, conversation_id)\n"
)
MUTANTS = (
    Mutant(
        "postgres-first",
        "R1: a read asks Postgres first and Redis afterwards",
        (
            Edit(
                "api/history.py",
                '    cached = await log.read(user_id, conversation_id, "before", before, limit + 1)\n',
                "    early = await log.threads.run(\n"
                "        partial(\n"
                '            committed.read_page, user_id, conversation_id, "before", start=before, end=None, count=limit + 1,\n'
                "            look_beyond=False,\n"
                "        )\n"
                "    )\n"
                '    cached = await log.read(user_id, conversation_id, "before", before, limit + 1)\n',
            ),
            Edit(
                "api/history.py",
                "    newest_first = (*newest_first, *below.messages) if newest_first else below.messages\n",
                "    lacking = limit + 1 - len(newest_first)\n"
                "    newest_first = (*newest_first, *[one for one in early.messages if seam is None or one.id < seam][:lacking])\n",
            ),
        ),
    ),
    Mutant(
        "trim-before-commit",
        "R2: a batch is trimmed before its commit",
        (
            Edit(
                "worker/flush.py",
                '        crashpoints.visit("flush:before_commit")\n',
                '        trim_batches(client, settings, entries, persisted)\n        crashpoints.visit("flush:before_commit")\n',
            ),
        ),
    ),
    Mutant(
        "trim-by-count",
        "R3: a trim removes as many entries as were committed, not those",
        (
            Edit("worker/backlog.py", '"each" if one_by_one else "run"', "len(entries)"),
            Edit(
                "worker/lua/trim.lua",
                "if ARGV[5] == 'run' then\n",
                "if true then\n  redis.call('XTRIM', KEYS[1], 'MAXLEN', '=', math.max(0, redis.call('XLEN', KEYS[1]) - ARGV[5]))\n"
                "elseif ARGV[5] == 'run' then\n",
            ),
        ),
    ),
    Mutant(
        "batch-before-lock",
        "R4: a batch is read before the shard's lock is held, and titles are written again: each is harmless without the other",
        (
            Edit("worker/persist.py", "elif entry.id > self.committed.get(keys.shard_of_id(entry.id), 0):", "else:"),
            Edit("worker/flush.py", "        parts = backlog.fetch(", "        parts = iter(early) or backlog.fetch("),
            Edit(
                "worker/flush.py",
                "    with transaction(",
                "    early = list(backlog.fetch(client, now, entries_max, BATCH_BYTES_MAX, after))\n    with transaction(",
            ),
        ),
    ),
    Mutant(
        "insert-not-repeatable",
        "R5: a batch that is written again is refused",
        (Edit("worker/persist.py", '"ON CONFLICT DO NOTHING"', '""'),),
    ),
    Mutant(
        "no-tombstone",
        "R6: a deletion leaves no tombstone in the cache",
        (
            Edit(
                "worker/lua/delete.lua",
                "redis.call('DEL', KEYS[6], KEYS[7], KEYS[9])",
                "redis.call('DEL', KEYS[5], KEYS[6], KEYS[7], KEYS[9])",
            ),
        ),
    ),
    Mutant(
        "no-tombstone-row",
        "R6: a deleted conversation is loaded like any other",
        (Edit("worker/pending.py", "int(loaded.deleted)", "0"),),
    ),
    Mutant(
        "settled-too-early",
        "R7: a trim takes a conversation with newer entries for clean",
        (Edit("worker/lua/trim.lua", "local clean = last and tonumber(last) <= committed", "local clean = last"),),
    ),
    Mutant(
        "message-before-conversation",
        "R8: a batch writes messages before the conversations they are in",
        (
            Edit("worker/persist.py", "    _insert_conversations(cursor, plan.created)\n", ""),
            Edit(
                "worker/persist.py",
                "    _delete_conversations(cursor, plan",
                "    _insert_conversations(cursor, plan.created)\n    _delete_conversations(cursor, plan",
            ),
        ),
    ),
    Mutant(
        "no-owner-check",
        "R9: an append asks nobody whose conversation it is",
        (
            Edit(
                "worker/lua/append.lua", "if known[1] ~= ARGV[2] then return {'UNKNOWN'} end", "if not known[1] then return {'UNKNOWN'} end"
            ),
        ),
    ),
    Mutant(
        "no-owner-check-on-read",
        "R9: a read asks nobody whose conversation it is",
        (Edit("worker/pending.py", 'if known[0] != b"%d" % user_id:  # also', "if known[0] is None:  # also"),),
    ),
    Mutant(
        "key-forgotten",
        "R10: a retry key that only Postgres knows is taken for a new one",
        (
            Edit(
                "worker/lua/append.lua", "elseif known[5] ~= '1' and redis.call('HGET', KEYS[7], '?') ~= ARGV[7] then", "elseif false then"
            ),
        ),
    ),
    Mutant(
        "batch-torn",
        "of messages that came together only the first has a retry key",
        (
            Edit(
                "worker/pending.py", "request_hash(role, status, content)) if key", "request_hash(role, status, content)) if key and not i"
            ),
        ),
    ),
    Mutant(
        "batch-split",
        "a commit comes between messages that were sent together",
        (Edit("worker/backlog.py", "if followers := _followers(entry):", "if followers := 0:"),),
    ),
    Mutant(
        "batch-half",
        "messages that came together are appended by a script run each",
        (
            Edit(
                "worker/pending.py",
                _APPEND_ALL,
                "        if len(drafts) > 1:\n"
                "            appended: Any = []\n"
                "            for i, draft in enumerate(drafts):\n"
                '                nth = f"{key}:{i}" if key else None\n'
                "                appended += await self.append_all(user_id, conversation_id, [draft], key=nth, counted=counted)\n"
                "            return appended\n" + _APPEND_ALL,
            ),
        ),
    ),
    Mutant(
        "numbering-restarted",
        "R11: after a wipe the numbering begins anew",
        (Edit("worker/lua/seed.lua", "local highest = tonumber(ARGV[2])", "local highest = 0"),),
    ),
    Mutant(
        "seed-late",
        "R11: the numbering begins where Postgres stood before Redis was wiped once more",
        (Edit("worker/lua/seed.lua", "if redis.call('GET', KEYS[4]) ~= ARGV[1] then return {'LATE'} end\n", ""),),
    ),
    Mutant(
        "reserved-before-wipe",
        "R11: a number that was reserved before Redis was wiped is used, though the clock is behind it now",
        (Edit("worker/lua/create.lua", "if tonumber(ARGV[3]) >= (last_tick + 1) * SLOTS then return {'TAKEN'} end\n", ""),),
    ),
    Mutant(
        "key-shared-by-users",
        "R12: users of a shard share their retry keys",
        (Edit("worker/keys.py", 'return f"ck:{{s{shard:02d}}}:n:{user_id}"', 'return f"ck:{{s{shard:02d}}}:n:0"'),),
    ),
    Mutant(
        "pending-expires",
        "D9: the pending log has an expiry",
        (
            Edit(
                "worker/lua/common.lua",
                "    error(added.err)\n  end\n  return true\n",
                "    error(added.err)\n  end\n  redis.call('PEXPIRE', log, 4000)\n  return true\n",
            ),
        ),
    ),
    Mutant(
        "cached-pending-expires",
        "D9: a cached conversation goes on expiring while something of it is pending",
        (Edit("worker/lua/append.lua", "if known[3] == '0' then  --", "if false then  --"),),
    ),
    Mutant(
        "everysec",
        "D1: the append-only file is fsynced every second, and nobody looks",
        (
            Edit("worker/embedded.py", '"appendfsync": "always"', '"appendfsync": "everysec"'),
            Edit("worker/redis.py", 'if told["appendfsync"] != "always":', 'if told["appendfsync"] == "no":'),
        ),
        only="nemesis",
    ),
    Mutant(
        "retried-append",
        "D7: the client repeats a script whose reply was lost",
        (
            Edit(
                "worker/scripts.py",
                "        self._sent.discard(call.answer)\n        _settle(call.answer, answer)\n",
                "        self._sent.discard(call.answer)\n"
                "        if isinstance(answer, Exception) and not isinstance(answer, ResponseError):\n"
                "            self._unsent.append(call)\n"
                "            self._send()\n"
                "            return\n"
                "        _settle(call.answer, answer)\n",
            ),
        ),
        only="nemesis",
    ),
    Mutant(
        "no-surrogate-check",
        "P1: text that UTF-8 cannot write is not refused",
        (Edit("worker/text.py", "    if not is_unicode(value):\n", "    if False:\n"),),
        only="nemesis",
    ),
    Mutant(
        "no-nul-check",
        "P1: text that Postgres cannot store is not refused",
        (Edit("worker/text.py", '    if "\\x00" in value:\n', "    if False:\n"),),
        only="nemesis",
    ),
    Mutant(
        "partial-page",
        "R22: without Postgres, half a page is given for a whole one",
        (
            Edit(
                "api/history.py",
                "    below = await log.threads.run(page)\n",
                "    from worker.errors import PostgresUnavailable\n\n"
                "    try:\n"
                "        below = await log.threads.run(page)\n"
                "    except PostgresUnavailable:\n"
                "        below = committed.CommittedPage(cached and cached.conversation, (), False)\n",
            ),
        ),
    ),
)


class NoSuchPlace(Exception):
    """The code that a mutant changes is no longer there: bring the mutant up to date."""


class BrokenSuite(Exception):
    """A tier did not fail, it broke: that catches nothing."""


def plant(mutant: Mutant, tree: Path) -> None:
    """Makes a copy of the tree with this bug in it."""
    for name in ("api", "worker", "tests", "migrations"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
    for name in ("alembic.ini", "pyproject.toml"):
        shutil.copy2(ROOT / name, tree / name)
    for edit in mutant.edits:
        path = tree / edit.path
        source = path.read_text(encoding="utf-8")
        if source.count(edit.old) != 1:
            raise NoSuchPlace(f"{mutant.name}: in {edit.path} there are {source.count(edit.old)} places like {edit.old.strip()[:80]!r}")
        changed = source.replace(edit.old, edit.new)
        if path.suffix == ".py":
            compile(changed, str(path), "exec")  # a bug is planted, not a slip of the pen
        path.write_text(changed, encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a mutant. `tier` is the one that caught it, '' if none did."""

    mutant: Mutant
    tier: str
    seconds: float
    said: str


def judge(mutant: Mutant, tiers: Sequence[str], seconds: float) -> Verdict:
    """Plants a bug and runs the tiers until one is red, or time is over."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chatkeep-mutant-", ignore_cleanup_errors=True) as directory:
        tree = Path(directory)
        tree.chmod(0o711)
        plant(mutant, tree)
        for tier in tiers:
            left = seconds - (time.monotonic() - started)
            code, output = _run(tree, TIERS[tier], left)
            if code == 1 and (said := _reason(output)):
                return Verdict(mutant, tier, time.monotonic() - started, said)
            if code not in (0, None):
                raise BrokenSuite(f"{mutant.name}: the {tier} tier ended with {code}:\n{output[-2000:]}")
            if left <= 0:
                break
    return Verdict(mutant, "", time.monotonic() - started, "")


def _run(tree: Path, arguments: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Runs a tier; None if it was not done in time."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    env = os.environ | {"CHATKEEP_MUTANT": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # so that it ends its servers
        try:
            output, _ = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        return None, output
    return process.returncode, output


def _reason(output: str) -> str:
    """The first violation, '' if there is none: whatever else fails is no catch."""
    found = re.search(r"^E\s+(?:AssertionError: )?(\[\d+\] .*)$", output, re.MULTILINE)
    return found[1][:160] if found else ""


def main() -> int:
    """Judges every mutant and prints the table; 1 if one was not caught, or caught by a broken test."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these")
    parser.add_argument("--tier", action="append", choices=TIERS, help="only this tier (may be given several times)")
    parser.add_argument("--list", action="store_true", help="say which there are")
    parser.add_argument("--seconds", type=float, default=SECONDS_MAX, help="for all tiers together (a busy machine needs more)")
    given = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not given.names or mutant.name in given.names]
    if unknown := set(given.names) - {mutant.name for mutant in MUTANTS}:
        parser.error("no such mutant: " + ", ".join(sorted(unknown)))
    if given.list:
        print("\n".join(f"{mutant.name:28} {mutant.what}" for mutant in chosen))
        return 0
    missed = 0
    print("| mutant | planted | caught by | after | what it said |\n| --- | --- | --- | --- | --- |", flush=True)
    for mutant in chosen:
        verdict = judge(mutant, [tier for tier in given.tier or TIERS if not mutant.only or tier == mutant.only], given.seconds)
        missed += not verdict.tier
        caught = verdict.tier or "NOBODY"
        print(f"| {mutant.name} | {mutant.what} | {caught} | {verdict.seconds:.0f} s | {_in_a_table(verdict.said)} |", flush=True)
    print(f"\n{len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed else 0


def _in_a_table(text: str) -> str:
    """Without ids, which differ from run to run, and what a table takes for its own."""
    return re.sub(r"\d{6,}", "…", text).replace("|", "/")


if __name__ == "__main__":
    sys.exit(main())
