"""tools/lock.py keeps addresses out of git and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lock
import pytest

SCHEME = ":" + "//"
FULL = f"""version = 1
revision = 5
requires-python = ">=3.10, <3.14"
resolution-markers = [
    "python_full_version >= '3.12'",
    "python_full_version < '3.12'",
]

[manifest]
members = [
    "ours",
    "ours-too",
]
overrides = [{{ name = "left", specifier = ">=1" }}]

[[package]]
name = "left"
version = "1.2.3"
source = {{ registry = "https{SCHEME}mirror.example/simple" }}
dependencies = [
    {{ name = "right", version = "4", source = {{ registry = "https{SCHEME}mirror.example/simple" }}, marker = "sys_platform == 'linux'" }},
    {{ name = "right", version = "5", source = {{ registry = "https{SCHEME}mirror.example/simple" }} }},
]
sdist = {{ url = "https{SCHEME}mirror.example/left-1.2.3.tar.gz", hash = "sha256:0a", size = 10 }}
wheels = [
    {{ url = "https{SCHEME}mirror.example/left-1.2.3-cp310.whl", hash = "sha256:0b", size = 11 }},
    {{ url = "https{SCHEME}mirror.example/left-1.2.3-cp311.whl", hash = "sha256:0c", size = 12 }},
]

[package.optional-dependencies]
fast = [
    {{ name = "right", version = "5", source = {{ registry = "https{SCHEME}mirror.example/simple" }} }},
]

[[package]]
name = "ours"
version = "0.1.0"
source = {{ virtual = "." }}
dependencies = [
    {{ name = "left" }},
]

[package.metadata]
requires-dist = [{{ name = "left", specifier = ">=1" }}]

[[package]]
name = "ours-too"
version = "0.1.0"
source = {{ editable = "packages/ours-too" }}

[[package]]
name = "right"
version = "4"
source = {{ registry = "https{SCHEME}mirror.example/simple" }}
wheels = [
    {{ url = "https{SCHEME}mirror.example/right-4-py3-none-any.whl", hash = "sha256:0d", size = 13 }},
]
"""  # noqa: E501
STRIPPED = """version = 1
revision = 5
requires-python = ">=3.10, <3.14"
resolution-markers = [
    "python_full_version >= '3.12'",
    "python_full_version < '3.12'",
]

[[package]]
name = "left"
version = "1.2.3"
source = { registry = "." }
dependencies = [
    { name = "right", version = "4", source = { registry = "." }, marker = "sys_platform == 'linux'" },
    { name = "right", version = "5", source = { registry = "." } },
]

[package.optional-dependencies]
fast = [
    { name = "right", version = "5", source = { registry = "." } },
]

[[package]]
name = "right"
version = "4"
source = { registry = "." }
"""  # noqa: E501


def lock_filter(text: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, lock.__file__, "--filter"]
    return subprocess.run(command, input=text.encode(), capture_output=True)


def git(*arguments: str, cwd: Path) -> str:
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", *arguments]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def test_strip_drops_addresses_files_and_members_and_keeps_every_version() -> None:
    assert lock.strip(FULL) == STRIPPED


def test_strip_is_idempotent() -> None:
    assert lock.strip(STRIPPED) == STRIPPED


def test_an_address_that_strip_does_not_know_is_an_error() -> None:
    other = f'source = {{ git = "https{SCHEME}forge.example/left" }}'
    with pytest.raises(SystemExit, match=r"still has an address.*forge\.example"):
        lock.strip(FULL.replace('source = { virtual = "." }', other))


def test_the_filter_reads_standard_input_and_writes_standard_output() -> None:
    result = lock_filter(FULL)

    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == STRIPPED.encode()


def test_a_filter_that_fails_writes_nothing() -> None:
    result = lock_filter(f'[[package]]\nname = "https{SCHEME}forge.example"\n')

    assert result.returncode != 0
    assert result.stdout == b""
    assert b"still has an address" in result.stderr


def test_git_commits_the_stripped_form_with_the_filter_of_contributing(tmp_path: Path) -> None:
    text = (lock.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    settings = [line.strip() for line in text.splitlines() if "git config filter.uvlock." in line]
    assert settings
    git("init", "--quiet", cwd=tmp_path)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/lock.py").write_text(Path(lock.__file__).read_text(encoding="utf-8"))
    (tmp_path / ".gitattributes").write_text((lock.ROOT / ".gitattributes").read_text())
    subprocess.run(" && ".join(settings), shell=True, check=True, cwd=tmp_path)

    (tmp_path / "uv.lock").write_text(FULL)
    git("add", ".", cwd=tmp_path)
    git("commit", "--quiet", "-m", "lock", cwd=tmp_path)
    assert git("show", "HEAD:uv.lock", cwd=tmp_path) == STRIPPED

    (tmp_path / "uv.lock").write_text(FULL)  # as `uv sync` leaves it
    assert git("status", "--porcelain", cwd=tmp_path) == ""
    (tmp_path / "uv.lock").unlink()
    git("checkout", "--", "uv.lock", cwd=tmp_path)
    assert (tmp_path / "uv.lock").read_text() == STRIPPED


def test_the_lock_of_this_repository_holds_versions_and_no_address() -> None:
    committed = lock.committed_lock()

    assert SCHEME not in committed
    assert lock.strip(committed) == committed
    assert 'name = "llama-index-core"\nversion = "' in committed
