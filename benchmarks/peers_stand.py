"""`python -m benchmarks.peers_stand <database url>`: Chatkeep on somebody else's Postgres, until its standard input ends.

Prints a line of JSON (port, process ids, tokens) when it is ready, and one for each line `drain`, when nothing is pending any more.
"""

from __future__ import annotations

import json
import secrets
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from api.tokens import Tokens
from benchmarks.chatkeep import Chatkeep
from benchmarks.processes import Processes
from worker.embedded import EmbeddedBroker, EmbeddedValkey

USERS = 100


def main() -> None:
    """Starts, announces, drains when told, ends."""
    secret = secrets.token_urlsafe(48)
    with ExitStack() as exits:
        home = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="chatkeep-")))
        valkey, broker = exits.enter_context(EmbeddedValkey(home)), exits.enter_context(EmbeddedBroker(home))
        processes = exits.enter_context(Processes(home, secret))
        chatkeep = exits.enter_context(Chatkeep(processes, sys.argv[1], valkey.url, broker.url, secret))
        chatkeep.start()
        tokens = Tokens(secret, 86_400)
        pids = [valkey.pid, broker.pid, *processes.pids]
        print(
            json.dumps({"port": chatkeep.ports["api"], "pids": pids, "tokens": {n: tokens.issue(n) for n in range(1, USERS + 1)}}),
            flush=True,
        )
        for line in sys.stdin:
            if line.strip() == "drain":
                chatkeep.drain()
                print("{}", flush=True)


if __name__ == "__main__":
    main()
