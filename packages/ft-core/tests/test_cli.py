"""`ft`: finds the packs' commands, survives broken ones, and answers in one way."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from textwrap import dedent

import pytest
from rich.table import Table

from ft_core import __version__, cli
from ft_core.catalogue import PACKS
from ft_core.console import note, only_json, progress_notes, show
from ft_core.datasets import (
    ChatDataset,
    EmbeddingQAFinetuneDataset,
    JudgeDataset,
    JudgeExample,
    PreferenceDataset,
    Text2SQLDataset,
)
from ft_core.evaluation import Evaluation
from ft_core.metrics import score_rankings

PACK = """
    import sys
    import typer
    from ft_core.console import JsonOption, note, show
    from ft_core.errors import DatasetError

    hello = typer.Typer()

    @hello.command()
    def say(name: str, json: JsonOption = False) -> None:
        '''Greet NAME.'''
        note("greeting")
        print("a library that prints")
        show({"hello": name}, f"hello [b]{name}", json=json)

    many = typer.Typer(help="Many things.")

    @many.command()
    def fail(json: JsonOption = False) -> None:
        '''Fail on purpose.'''
        raise DatasetError("is bad\\nreally", source="data.json")

    @many.command()
    def missing() -> None:
        '''Open what is not there.'''
        open("no/such/file")

    @many.command()
    def bug() -> None:
        '''Divide.'''
        1 / 0
"""


class Packs:
    """Installs modules and entry points for one test."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._monkeypatch = monkeypatch
        self.entries: list[metadata.EntryPoint] = []
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setattr(cli.metadata, "entry_points", lambda group: self.entries)

    def add(self, command: str, value: str, code: str) -> None:
        module = value.split(":")[0]
        (self._folder / f"{module}.py").write_text(dedent(code))
        self._monkeypatch.delitem(sys.modules, module, raising=False)
        self.entries.append(metadata.EntryPoint(command, value, cli.COMMAND_GROUP))


@pytest.fixture
def packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packs:
    packs = Packs(tmp_path, monkeypatch)
    packs.add("hello", "ft_test_pack:hello", PACK)
    packs.add("many", "ft_test_pack:many", PACK)
    return packs


