"""Files that are whole or absent: killed processes and refused writes are real ones here."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_core.errors import ArtifactError, DatasetError
from ft_core.files import (
    Journal,
    atomic_folder,
    atomic_write,
    content_hash,
    parse_json,
    read_jsonl,
    restore_folder,
)


def run(program, *arguments):
    """Run a program in a process of its own and return its exit status."""
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.run(command, check=False).returncode


def names(folder):
    return sorted(os.listdir(folder))


# atomic_write


def test_a_file_is_written_with_its_folders(tmp_path):
    path = tmp_path / "a" / "b.txt"
    with atomic_write(path) as file:
        file.write("été\n")
    assert path.read_text(encoding="utf-8") == "été\n"
    assert names(path.parent) == ["b.txt"]


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted():
        with atomic_write(path) as file:
            file.write("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_modes_follow_the_old_file_or_the_umask(tmp_path):
    old = tmp_path / "old"
    old.write_text("")
    old.chmod(0o640)
    umask = os.umask(0o027)
    try:
        for path in (old, tmp_path / "new"):
            with atomic_write(path) as file:
                file.write("x")
    finally:
        os.umask(umask)
    assert [os.stat(tmp_path / name).st_mode & 0o777 for name in ("old", "new")] == [0o640, 0o640]


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "real" / "file.txt")
    with atomic_write(link) as file:
        file.write("x")
    assert link.is_symlink()
    assert (tmp_path / "real" / "file.txt").read_text() == "x"


# atomic_folder


def put(path, text):
    with atomic_folder(path) as partial:
        (partial / "weights").write_text(text)


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "out" / "model"
    put(path, "one")
    (path / "leftover").write_text("")
    put(path, "two")
    assert names(path) == ["weights"]
    assert (path / "weights").read_text() == "two"
    assert names(path.parent) == ["model"]


def test_a_folder_has_the_usual_rights(tmp_path):
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "mine").touch(mode=0o600)
        (folder / "tool").touch(mode=0o755)
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "model" / "mine").stat().st_mode == usual
    assert (tmp_path / "model" / "tool").stat().st_mode & 0o100


def test_an_error_in_the_block_leaves_the_old_folder(tmp_path):
    path = tmp_path / "model"
    put(path, "one")

    def failing():
        with atomic_folder(path) as partial:
            (partial / "weights").write_text("two")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert (path / "weights").read_text() == "one"
    assert names(tmp_path) == ["model"]


def test_a_folder_behind_a_symbolic_link_is_replaced_there(tmp_path):
    (tmp_path / "large-disk").mkdir()
    put(tmp_path / "large-disk" / "model", "one")
    link = tmp_path / "model"
    link.symlink_to(tmp_path / "large-disk" / "model")
    put(link, "two")
    assert link.is_symlink()
    assert (tmp_path / "large-disk" / "model" / "weights").read_text() == "two"
    assert names(tmp_path) == ["large-disk", "model"]


# Kills itself (SIGKILL) when it is about to make its nth rename, or to delete.
KILLED_FOLDER = """
    import os, shutil, signal, sys
    from ft_core.files import atomic_folder
    path, nth = sys.argv[1], int(sys.argv[2])
    calls, rename = 0, os.rename
    def counted(*names):
        global calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*names)
    def half_deleted(path, **options):
        os.unlink(os.path.join(path, "weights"))
        os.kill(os.getpid(), signal.SIGKILL)
    os.rename, shutil.rmtree = counted, half_deleted
    with atomic_folder(path) as partial:
        (partial / "weights").write_text("two")
        (partial / "more").write_text("two")
