"""What the READMEs tell a user to type works.

The `python` blocks of a README run in order as one script, in an empty folder that holds
`train.json` and `val.json`; for text-to-SQL it holds `train.jsonl`, `val.jsonl` and `shop.db`, and
for judges what `judged_answers` writes.
Three things differ from what is printed: the embedding model that has to come from a hub is
replaced by the same model from a package, the language model and the cross-encoder by tiny
untrained ones, and the address of a server by that of a small real one.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import model_assets
import pytest
import typer
from cohere_platform import CoherePlatform
from judged_answers import harbour_teacher, write_answers
from openai_platform import OpenAIPlatform, extractive_teacher
from openai_server import OpenAIServer, two_questions
from text2sql_shop import shop_pairs, write_shop

from ft_core.cli import app
from ft_embeddings.demo import corpus

ROOT = Path(__file__).resolve().parents[1]
READMES = {
    path.relative_to(ROOT).as_posix(): path
    for path in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("packages/*/README.md")))
}
HUB_EMBEDDING = "sentence-transformers/all-MiniLM-L6-v2"
HUB_LLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_CROSS_ENCODER = "cross-encoder/ms-marco-MiniLM-L6-v2"
HOSTED_LLM = "gpt-4.1-mini-2025-04-14"
LLM_SERVER = "http://127.0.0.1:8000/v1"
COHERE_SERVER = "http://127.0.0.1:8000"
COHERE_QUERIES = 256  # Cohere trains on no fewer


def only(language: str, readme: Path) -> str:
    """Return the README with every line blank that is not in a block of the language.

    So the line numbers of a traceback are those of the README.
    """
    kept, inside = [], ""
    for line in readme.read_text(encoding="utf-8").splitlines():
        fence = re.fullmatch(r"```(\w*)", line)
        if fence:
            inside = "" if inside else fence[1] or "text"
        kept.append(line if inside == language and not fence else "")
    assert not inside, f"{readme}: a block is not closed"
    return "\n".join(kept) + "\n"


def ft_commands(readme: Path) -> list[str]:
    """Return the `ft ...` lines of the console blocks, without `uv run` before and # behind."""
    text = only("console", readme).replace("\\\n", " ")
    lines = (re.sub(r"^\s*(\$ )?(uv run )?", "", line) for line in text.splitlines())
    return [line for line in lines if line.split()[:1] == ["ft"]]


def write_datasets(folder: Path, queries_each: int = 32) -> None:
    """Write `train.json` and `val.json`: a part of the demo's corpus, for the sake of time."""
    for name, whole in {"train": corpus.training(), "val": corpus.heldout()}.items():
        queries = list(whole.queries)[:queries_each]
        documents = {document for query in queries for document in whole.relevant_docs[query]}
        whole.select(queries, corpus=documents).save(folder / f"{name}.json")


def models(folder: Path) -> dict[str, str]:
    """Return the model names that the READMEs print, and what takes their places."""
    texts = list(corpus.training().corpus.values())
    llm = model_assets.tiny_causal_lm(folder / "llm", texts, window=4096)
    reranker = model_assets.tiny_cross_encoder(folder / "reranker", texts, window=512)
    return {HUB_EMBEDDING: model_assets.minilm(), HUB_LLM: llm, HUB_CROSS_ENCODER: reranker}


@contextmanager
def server(name: str) -> Iterator[tuple[str, str]]:
    """Run the server that a README talks to; yield the address that it prints, and the real one."""
    if "ft-cohere-rerank" in name:
        with CoherePlatform(api_key="none") as cohere:
            yield COHERE_SERVER, cohere.base_url
            assert [model["status"] for model in cohere.models.values()] == ["STATUS_READY"]
            assert cohere.violations == []
    elif "ft-openai-distill" in name or "ft-judge" in name:
        teacher = harbour_teacher if "ft-judge" in name else extractive_teacher
        with OpenAIPlatform(
            api_key="none", teacher=teacher, base_models={HOSTED_LLM: HOSTED_LLM}
        ) as platform:
            yield LLM_SERVER, platform.base_url
            assert [job["status"] for job in platform.jobs.values()] == ["succeeded"]
            assert platform.violations == []
    else:
        answer = shop_pairs if "ft-text2sql" in name else two_questions
        with OpenAIServer(answer=answer) as llm:
            yield LLM_SERVER, llm.url


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in READMES if only("python", READMES[name]).strip()]
)
def test_the_python_blocks_run(name: str, tmp_path: Path) -> None:
    readme = READMES[name]
    if "ft-text2sql" in name:
        write_shop(tmp_path)
    elif "ft-judge" in name:
        write_answers(tmp_path)
    else:
        write_datasets(tmp_path, COHERE_QUERIES if "ft-cohere-rerank" in name else 32)
    script = tmp_path / f"{readme.parent.name}-{readme.stem}.py"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}

    code = only("python", readme)
    for printed, local in models(tmp_path / "tiny").items():
        code = code.replace(f'"{printed}"', repr(local))
    with server(name) as (printed, url):
        script.write_text(code.replace(printed, url), encoding="utf-8")
        result = subprocess.run(
            [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

        if result.returncode:
            print(result.stdout, result.stderr)  # pytest shows it, and keeps its summary short
            pytest.fail(f"the examples of {name} end with exit code {result.returncode}")


@pytest.mark.parametrize(
    ("name", "line"),
    [(name, line) for name, readme in READMES.items() for line in ft_commands(readme)],
)
def test_the_commands_and_their_options_exist(name: str, line: str) -> None:
    command = typer.main.get_command(app)
    words = shlex.split(line, comments=True)[1:]
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"{name}: there is no `ft ... {words[0]}`"
        command = command.commands[words.pop(0)]

    known = {"--help"}.union(*(option.opts + option.secondary_opts for option in command.params))
    used = {word.split("=")[0] for word in words if word.startswith("-")}
    assert used <= known, f"{name}: `{line}`"
    # What cannot be loaded takes any arguments and has no parameter at all.
    assert command.params or hasattr(command, "commands"), command.help


@pytest.mark.parametrize("name", READMES)
def test_the_links_to_files_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", READMES[name].read_text(encoding="utf-8"))
    files = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)]

    assert [file for file in files if not (READMES[name].parent / file).exists()] == []
