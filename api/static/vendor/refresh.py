"""Fetches the vendored files again, in the versions named here, and writes VENDOR.md: `python api/static/vendor/refresh.py` (needs npm).

The files are byte for byte what the npm packages hold. A test compares them with the sums in VENDOR.md.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[2] / "tests" / "browser" / "vendor"


@dataclass(frozen=True)
class Package:
    """One npm package: which of its files are kept, and under which name."""

    name: str
    version: str
    licence: str
    files: dict[str, str]
    purpose: str


SHIPPED = (
    Package("marked", "18.2.1", "MIT", {"lib/marked.esm.js": "marked.js", "LICENSE": "marked.LICENSE"}, "markdown to HTML"),
    Package(
        "dompurify",
        "3.4.18",
        "Apache-2.0 OR MPL-2.0",
        {"dist/purify.es.mjs": "purify.js", "LICENSE": "purify.LICENSE", "LICENSE-MPL": "purify.LICENSE-MPL"},
        "takes out of that HTML what could act",
    ),
    Package(
        "@highlightjs/cdn-assets",
        "11.12.0",
        "BSD-3-Clause",
        {"es/highlight.min.js": "highlight.js", "LICENSE": "highlight.LICENSE"},
        "colours code; loaded when a code block appears",
    ),
)
TEST_ONLY = (
    Package(
        "axe-core",
        "4.14.1",
        "MPL-2.0",
        {"axe.min.js": "axe.js", "LICENSE": "axe.LICENSE", "LICENSE-3RD-PARTY.txt": "axe.LICENSE-3RD-PARTY"},
        "looks for barriers; used by the tests, never sent to anybody",
    ),
)


def main() -> None:
    """Fetch everything and write both lists."""
    for directory, packages in ((HERE, SHIPPED), (TESTS, TEST_ONLY)):
        directory.mkdir(parents=True, exist_ok=True)
        for package in packages:
            _fetch(package, directory)
        (directory / "VENDOR.md").write_text(_describe(packages, directory))


def _fetch(package: Package, directory: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = ["npm", "pack", "--silent", "--json", f"{package.name}@{package.version}", "--pack-destination", scratch]
        packed = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)
        with tarfile.open(Path(scratch) / packed[0]["filename"]) as archive:
            for inside, name in package.files.items():
                member = archive.extractfile(f"package/{inside}")
                if member is None:
                    raise FileNotFoundError(f"{inside} in {package.name} {package.version}")
                (directory / name).write_bytes(member.read())


def _describe(packages: tuple[Package, ...], directory: Path) -> str:
    lines = [
        "# What is not ours in this directory",
        "",
        "Byte for byte out of the npm packages; `api/static/vendor/refresh.py` fetches them again and writes this list.",
        "",
        "| package | version | for | licence | file | bytes | SHA-256 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for package in packages:
        for name in package.files.values():
            content = (directory / name).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            lines.append(
                f"| {package.name} | {package.version} | {package.purpose} | {package.licence} | {name} | {len(content)} | `{digest}` |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