class TestCommands:
    def test_a_pack_with_one_command(self, packs: Packs, capsys) -> None:
        assert cli.run(["hello", "[i]you"]) == 0
        out, err = capsys.readouterr()
        assert out == "a library that prints\nhello [b][i]you\n"
        assert err == "greeting\n"

    def test_json_is_all_there_is_on_stdout(self, packs: Packs, capsys) -> None:
        assert cli.run(["hello", "数", "--json"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out) == {"hello": "数"}
        assert err == "greeting\na library that prints\n"

    def test_help_lists_them(self, packs: Packs, capsys) -> None:
        assert cli.run(["--help"]) == 0
        out = capsys.readouterr().out
        for words in ("dataset", "report", "hello", "Greet NAME", "many", "Many things"):
            assert words in out

    def test_only_the_invoked_one_is_imported(self, packs: Packs, capsys) -> None:
        packs.add("other", "ft_test_other:app", "raise RuntimeError('imported')")
        assert cli.run(["hello", "you"]) == 0
        assert "ft_test_other" not in sys.modules
        assert cli.run(["--version", "--json"]) == 0
        assert "other" in json.loads(capsys.readouterr().out.split("\n", 2)[2])["commands"]

    def test_an_unknown_one_is_guessed(self, packs: Packs, capsys) -> None:
        assert cli.run(["helo"]) == 2
        assert "Did you mean 'hello'?" in capsys.readouterr().err

    def test_the_same_distribution_twice_on_the_path(self, packs: Packs, capsys) -> None:
        packs.add("hello", "ft_test_pack:hello", PACK)
        assert cli.run(["hello", "you"]) == 0


class TestBrokenPack:
    @pytest.mark.parametrize(
        ("code", "reason"),
        [
            ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
            ("1 / 0", "ZeroDivisionError: division by zero"),
            ("raise SystemExit(3)", "SystemExit: 3"),
            ("", "AttributeError: module 'ft_test_broken' has no attribute 'app'"),
            ("app = 1", "TypeError: ft_test_broken:app is not a typer.Typer"),
            ("import typer; app = typer.Typer()", "RuntimeError: Could not get a command"),
        ],
    )
    def test_is_said_and_harms_no_other(
        self, packs: Packs, capsys, monkeypatch, code: str, reason: str
    ) -> None:
        packs.add("broken", "ft_test_broken:app", code)
        monkeypatch.setenv("COLUMNS", "200")
        assert cli.run(["--help"]) == 0
        out = capsys.readouterr().out
        assert f"cannot be loaded: {reason}" in out
        assert "Greet NAME" in out
        for arguments in (["broken"], ["broken", "sub", "--option", "-x", "--help"]):
            assert cli.run(arguments) == 1
            out, err = capsys.readouterr()
            assert err.startswith("Error: ft_test_broken: `ft broken` cannot be loaded: " + reason)
            assert err.count("\n") == 1
            assert not out
        assert cli.run(["hello", "you"]) == 0

    def test_two_that_bring_one_command(self, packs: Packs, capsys) -> None:
        packs.add("hello", "ft_test_second:hello", PACK)
        assert cli.run(["hello", "you"]) == 1
        err = capsys.readouterr().err
        assert "ft_test_pack, ft_test_second" in err
        assert "uninstall one" in err

    def test_none_replaces_our_own(self, packs: Packs, capsys) -> None:
        packs.add("report", "ft_test_second:hello", PACK)
        assert cli.run(["report", "--help"]) == 0
        assert "Compare evaluations" in capsys.readouterr().out


class TestErrors:
    def test_one_line_and_no_traceback(self, packs: Packs, capsys) -> None:
        assert cli.run(["many", "fail"]) == 1
        out, err = capsys.readouterr()
        assert (out, err) == ("", "Error: data.json: is bad really\n")

    def test_json(self, packs: Packs, capsys) -> None:
        assert cli.run(["many", "fail", "--json"]) == 1
        out, err = capsys.readouterr()
        assert json.loads(out) == {
            "error": {"type": "DatasetError", "message": "data.json: is bad really"}
        }
        assert err == "Error: data.json: is bad really\n"

    def test_files(self, packs: Packs, capsys) -> None:
        assert cli.run(["many", "missing"]) == 1
        assert capsys.readouterr().err == "Error: no/such/file: No such file or directory\n"

    def test_a_bug_shows_its_traceback(self, packs: Packs) -> None:
        with pytest.raises(ZeroDivisionError):
            cli.run(["many", "bug"])

    def test_wrong_usage(self, packs: Packs, capsys) -> None:
        assert cli.run(["many", "fail", "--no-such", "--json"]) == 2
        out, err = capsys.readouterr()
        error = json.loads(out)["error"]
        assert error["type"] == "UsageError"
        assert "--no-such" in error["message"]
        assert "--no-such" in err

    def test_json_goes_after_the_command(self, packs: Packs, capsys) -> None:
        assert cli.run(["--json", "many", "fail"]) == 2
        assert (
            "put --json after the command"
            in json.loads(capsys.readouterr().out)["error"]["message"]
        )


class TestVersionAndCatalogue:
    def test_version(self, packs: Packs, capsys, monkeypatch) -> None:
        monkeypatch.setattr(cli, "installed_version", {"ft-judge": "9.9"}.get)
        assert cli.run(["--version"]) == 0
        assert capsys.readouterr().out == f"ft-core {__version__}\nft-judge 9.9\n"
        assert cli.run(["--version", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["version"] == __version__
        assert document["packs"] == {"ft-judge": "9.9"}
        assert document["commands"] == ["dataset", "report", "hello", "many"]

    def test_what_an_install_would_add(self, packs: Packs, capsys, monkeypatch) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(cli, "installed_version", {"ft-judge": "9.9"}.get)
        assert cli.run(["--help"]) == 0
        out = capsys.readouterr().out
        for name, summary in PACKS.items():
            assert summary in out
            assert (f"pip install {name}" in out) == (name != "ft-judge")
        assert out.index("hello") < out.index("ft-judge") < out.index("pip install")

    def test_help_loads_nothing_heavy(self) -> None:
        code = (
            "import sys; from ft_core.cli import run\n"
            "assert run(['--help']) == 0\n"
            "heavy = {'torch', 'transformers', 'sentence_transformers', 'llama_index',"
            " 'matplotlib', 'jinja2', 'openai', 'datasets', 'numpy'}\n"
            "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


class TestProcess:
    """The console script itself, in a process of its own, with a pack that is really installed."""

    @pytest.fixture
    def site(self, tmp_path: Path) -> Path:
        (tmp_path / "ft_slow.py").write_text(
            dedent("""
            import sys, time, typer
            app = typer.Typer()

            @app.command()
            def sleep() -> None:
                print("asleep", flush=True)
                time.sleep(60)

            @app.command()
            def flood() -> None:
                for _ in range(100_000):
                    print("x" * 100)
            """)
        )
        info = tmp_path / "ft_slow-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ft-slow\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[ft_core.commands]\nslow = ft_slow:app\n")
        return tmp_path

    def start(self, site: Path, *arguments: str) -> subprocess.Popen[str]:
        path = filter(None, [os.environ.get("PYTHONPATH")])
        return subprocess.Popen(
            [sys.executable, "-c", "from ft_core.cli import main; main()", *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *path])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def test_an_installed_pack_is_found(self, site: Path) -> None:
        with self.start(site, "--help") as process:
            out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "ft-slow" in out

    def test_ctrl_c(self, site: Path) -> None:
        with self.start(site, "slow", "sleep") as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "asleep\n"
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err == ""

    def test_the_reader_has_gone(self, site: Path) -> None:
        with self.start(site, "slow", "flood") as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            err = process.stderr.read()
            process.wait(timeout=60)
        assert process.returncode == 1
        assert err == ""


class TestShow:
    def test_a_mapping_as_two_columns(self, capsys) -> None:
        show({"queries": 3, "[b]": "x"})
        assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
            ["queries", "3"],
            ["[b]", "x"],
        ]

    def test_strings_are_left_alone(self, capsys) -> None:
        show(None, "[red]" + "long/" * 50)
        assert capsys.readouterr().out == "[red]" + "long/" * 50 + "\n"

    def test_anything_rich_can_print(self, capsys) -> None:
        show(None, Table("heading"))
        assert "heading" in capsys.readouterr().out

    def test_json_holds_only_what_json_can(self, capsys) -> None:
        import numpy as np

        document = {
            "path": Path("a/b"),
            "nan": float("nan"),
            "numpy": np.float32(0.5),
            "rows": np.array([[1, 2]]),
            "set": {1},
            3: ("a",),
        }
        show(document, json=True)
        assert json.loads(capsys.readouterr().out) == {
            "path": "a/b",
            "nan": None,
            "numpy": 0.5,
            "rows": [[1, 2]],
            "set": [1],
            "3": ["a"],
        }

    def test_a_name_that_is_not_unicode(self, capsys) -> None:
        show({"file": os.fsdecode(b"\xff.json"), "text": "数"}, json=True)
        assert json.loads(capsys.readouterr().out)["text"] == "数"

    def test_only_json(self, capsys) -> None:
        with only_json():
            print("noise")
            note("remark")
            show({}, json=True)
        print("after")
        assert capsys.readouterr() == ("{}\nafter\n", "noise\nremark\n")

    def test_progress_notes(self, capsys) -> None:
        names = ("ft_core.jobs", "ft_core.sft.engine", "ft_pack.engine")
        loggers = [logging.getLogger(name) for name in names]
        before = [(logger.level, logger.handlers[:]) for logger in loggers]
        with progress_notes("ft_pack"):
            for number, logger in enumerate(loggers):
                logger.info("step %d", number)
                logger.debug("detail")
        loggers[0].info("after")
        assert capsys.readouterr() == ("", "step 0\nstep 1\nstep 2\n")
        assert [(logger.level, logger.handlers) for logger in loggers] == before


class TestReportCommand:
    @pytest.fixture
    def files(self, tmp_path: Path) -> list[str]:
        dataset = EmbeddingQAFinetuneDataset(
            queries={f"q{i}": f"question {i}" for i in range(30)},
            corpus={f"d{i}": f"document {i}" for i in range(30)},
            relevant_docs={f"q{i}": [f"d{i}"] for i in range(30)},
        )
        dataset.save(tmp_path / "dataset.json")
        for name, shift in (("base", 1), ("tuned", 0)):
            rankings = {
                f"q{i}": [f"d{(i - shift) % 30}", f"d{(i - shift + 1) % 30}"] for i in range(30)
            }
            Evaluation(
                name="model",
                dataset_hash=dataset.content_hash,
                scores=score_rankings(dataset.qrels, rankings, ["hit_rate@1", "ndcg@10"]),
                rankings=rankings,
                seconds=1,
            ).save(tmp_path / f"{name}.json")
        return [
            "report",
            f"base={tmp_path / 'base.json'}",
            f"tuned={tmp_path / 'tuned.json'}",
            "--dataset",
            str(tmp_path / "dataset.json"),
        ]

    def test_table(self, files: list[str], capsys) -> None:
        assert cli.run(files) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "tuned is better than base in nDCG@10: +0.369" in out

    def test_json_and_html(self, files: list[str], tmp_path: Path, capsys) -> None:
        page = tmp_path / "out" / "report.html"
        assert cli.run([*files, "--baseline", "tuned", "--html", str(page), "--json"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["baseline"] == "tuned"
        assert err == f"wrote {page}\n"
        assert page.read_text(encoding="utf-8").startswith("<!doctype html>")

    def test_one_name_twice(self, files: list[str], tmp_path: Path, capsys) -> None:
        plain = [part.partition("=")[2] or part for part in files]
        assert cli.run(plain) == 1
        assert "two runs are called 'model'" in capsys.readouterr().err

    def test_not_an_evaluation(self, files: list[str], tmp_path: Path, capsys) -> None:
        wrong = str(tmp_path / "dataset.json")
        assert cli.run(["report", wrong, "--dataset", wrong]) == 1
        assert f"{wrong}: name: not a saved evaluation" in capsys.readouterr().err


class TestDatasetCommands:
    @pytest.fixture
    def source(self, tmp_path: Path) -> str:
        EmbeddingQAFinetuneDataset(
            queries={
                "q0": "Why is the sky blue?",
                "q1": "why is the sky blue",
                "q2": "Who wrote Faust?",
                "q3": "How tall is a giraffe?",
            },
            corpus={
                f"d{i}": f"{word} " * 5 for i, word in enumerate(("sky", "play", "zoo", "sea"))
            },
            relevant_docs={"q0": ["d0"], "q1": ["d0"], "q2": ["d1"], "q3": ["d2"]},
        ).save(tmp_path / "data.json")
        return str(tmp_path / "data.json")

    def run(self, capsys, *arguments: object) -> dict[str, object]:
        assert cli.run(["dataset", *map(str, arguments), "--json"]) == 0
        document: dict[str, object] = json.loads(capsys.readouterr().out)
        return document

    def test_stats(self, source: str, capsys) -> None:
        assert self.run(capsys, "stats", source)["queries"] == 4

    def test_check(self, source: str, capsys) -> None:
        found = self.run(capsys, "check", source)
        assert found["equal queries"] == [["q0", "q1"]]
        assert found["documents without a query"] == ["d3"]
        assert cli.run(["dataset", "check", source]) == 0
        assert "equal queries: 1 (q0 = q1)" in capsys.readouterr().out

    def test_check_of_bad_content(self, tmp_path: Path, capsys) -> None:
        (tmp_path / "bad.json").write_text('{"queries": {"q": "?"}, "corpus": {')
        assert cli.run(["dataset", "check", str(tmp_path / "bad.json")]) == 1
        assert "ends in the middle" in capsys.readouterr().err

    @pytest.mark.parametrize("by", ["query", "document"])
    def test_split(self, source: str, tmp_path: Path, capsys, by: str) -> None:
        options = ("--by", by, "--fractions", "a=1, b=1", "--output-dir", tmp_path / "parts")
        parts = self.run(capsys, "split", source, *options)
        assert list(parts) == ["a", "b"]
        queries = [
            set(EmbeddingQAFinetuneDataset.load(tmp_path / "parts" / f"{name}.json").queries)
            for name in parts
        ]
        assert queries[0] | queries[1] == {"q0", "q1", "q2", "q3"}
        assert not queries[0] & queries[1]
        assert cli.run(["dataset", "split", source, *map(str, options)]) == 1
        assert "exists; name another folder" in capsys.readouterr().err
        assert self.run(capsys, "split", source, *options, "--overwrite") == parts

    @pytest.mark.parametrize(
        "fractions", ["", "a", "a=x", "a=0", "a=-1", "a=nan", "../a=1", "=1", "a=1,a=1"]
    )
    def test_wrong_fractions(self, source: str, tmp_path: Path, capsys, fractions: str) -> None:
        command = ["dataset", "split", source, "--fractions", fractions]
        assert cli.run([*command, "--output-dir", str(tmp_path / "parts")]) == 1
        assert capsys.readouterr().err.startswith("Error: --fractions: ")
        assert not (tmp_path / "parts").exists()

    def test_convert_there_and_back(self, source: str, tmp_path: Path, capsys) -> None:
        pytest.importorskip("datasets")
        beir, saved, back = tmp_path / "beir", tmp_path / "hf", tmp_path / "back.json"
        assert self.run(capsys, "convert", source, beir)["format"] == "beir"
        self.run(capsys, "convert", beir, saved, "--to", "huggingface")
        assert self.run(capsys, "convert", saved, back)["format"] == "json"
        before, after = map(EmbeddingQAFinetuneDataset.load, (source, back))
        assert after.content_hash == before.content_hash
        for target in (saved, back):
            assert cli.run(["dataset", "convert", source, str(target)]) == 1
            assert f"{target} exists" in capsys.readouterr().err

    def test_convert_to_one_more_split_of_a_beir_folder(
        self, source: str, tmp_path: Path, capsys
    ) -> None:
        for name in ("test", "dev"):
            self.run(capsys, "convert", source, tmp_path / "beir", "--beir-split", name)
        assert self.run(capsys, "stats", tmp_path / "beir", "--beir-split", "dev")["queries"] == 4


def judged_pair(number: int, flipped: float = 1.0) -> JudgeExample:
    return JudgeExample(
        task="pairwise",
        query=f"What moors boat {'abcdefgh'[number] * 4}?",
        answer="A rope.",
        second_answer="A wish.",
        verdict=1.0,
        flipped_verdict=flipped,
    )


class TestJudgements:
    """The same commands on a teacher's verdicts."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> str:
        pairs = [*map(judged_pair, range(5)), judged_pair(0), judged_pair(5, flipped=0.0)]
        JudgeDataset(examples=pairs).save(tmp_path / "verdicts.jsonl")
        return str(tmp_path / "verdicts.jsonl")

    def run(self, capsys, *arguments: object) -> dict[str, object]:
        assert cli.run(["dataset", *map(str, arguments), "--json"]) == 0
        document: dict[str, object] = json.loads(capsys.readouterr().out)
        return document

    def test_stats(self, source: str, capsys) -> None:
        found = self.run(capsys, "stats", source)
        assert (found["examples"], found["pairs judged alike in both"]) == (7, 6)

    def test_check_says_what_cannot_teach(self, source: str, capsys) -> None:
        found = self.run(capsys, "check", source)
        assert found["repeated examples"] == 1
        assert found["the two orders disagree"] == 1
        assert found["repeats merged into one"] == 1
        assert found["examples of equal questions"] == [["1", "6"]]
        assert cli.run(["dataset", "check", source]) == 0
        assert "every example is right\nexamples: 7\n" in capsys.readouterr().out

    def test_check_where_nothing_can_teach(self, tmp_path: Path, capsys) -> None:
        file = tmp_path / "torn.jsonl"
        JudgeDataset(examples=[judged_pair(0, flipped=0.0)]).save(file)
        assert cli.run(["dataset", "check", str(file)]) == 0
        assert "no judge can learn from this" in capsys.readouterr().err

    def test_a_bad_verdict(self, tmp_path: Path, capsys) -> None:
        line = '{"task": "pairwise", "query": "?", "answer": "a", "second_answer": "b", '
        (tmp_path / "bad.jsonl").write_text(line + '"verdict": 0.7}\n')
        assert cli.run(["dataset", "check", str(tmp_path / "bad.jsonl")]) == 1
        assert "bad.jsonl: line 1, verdict: 0.7 is none of" in capsys.readouterr().err
        (tmp_path / "bad.jsonl").write_text('{"query": "?", "answer": "a", "contexts": ["c"]}')
        assert cli.run(["dataset", "check", str(tmp_path / "bad.jsonl")]) == 1
        assert "bad.jsonl: line 1, task: " in capsys.readouterr().err
        (tmp_path / "bad.jsonl").write_text('{"question": "How many?"}')
        assert cli.run(["dataset", "check", str(tmp_path / "bad.jsonl")]) == 1
        assert "bad.jsonl: line 1, sql: " in capsys.readouterr().err

    def test_split_keeps_a_question_on_one_side(self, source: str, tmp_path: Path, capsys) -> None:
        options = ("--fractions", "a=1, b=1", "--output-dir", tmp_path / "parts")
        parts = self.run(capsys, "split", source, *options)
        loaded = [JudgeDataset.load(tmp_path / "parts" / f"{name}.jsonl") for name in "ab"]
        assert [part["examples"] for part in parts.values()] == list(map(len, loaded))
        asked = [{example.query for example in part} for part in loaded]
        assert not asked[0] & asked[1]
        assert sum(map(len, loaded)) == 7

    @pytest.mark.parametrize("option", [("--by", "document"), ("--corpus", "all"), ("--by", "sql")])
    def test_what_judgements_lack(
        self, source: str, tmp_path: Path, capsys, option: tuple[str, str]
    ) -> None:
        command = ["dataset", "split", source, "--output-dir", str(tmp_path / "parts"), *option]
        assert cli.run(command) == 1
        reason = "sql is for questions with SQL" if "sql" in option else "judgements split by query"
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "parts").exists()

    def test_there_is_nothing_to_convert_to(self, source: str, tmp_path: Path, capsys) -> None:
        for target in ("new.jsonl", "new.json", "new"):
            assert cli.run(["dataset", "convert", source, str(tmp_path / target)]) == 1
            assert "holds judgements: there is no other format" in capsys.readouterr().err
            assert not (tmp_path / target).exists()


class TestQuestionsWithSQL:
    """The same commands on text-to-SQL pairs."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> str:
        towns = ["Arlow", "Brennick", "Cawdry"]
        pairs = [
            (f"Who lives in {t}?", f"SELECT name FROM people WHERE town = '{t}'") for t in towns
        ]
        pairs += [("How many people are there?", "SELECT count(*) FROM people")]
        Text2SQLDataset(
            examples=[{"question": q, "sql": sql, "database": "people"} for q, sql in pairs]
        ).save(tmp_path / "pairs.jsonl")
        return str(tmp_path / "pairs.jsonl")

    def run(self, capsys, *arguments: object) -> dict[str, object]:
        assert cli.run(["dataset", *map(str, arguments), "--json"]) == 0
        document: dict[str, object] = json.loads(capsys.readouterr().out)
        return document

    def test_stats_and_check(self, source: str, tmp_path: Path, capsys) -> None:
        found = self.run(capsys, "stats", source)
        assert found["distinct SQL queries, literals apart"] == 2
        assert self.run(capsys, "check", source)["repeated examples"] == 0
        (tmp_path / "bad.jsonl").write_text('{"question": "Who?", "sql": "SELECT 1"}\n')
        assert cli.run(["dataset", "check", str(tmp_path / "bad.jsonl")]) == 1
        assert "bad.jsonl: line 1, context: is empty" in capsys.readouterr().err

    @pytest.mark.parametrize("by", [None, "query", "sql"])
    def test_split(self, source: str, tmp_path: Path, capsys, by: str | None) -> None:
        options = ["--fractions", "a=1, b=1", "--output-dir", tmp_path / "parts"]
        options += [] if by is None else ["--by", by]
        self.run(capsys, "split", source, *options)
        a, b = (Text2SQLDataset.load(tmp_path / "parts" / f"{name}.jsonl") for name in "ab")
        assert len(a) + len(b) == 4
        shared = {e.anonymous_sql() for e in a} & {e.anonymous_sql() for e in b}
        assert not shared or by != "sql"
        if by == "sql":
            assert sorted(map(len, (a, b))) == [1, 3]

    def test_what_there_is_not(self, source: str, tmp_path: Path, capsys) -> None:
        command = ["dataset", "split", source, "--output-dir", str(tmp_path / "parts")]
        for option in (["--by", "document"], ["--by", "sql", "--corpus", "all"]):
            assert cli.run([*command, *option]) == 1
            assert "questions with SQL split by query" in capsys.readouterr().err
        assert cli.run(["dataset", "convert", source, str(tmp_path / "new")]) == 1
        assert "holds questions with SQL: there is no other format" in capsys.readouterr().err


class TestConversations:
    """The same commands on JSON Lines of conversations."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> str:
        questions = [
            "Why is the sky blue?",
            "why is the sky blue",
            "Who wrote Faust?",
            "Why is it?",
        ]
        ChatDataset(
            examples=[
                {
                    "messages": [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": "So it is."},
                    ],
                    "metadata": {"id": str(index)},
                }
                for index, question in enumerate([*questions, questions[-1]])
            ]
        ).save(tmp_path / "journal.jsonl")
        return str(tmp_path / "journal.jsonl")

    @pytest.fixture
    def preferences(self, tmp_path: Path) -> str:
        PreferenceDataset(
            examples=[
                {
                    "input": {"messages": [{"role": "user", "content": question}]},
                    "preferred_output": [{"role": "assistant", "content": "Yes, it is."}],
                    "non_preferred_output": [{"role": "assistant", "content": "No."}],
                }
                for question in ("Is it?", "Who wrote Faust?")
            ]
        ).save(tmp_path / "preferences.jsonl")
        return str(tmp_path / "preferences.jsonl")

    def run(self, capsys, *arguments: object) -> dict[str, object]:
        assert cli.run(["dataset", *map(str, arguments), "--json"]) == 0
        document: dict[str, object] = json.loads(capsys.readouterr().out)
        return document

    def test_stats(self, source: str, preferences: str, capsys) -> None:
        found = self.run(capsys, "stats", source)
        assert (found["examples"], found["distinct questions"]) == (5, 3)
        assert self.run(capsys, "stats", preferences)["median words per preferred answer"] == 3

    def test_check(self, source: str, tmp_path: Path, capsys) -> None:
        found = self.run(capsys, "check", source)
        assert found["repeated examples"] == 1
        assert found["examples of equal questions"] == [["1", "2"], ["4", "5"]]
        assert cli.run(["dataset", "check", source]) == 0
        assert "every message is right\nexamples: 5\n" in capsys.readouterr().out
        (tmp_path / "bad.jsonl").write_text('{"messages": []}\n')
        assert cli.run(["dataset", "check", str(tmp_path / "bad.jsonl")]) == 1
        assert "bad.jsonl: line 1, messages: there is no message" in capsys.readouterr().err

    def test_split(self, source: str, tmp_path: Path, capsys) -> None:
        options = ("--fractions", "a=1, b=1", "--output-dir", tmp_path / "parts")
        parts = self.run(capsys, "split", source, *options)
        loaded = [ChatDataset.load(tmp_path / "parts" / f"{name}.jsonl") for name in "ab"]
        assert [part["examples"] for part in parts.values()] == list(map(len, loaded))
        ids = [{example.metadata["id"] for example in part} for part in loaded]
        assert ids[0] | ids[1] == set("01234")
        for pair in ({"0", "1"}, {"3", "4"}):
            assert pair <= ids[0] or pair <= ids[1]
        assert cli.run(["dataset", "split", source, *map(str, options)]) == 1
        assert "exists; name another folder" in capsys.readouterr().err
        assert self.run(capsys, "split", source, *options, "--overwrite", "--by", "query") == parts

    @pytest.mark.parametrize("option", [("--by", "document"), ("--corpus", "all")])
    def test_there_are_no_documents(
        self, source: str, tmp_path: Path, capsys, option: tuple[str, str]
    ) -> None:
        command = ["dataset", "split", source, "--output-dir", str(tmp_path / "parts"), *option]
        assert cli.run(command) == 1
        assert "conversations split by query" in capsys.readouterr().err
        assert not (tmp_path / "parts").exists()

    def test_convert_a_journal_for_openai(
        self, source: str, preferences: str, tmp_path: Path, capsys
    ) -> None:
        target = tmp_path / "openai.jsonl"
        done = self.run(capsys, "convert", source, target)
        assert done == {"output": str(target), "format": "openai", "examples": 5}
        lines = [json.loads(line) for line in target.read_text().splitlines()]
        assert [list(line) for line in lines] == [["messages"]] * 5
        assert cli.run(["dataset", "convert", source, str(target)]) == 1
        assert f"{target} exists" in capsys.readouterr().err
        self.run(capsys, "convert", preferences, tmp_path / "dpo.jsonl")
        assert (tmp_path / "dpo.jsonl").read_text() == Path(preferences).read_text()

    def test_convert_to_what_it_is_not(self, source: str, tmp_path: Path, capsys) -> None:
        qa = tmp_path / "qa.json"
        EmbeddingQAFinetuneDataset(
            queries={"q": "?"}, corpus={"d": "."}, relevant_docs={"q": ["d"]}
        ).save(qa)
        for wrong in ((source, tmp_path / "new"), (source, "a.json"), (qa, tmp_path / "a.jsonl")):
            assert cli.run(["dataset", "convert", *map(str, wrong)]) == 1
            assert f"{wrong[1]} will not do" in capsys.readouterr().err
            assert not Path(wrong[1]).exists()
