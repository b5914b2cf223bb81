"""Which Chromium the tests drive, and how it is started."""

from __future__ import annotations

import os
import shutil

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome-stable", "google-chrome")
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
MISSING = "no Chromium: set CHROMIUM to its path, or install one (Debian: apt install chromium)"
WIDE = {"width": 1280, "height": 800}
NARROW = {"width": 390, "height": 844}


def find() -> str | None:
    """`CHROMIUM`, or the first that is found on the path."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
