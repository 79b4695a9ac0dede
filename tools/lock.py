"""Keep uv.lock free of addresses: `uv run tools/lock.py` strips it, `--check` proves it.

uv writes the address of every file it resolved into uv.lock, which ties the lock to one
mirror. The committed lock holds names, versions, markers and dependencies only. On the next
`uv sync`, uv sees that the workspace members are missing, resolves again with the recorded
versions as preferences, and completes the file to what it was.

`--filter` reads a lock on standard input and writes the stripped form, for the git clean
filter that CONTRIBUTING.md sets up.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "uv.lock"

_FILES = re.compile(r"^sdist = \{.*\}\n|^wheels = \[\n(?:.*\n)*?\]\n", re.MULTILINE)
_MANIFEST = re.compile(r"^\[manifest\]\n(?:.+\n)*\n?", re.MULTILINE)
_REGISTRY = re.compile(r'source = \{ registry = "[^"]*" \}')
_MEMBER = re.compile(r"^source = \{ (?:editable|virtual|directory) = ", re.MULTILINE)


def strip(lock: str) -> str:
    """Drop members, file lists and the manifest, and blank every registry. Idempotent."""
    head, *packages = re.split(r"^(?=\[\[package\]\]$)", lock, flags=re.MULTILINE)
    kept = [
        _REGISTRY.sub('source = { registry = "." }', _FILES.sub("", package)).rstrip() + "\n"
        for package in packages
        if not _MEMBER.search(package)
    ]
    stripped = "\n".join([_MANIFEST.sub("", head).rstrip() + "\n", *kept])
    if "://" in stripped:
        line = next(line for line in stripped.splitlines() if "://" in line)
        sys.exit(f"tools/lock.py: uv.lock still has an address after stripping: {line.strip()}")
    return stripped


def completed(stripped: str) -> str:
    """Return what `uv lock` makes of a stripped lock and the pyproject.toml files of now."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        for path in [ROOT / "pyproject.toml", *ROOT.glob("packages/*/pyproject.toml")]:
            target = workspace / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        lock = workspace / LOCK.name
        lock.write_text(stripped, encoding="utf-8")
        subprocess.run(["uv", "lock", "--quiet"], cwd=workspace, check=True)
        return lock.read_text(encoding="utf-8")


def committed_lock() -> str:
    """Return what git holds, or will hold where there is no commit.

    The working copy says nothing: `uv run` has completed it.
    """
    shown = subprocess.run(["git", "show", "HEAD:uv.lock"], cwd=ROOT, capture_output=True)
    if shown.returncode == 0:
        return shown.stdout.decode("utf-8")
    return strip(LOCK.read_text(encoding="utf-8"))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="fail unless the lock is up to date")
    mode.add_argument("--filter", action="store_true", help="standard input to standard output")
    args = parser.parse_args()

    if args.filter:
        # Bytes, so that no locale and no newline convention has a say.
        sys.stdout.buffer.write(strip(sys.stdin.buffer.read().decode("utf-8")).encode("utf-8"))
    elif args.check:
        committed = committed_lock()
        if committed != strip(committed):
            sys.exit("tools/lock.py: the committed uv.lock has addresses; run tools/lock.py")
        if committed != strip(completed(committed)):
            sys.exit("tools/lock.py: uv.lock does not match pyproject.toml; run `uv lock`, commit")
        print("uv.lock is up to date and has no addresses")
    else:
        LOCK.write_text(strip(LOCK.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