"""


@pytest.mark.parametrize(("nth", "left"), [(1, "one"), (2, "one"), (3, "two"), (4, "two")])
def test_a_kill_at_any_rename_leaves_a_whole_folder(tmp_path, nth, left):
    path = tmp_path / "model"
    put(path, "one")
    (path / "more").write_text("one")
    assert run(KILLED_FOLDER, path, nth) == -signal.SIGKILL
    restore_folder(path)
    assert {name: (path / name).read_text() for name in names(path)} == {
        "weights": left,
        "more": left,
    }
    put(path, "three")
    assert (path / "weights").read_text() == "three"


def test_what_a_kill_left_half_deleted_is_never_put_back(tmp_path):
    path = tmp_path / "model"
    put(path, "one")
    (path / "more").write_text("one")
    assert run(KILLED_FOLDER, path, 4) == -signal.SIGKILL
    shutil.move(path, tmp_path / "elsewhere")
    restore_folder(path)
    assert not path.exists()


def test_a_write_that_the_kernel_refuses_leaves_the_old_folder(tmp_path):
    path = tmp_path / "model"
    put(path, "one")
    program = """
        import resource, sys
        from ft_core.files import atomic_folder
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            with atomic_folder(sys.argv[1]) as partial:
                (partial / "weights").write_text("x" * 5000)
        except OSError:
            sys.exit(7)
    """
    assert run(program, path) == 7
    assert (path / "weights").read_text() == "one"
    assert names(tmp_path) == ["model"]


# JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b": }', "line 2, column 7: not JSON: Expecting value"),
        ('{"a": 1,\n "b": [1, 2', "line 2, column 12: not JSON: ends in the middle"),
        ('{"a": "text', "line 1, column 7: not JSON: ends in the middle (truncated?)"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' stands twice in one object"),
    ],
)
def test_bad_json_is_named_with_its_place(text, message):
    with pytest.raises(DatasetError) as caught:
        parse_json(text, source="x.json")
    assert str(caught.value).startswith(f"x.json: {message}")


def test_json_lines_keep_their_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"a": "\u2028"}\r\n\r\n  \n[1]\n'.encode())
    assert list(read_jsonl(path)) == [(1, {"a": "\u2028"}), (4, [1])]
    path.write_text('{"a": 1}\n\n{"a": 1, "a": 2}\n')
    with pytest.raises(DatasetError, match=r"a\.jsonl: line 3: the key 'a' stands twice"):
        list(read_jsonl(path))
    path.write_text('{"a": 1}\n{"a": 1\n')
    with pytest.raises(DatasetError, match=r"a\.jsonl: line 2, column 8: not JSON: ends"):
        list(read_jsonl(path))


def test_the_hash_ignores_the_order_of_keys_alone():
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": [1, 2], "a": 1})
    assert content_hash({"a": [1, 2]}) != content_hash({"a": [2, 1]})


# Journal

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
records = st.dictionaries(st.text(), json_values, min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(records, min_size=1, max_size=3), records, st.data())
def test_a_journal_cut_anywhere_keeps_the_records_before_and_after(
    tmp_path_factory, before, after, data
):
    journal = Journal(tmp_path_factory.mktemp("journal") / "new" / "a.jsonl")
    assert list(journal.records()) == []
    for record in before:
        journal.append(record)
    whole = journal.path.read_bytes()
    start = len(whole[:-1].rpartition(b"\n")[0]) + (1 if len(before) > 1 else 0)
    journal.path.write_bytes(whole[: data.draw(st.integers(start, len(whole) - 2))])
    kept = before[:-1]
    assert list(journal.records()) == kept
    journal.append(after)
    assert list(journal.records()) == [*kept, after]


def test_a_record_whose_line_break_was_lost_is_kept(tmp_path):
    journal = Journal(tmp_path / "a.jsonl")
    journal.append({"a": 1})
    journal.path.write_bytes(journal.path.read_bytes()[:-1])
    journal.append({"a": 2})
    assert list(journal.records()) == [{"a": 1}, {"a": 2}]


def test_half_a_surrogate_pair_is_journalled(tmp_path):
    journal = Journal(tmp_path / "a.jsonl")
    journal.append({"text": "a\ud800b", "other": "日本"})
    assert list(journal.records()) == [{"text": "a\ud800b", "other": "日本"}]


@pytest.mark.parametrize("text", ["# A list of things\n", "a,b\n1,2\n", '{\n  "pretty": 1\n}\n'])
def test_a_file_that_is_no_journal_is_refused_and_untouched(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=r"notes\.txt: line \d is not a journal record"):
        list(Journal(path).records())
    assert path.read_text() == text


def test_many_threads_and_processes_write_whole_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    program = """
        import sys
        from ft_core.files import Journal
        journal = Journal(sys.argv[1])
        for number in range(200):
            journal.append({"writer": sys.argv[2], "number": number, "text": "x" * 3000})
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(path)]
    processes = [subprocess.Popen([*command, f"p{i}"]) for i in range(2)]
    journal = Journal(path)

    def write(name):
        for number in range(200):
            journal.append({"writer": name, "number": number, "text": "y" * 3000})

    threads = [threading.Thread(target=write, args=(f"t{i}",)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait() for process in processes] == [0, 0]
    numbers = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        numbers.setdefault(record["writer"], []).append(record["number"])
    assert numbers == {name: list(range(200)) for name in ("p0", "p1", "t0", "t1", "t2")}


def test_a_full_disk_raises_and_costs_no_earlier_record(tmp_path):
    path = tmp_path / "a.jsonl"
    Journal(path).append({"number": 1})
    program = """
        import resource, sys
        from ft_core.files import Journal
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            Journal(sys.argv[1]).append({"number": 2, "text": "x" * 5000})
        except OSError:
            sys.exit(7)
    """
    assert run(program, path) == 7
    assert path.read_text() == '{"number":1}\n'
    Journal(path, durable=True).append({"number": 3})
    assert list(Journal(path).records()) == [{"number": 1}, {"number": 3}]
