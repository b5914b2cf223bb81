"""`python -m tests.crash`: the nemesis by hand, for two minutes or for hours. See README.md."""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys
import time
from pathlib import Path

from tests import schema
from tests.crash.faults import FAULTS, available
from tests.crash.nemesis import QUICK, Report, Run


def main() -> int:
    """Runs, prints the seed first and the summary last; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description="Kill, freeze and cut everything, and see what is kept.")
    parser.add_argument("--seed", type=int, help="the same choices again (default: a new one, which is printed)")
    parser.add_argument("--minutes", type=float, default=2.0, help="how long (default: 2)")
    parser.add_argument("--faults", help="only these, by comma; `quick`: one of each kind; `list`: say which there are")
    parser.add_argument("--clients", type=int, default=12, help="how many call at once (default: 12)")
    parser.add_argument("--report", type=Path, help="append the summary to this file")
    parser.add_argument("--keep", type=Path, help="leave histories and logs in this directory")
    given = parser.parse_args()
    if given.faults == "list":
        missing = available()[1]
        print("\n".join(name + (f"   (left out here: needs {missing[name]})" if name in missing else "") for name in FAULTS))
        return 0
    chosen = QUICK if given.faults == "quick" else tuple(given.faults.split(",")) if given.faults else ()
    if unknown := [name for name in chosen if name not in FAULTS]:
        parser.error("no such fault: " + ", ".join(unknown))
    seed = given.seed if given.seed is not None else secrets.randbelow(1 << 32)
    print(f"seed {seed} (repeat with --seed {seed})", flush=True)
    report = run(seed, given.minutes, chosen, given.clients, given.keep)
    summary = f"{time.strftime('%Y-%m-%d %H:%M')} {report.summary()}"
    print(summary, flush=True)
    if given.report is not None:
        with given.report.open("a", encoding="utf-8") as file:
            file.write(summary + "\n\n")
    return 1 if report.violations else 0


def run(seed: int, minutes: float, faults: tuple[str, ...], clients: int, keep: Path | None) -> Report:
    """One run in a directory of its own."""
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {line}", flush=True)

    with schema.state_directory() as directory:
        home = keep.absolute() if keep else Path(directory) / "run"
        home.mkdir(parents=True, exist_ok=True)
        home.chmod(0o711)
        return asyncio.run(Run(home, seed, say, faults, clients).go(minutes))


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    sys.exit(main())
