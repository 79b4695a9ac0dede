"""Question generation over a real socket: the real client, failures, kills and the command."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from openai_server import API_DESCRIPTION, OpenAIServer, two_questions

pytest.importorskip("llama_index.llms.openai_like")

from llama_index.core.schema import TextNode

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import GenerationError
from ft_core.generation import generate_qa_embedding_pairs
from ft_core.llms import load_llm

NODES = 60


def make_nodes(count=NODES):
    return [
        TextNode(text=f"Pump number {i} feeds valve {7 * i}.", id_=str(i)) for i in range(count)
    ]


def spec(server):
    return f"openai-like:test@{server.url}"


@pytest.fixture
def output(tmp_path):
    return tmp_path / "questions.json"


def test_generates_over_a_socket(output):
    with OpenAIServer(latency=0.02) as server:
        dataset = generate_qa_embedding_pairs(
            make_nodes(), load_llm(spec(server)), output_path=output, workers=16
        )
        assert len(dataset.queries) == 2 * NODES
        assert server.statuses == {200: NODES}
        assert 2 <= server.most_in_flight <= 16
        assert server.problems == []


def test_requests_and_answers_fit_the_published_api(output):
    if not API_DESCRIPTION.exists():
        pytest.skip("the API description is not there: ../shared/specs/openai.json")
    pytest.importorskip("jsonschema")
    with OpenAIServer() as server:
        assert server._contract.knows_description
        generate_qa_embedding_pairs(make_nodes(2), load_llm(spec(server)), output_path=output)
        assert server.problems == []
        bad = load_llm(spec(server), additional_kwargs={"service_tier": "gold"})
        with pytest.raises(GenerationError, match="service_tier"):
            generate_qa_embedding_pairs(make_nodes(3), bad, output_path=output, seed=1)


@pytest.mark.parametrize("client_retries", [0, 3])
def test_loses_nothing_when_a_fifth_of_the_calls_fails(output, client_retries):
    with OpenAIServer(failure_rate=0.2, retry_after=0.05) as server:
        llm = load_llm(spec(server), max_retries=client_retries)
        dataset = generate_qa_embedding_pairs(
            make_nodes(), llm, output_path=output, workers=16, max_retries=8
        )
        assert len(dataset.queries) == 2 * NODES
        assert server.statuses[429] > 0
        assert server.statuses[500] > 0
        assert set(server.answered.values()) == {1}


def test_two_runs_of_one_llm_share_its_connections(output):
    with OpenAIServer() as server:
        llm = load_llm(spec(server), max_retries=0)
        for count in (10, 20, 30):
            generate_qa_embedding_pairs(make_nodes(count), llm, output_path=output, max_retries=0)
        assert server.statuses == {200: 30}


def test_a_wrong_key_stops_at_once_and_is_not_shown(output, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "my-private-key-123")
    with OpenAIServer(api_key="another") as server:
        with pytest.raises(
            GenerationError, match=r"refuses every call.*Incorrect API key"
        ) as caught:
            generate_qa_embedding_pairs(
                make_nodes(500), load_llm(spec(server)), output_path=output, workers=4
            )
        assert "my-private-key" not in str(caught.value)
        assert server.calls <= 8


def test_a_server_that_is_not_there_is_one_clear_error(output):
    with OpenAIServer() as server:
        address = spec(server)
    with pytest.raises(GenerationError, match=r"(?i)connect"):
        generate_qa_embedding_pairs(
            make_nodes(2), load_llm(address, max_retries=0), output_path=output, max_retries=1
        )


SCRIPT = """
import sys
from ft_core.generation import generate_qa_embedding_pairs
from ft_core.llms import load_llm
from llama_index.core.schema import TextNode
nodes = [TextNode(text=f"Pump number {i} feeds valve {7 * i}.", id_=str(i)) for i in range(60)]
generate_qa_embedding_pairs(nodes, load_llm(sys.argv[1]), output_path=sys.argv[2], workers=4)
"""


@pytest.mark.slow
def test_kill_9_loses_only_what_was_in_flight(output, tmp_path):
    undisturbed = tmp_path / "undisturbed.json"
    with OpenAIServer() as server:
        generate_qa_embedding_pairs(make_nodes(), load_llm(spec(server)), output_path=undisturbed)
    with OpenAIServer(latency=0.05) as server:
        killed = 0
        for _ in range(20):
            before = sum(server.answered.values())
            process = subprocess.Popen([sys.executable, "-c", SCRIPT, spec(server), str(output)])
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                if killed < 3 and sum(server.answered.values()) >= before + 11:
                    process.send_signal(signal.SIGKILL)
                    killed += 1
                    break
                time.sleep(0.005)
            if process.wait() == 0:
                break
        assert killed == 3
        assert output.read_bytes() == undisturbed.read_bytes()
        assert len(server.answered) == NODES
        # What was answered twice was in flight at a kill: at most the workers, each time.
        assert sum(server.answered.values()) <= NODES + 3 * 4


def run_command(*arguments, **environment):
    script = "import sys; from ft_core.cli import main; main(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "pumps.md").write_text(
        "# Pumps\n\n" + "".join(f"Pump {i} feeds valve {i}. " for i in range(60))
    )
    (folder / "valves.txt").write_text("A valve is opened by the crew.")
    (folder / "blank.txt").write_text("")
    return folder


def test_ft_dataset_generate(folder, output):
    with OpenAIServer(failure_rate=0.1, retry_after=0.05) as server:
        command = ("dataset", "generate", folder, "--llm", spec(server), "--output", output)
        command += ("--chunk-size", 128)
        done = run_command(*command, "--json")
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        dataset = EmbeddingQAFinetuneDataset.load(output)
        assert document["questions"] == len(dataset.queries)
        assert document["documents"] == len(dataset.corpus) > 2
        assert document["empty"] == ["blank.txt"]
        assert document["failures"] == {}
        assert "blank.txt holds no text" in done.stderr
        assert "\r" not in done.stderr  # no progress bar where nobody looks
        again = run_command(*command)
        assert again.returncode == 0, again.stderr
        assert sum(server.answered.values()) == len(server.answered) == document["documents"]


def test_ft_dataset_generate_of_a_few_at_random(folder, output):
    with OpenAIServer() as server:
        done = run_command(
            *("dataset", "generate", folder, "--llm", spec(server), "--output", output),
            *("--chunk-size", 64, "--limit", 2, "--questions", 1, "--json"),
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["questions"] == server.calls == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--llm", "gpt-4"), "Error: llm: 'gpt-4' is none of openai:MODEL"),
        (("--llm", "openai-like:m"), "has no URL"),
        (("--llm", "openai-like:m@http://x", "--workers", "0"), "Error: workers: must be"),
        (("--llm", "openai-like:m@http://x", "--limit", "0"), "Error: --limit: must be"),
        (("--llm", "openai-like:m@http://x", "--chunk-overlap", "900"), "Error: chunk_overlap"),
    ],
)
def test_ft_dataset_generate_explains_mistakes(folder, output, arguments, message):
    done = run_command("dataset", "generate", folder, "--output", output, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not output.exists()


def test_the_server_answers_what_the_client_understands():
    with OpenAIServer(answer=two_questions) as server:
        llm = load_llm(spec(server))
        text = llm.complete("<passage>\nThe pump feeds the valve.\n</passage>").text
        assert text.count("?") == 2
