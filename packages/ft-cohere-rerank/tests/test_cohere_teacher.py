"""`CohereRerankTeacher` against `integration-tests/cohere_platform.py`, over a real socket."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cohere
import pytest
from cohere_platform import CoherePlatform, search_units, word_overlap
from contract_server import Reply

from ft_cohere_rerank import teacher as teacher_module
from ft_cohere_rerank.dataset import CohereRerankerFile
from ft_cohere_rerank.teacher import CohereRerankTeacher
from ft_core.datasets.rerank import RerankDataset
from ft_core.errors import ArgumentError, ArtifactError, DatasetError, GenerationError
from ft_core.jobs import open_lock

RERANK = "POST /v2/rerank"


def candidates(queries: int = 12, documents: int = 5) -> RerankDataset:
    return RerankDataset(
        examples=[
            {
                "id": f"q{n}",
                "query": f"Where is harbour number {n}?",
                "documents": [
                    {"id": f"d{n}-{m}", "text": f"A harbour number {n + m - 2}", "label": m == 2}
                    for m in range(documents)
                ],
            }
            for n in range(queries)
        ]
    )


def teacher(server: CoherePlatform, **given: Any) -> CohereRerankTeacher:
    defaults: dict[str, Any] = {
        "api_key": server.api_key,
        "base_url": server.base_url,
        "show_progress": False,
    }
    return CohereRerankTeacher(**(defaults | given))


def expected(dataset: RerankDataset) -> list[list[float]]:
    return [word_overlap(e.query, [d.text for d in e.documents]) for e in dataset.examples]


def scores(dataset: RerankDataset) -> list[list[float | None]]:
    return [[d.teacher_score for d in e.documents] for e in dataset.examples]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "scored.jsonl"


def test_each_document_gets_its_score(server: CoherePlatform, output: Path) -> None:
    dataset = candidates()
    scored = teacher(server).score(dataset, output)
    assert scores(scored) == expected(dataset)
    assert len({score for row in scores(scored) for score in row}) > 1
    assert RerankDataset.load(output) == scored
    assert scored.examples[0].documents[2].label == 1
    assert scored.examples[0].metadata["teacher"] == "rerank-v3.5"
    assert server.count(RERANK) == 12


def test_from_a_running_loop_and_with_a_client(server: CoherePlatform, output: Path) -> None:
    async def main() -> RerankDataset:
        client = cohere.AsyncClientV2(api_key=server.api_key, base_url=server.base_url)
        asked = CohereRerankTeacher(client=client, show_progress=False)
        return await asked.ascore(candidates(), output)

    assert scores(asyncio.run(main())) == expected(candidates())


def test_calls_run_at_the_same_time(server: CoherePlatform, output: Path) -> None:
    server.behaviour.rerank_seconds = 0.2
    start = time.monotonic()
    teacher(server, num_workers=12).score(candidates(), output)
    assert time.monotonic() - start < 12 * 0.2


def test_at_most_so_many_calls_start_in_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_module, "_MINUTE", 0.3)
    starts: list[float] = []

    async def main() -> None:
        limit = teacher_module._RateLimit(5)

        async def call() -> None:
            await limit.turn()
            starts.append(time.monotonic())

        await asyncio.gather(*(call() for _ in range(12)))

    asyncio.run(main())
    assert starts[4] - starts[0] < 0.3  # not one by one
    assert all(b - a >= 0.29 for a, b in zip(starts, starts[5:], strict=False))


def test_the_limit_holds_for_the_calls(
    server: CoherePlatform, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_module, "_MINUTE", 1.0)
    start = time.monotonic()
    teacher(server, calls_per_minute=5).score(candidates(), output)
    assert time.monotonic() - start >= 2.0
    assert server.count(RERANK) == 12


def test_a_service_that_allows_less_is_waited_for(server: CoherePlatform, output: Path) -> None:
    server.behaviour.rerank_per_minute, server.behaviour.minute_seconds = 5, 0.5
    asked = teacher(server, calls_per_minute=None, max_retries=20)
    assert scores(asked.score(candidates(), output)) == expected(candidates())
    assert server.count(RERANK) > 12


def test_a_second_run_asks_nothing(server: CoherePlatform, output: Path) -> None:
    first = teacher(server).score(candidates(), output)
    output.unlink()
    assert teacher(server).score(candidates(), output) == first
    assert teacher(server).score(candidates(14), output).examples[:12] == first.examples
    assert server.count(RERANK) == 14
    teacher(server, model="rerank-v4.0-pro").score(candidates(), output)
    assert server.count(RERANK) == 26


def test_a_killed_run_goes_on(server: CoherePlatform, tmp_path: Path, output: Path) -> None:
    server.behaviour.rerank_seconds = 0.2
    source = tmp_path / "candidates.jsonl"
    candidates(30).save(source)
    script = (
        "import sys; from ft_cohere_rerank import CohereRerankTeacher as T;"
        "T(base_url=sys.argv[1], num_workers=1, show_progress=False)"
        ".score(sys.argv[2], sys.argv[3])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, server.base_url, str(source), str(output)],
        env={**os.environ, "COHERE_API_KEY": server.api_key},
    )
    deadline = time.monotonic() + 240
    while server.count(RERANK, done=True) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    # The kill may have cut a request short.
    server.violations[:] = [v for v in server.violations if "Expecting value" not in v]
    server.behaviour.rerank_seconds = 0.0
    asked = server.count(RERANK)
    assert scores(teacher(server).score(source, output)) == expected(candidates(30))
    assert server.count(RERANK) - asked <= 30 - 2  # what was answered is not asked again


def test_two_queries_with_the_same_candidates_are_one_call(
    server: CoherePlatform, output: Path
) -> None:
    (example,) = candidates(1).examples
    scored = teacher(server).score(RerankDataset(examples=[example, example]), output)
    assert scores(scored) == expected(candidates(1)) * 2
    assert server.count(RERANK) == 1


def test_a_long_list_goes_in_parts(
    server: CoherePlatform, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_module, "DOCUMENTS_PER_CALL", 4)
    dataset = candidates(2, documents=10)
    assert scores(teacher(server).score(dataset, output)) == expected(dataset)
    assert server.count(RERANK) == 6


# --------------------------------------------------------------------------------------
# Before it starts


def test_the_cost_before_anything_is_sent(
    server: CoherePlatform, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = candidates(3, documents=150)
    asked = teacher(server, price_per_thousand=2.0, calls_per_minute=1)
    cost = asked.estimate(dataset)
    assert (cost.queries, cost.documents, cost.calls) == (3, 450, 3)
    billed = [search_units(e.query, [d.text for d in e.documents]) for e in dataset.examples]
    assert cost.search_units == sum(billed) == 6
    assert cost.price == pytest.approx(0.012)
    assert cost.minutes == 2
    assert server.requests == []
    with caplog.at_level(logging.INFO):
        teacher(server).score(dataset, output)
    assert "about 6 search units" in caplog.text
    assert asked.estimate(dataset, output).search_units == 0


def test_one_of_each_is_said_as_one(server: CoherePlatform) -> None:
    assert str(teacher(server).estimate(candidates(1, documents=1))) == (
        "1 query, 1 document: 1 call, about 1 search unit"
    )


def test_texts_without_spaces_cost_what_they_are_long(server: CoherePlatform) -> None:
    def units(text: str) -> int:
        texts = [{"text": f"{n}{text}"} for n in range(100)]
        return teacher(server).estimate([{"query": "q", "documents": texts}]).search_units

    assert units("漢" * 600) == 2 * units("word") == 2


def test_two_runs_do_not_pay_twice(server: CoherePlatform, output: Path) -> None:
    lock = open_lock(output)
    assert lock is not None
    with pytest.raises(GenerationError, match=r"scored\.jsonl: another run is scoring into it"):
        teacher(server).score(candidates(), output)
    assert server.requests == []
    os.close(lock)
    teacher(server).score(candidates(), output)
    teacher(server).score(candidates(), output)


def test_more_than_allowed_is_not_started(server: CoherePlatform, output: Path) -> None:
    with pytest.raises(ArgumentError, match=r"max_search_units: is 11, .*about 12 search units"):
        teacher(server, max_search_units=11).score(candidates(), output)
    assert server.requests == []


def test_what_is_cut_is_said(
    server: CoherePlatform, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = RerankDataset(
        examples=[{"query": "q", "documents": [{"text": "a b c d"}, {"text": "a"}]}]
    )
    teacher(server, max_tokens_per_doc=3).score(dataset, output)
    assert "1 document is longer, by an estimate, than 3 tokens" in caplog.text
    assert server.requests[0].body["max_tokens_per_doc"] == 3


def test_a_file_of_somebody_else_is_not_replaced(server: CoherePlatform, output: Path) -> None:
    candidates().save(output)
    with pytest.raises(GenerationError, match=r"exists, and scored\.jsonl\.journal\.jsonl"):
        teacher(server).score(output, output)
    assert server.requests == []
    output.unlink()
    teacher(server).score(candidates(), output)
    candidates().save(output)
    with pytest.raises(GenerationError, match="was changed after"):
        teacher(server).score(candidates(), output)
    journal = output.with_name("scored.jsonl.journal.jsonl")
    journal.write_text('{"other": 1}\n', encoding="utf-8")
    with pytest.raises(ArtifactError, match="is not a journal of generation"):
        teacher(server).score(candidates(), output)


@pytest.mark.parametrize(
    "given",
    [
        {"num_workers": 0},
        {"calls_per_minute": 0},
        {"max_retries": -1},
        {"timeout": 0},
        {"timeout": -1},
        {"price_per_thousand": -1},
        {"price_per_thousand": float("nan")},
        {"base_url": "nonsense"},
        {"client": cohere.ClientV2(api_key="key")},
    ],
)
def test_bad_arguments(given: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(given))):
        CohereRerankTeacher(**given)


# --------------------------------------------------------------------------------------
# Answers that do not fit


def spoiled(change: Any, times: int | None = None) -> Any:
    left = [times]

    def spoil(body: dict[str, Any]) -> dict[str, Any]:
        if left[0] == 0:
            return body
        if left[0] is not None:
            left[0] -= 1
        return body | {"results": change(body["results"])}

    return spoil


MALFORMED = [
    (lambda results: results[:-1], "4 scores for 5 documents; document . has none"),
    (lambda results: [], "0 scores for 5 documents"),
    (
        lambda results: [*results[1:], {**results[1], "relevance_score": 0.111}],
        "two scores for document",
    ),
    (lambda results: [{**results[0], "index": 5}, *results[1:]], "index 5, where 5 documents"),
    (lambda results: [{**results[0], "index": -1}, *results[1:]], "index -1"),
    (lambda results: [{**results[0], "relevance_score": None}, *results[1:]], "the score None"),
]


@pytest.mark.parametrize(("change", "message"), MALFORMED)
def test_an_answer_that_does_not_fit_is_asked_again_and_then_named(
    server: CoherePlatform, output: Path, change: Any, message: str
) -> None:
    server.behaviour.spoil = spoiled(change, times=2)
    scored = teacher(server, num_workers=1).score(candidates(3), output)
    assert scores(scored) == expected(candidates(3))
    assert server.count(RERANK) == 5

    server.behaviour.spoil = spoiled(change)
    with pytest.raises(GenerationError, match=message) as caught:
        teacher(server, model="rerank-v4.0-pro").score(candidates(3), output)
    assert "3 of 3 calls failed; the first, of query 'Where is harbour" in str(caught.value)
    assert "are kept in" in str(caught.value)  # those of the other model


def test_any_order_and_repeats_are_read_right(server: CoherePlatform, output: Path) -> None:
    server.behaviour.spoil = spoiled(lambda results: [*reversed(results), results[0]])
    assert scores(teacher(server).score(candidates(), output)) == expected(candidates())
    assert server.count(RERANK) == 12


# --------------------------------------------------------------------------------------
# Errors of the service


@pytest.mark.parametrize("what", [429, 500, 503, "drop"])
def test_what_passes_is_tried_again(server: CoherePlatform, output: Path, what: Any) -> None:
    server.fail(what, times=2, on=RERANK)
    assert scores(teacher(server).score(candidates(3), output)) == expected(candidates(3))
    assert server.count(RERANK) == 5


def test_retry_after_is_heeded(server: CoherePlatform, output: Path) -> None:
    server.fail(429, on=RERANK, retry_after=1)
    start = time.monotonic()
    teacher(server).score(candidates(1), output)
    assert 1.0 <= time.monotonic() - start < 30


def test_a_long_wait_is_told_once(
    server: CoherePlatform,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.fail(429, on=RERANK)
    teacher(server).score(candidates(1), output)
    assert "trying again" not in caplog.text
    monkeypatch.setattr(teacher_module, "_LONG_WAIT", 0.9)
    server.fail(429, times=4, on=RERANK, retry_after=1)
    teacher(server, num_workers=4).score(candidates(5), output)
    assert caplog.text.count("too many API calls; trying again in 1 s") == 1


def test_a_hanging_server_is_asked_again(server: CoherePlatform, output: Path) -> None:
    server.fail("hang", on=RERANK, seconds=3.0)
    scored = teacher(server, timeout=0.5).score(candidates(2), output)
    assert scores(scored) == expected(candidates(2))


def test_a_server_that_only_hangs_is_named(server: CoherePlatform, output: Path) -> None:
    server.fail("hang", times=9, on=RERANK, seconds=1.0)
    asked = teacher(server, timeout=0.2, max_retries=1, num_workers=1)
    with pytest.raises(GenerationError, match=f"no answer by {server.base_url} .*call again") as e:
        asked.score(candidates(2), output)
    assert "are kept" not in str(e.value)
    assert server.count(RERANK) == 2


def test_retries_end_and_keep_what_is_there(server: CoherePlatform, output: Path) -> None:
    asked = teacher(server, num_workers=1, max_retries=0)
    asked.score(candidates(2), output)
    server.fail(500, on=RERANK)
    with pytest.raises(GenerationError, match=r"answers 500: .*the scores so far are kept"):
        asked.score(candidates(4), output)
    assert scores(asked.score(candidates(4), output)) == expected(candidates(4))
    assert server.count(RERANK) == 5


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_ends_it_at_once(server: CoherePlatform, output: Path, status: int) -> None:
    server.fail(status, times=99, on=RERANK)
    with pytest.raises(GenerationError, match=rf"refuses \({status}\): .*check the API key"):
        teacher(server, num_workers=1).score(candidates(), output)
    assert server.count(RERANK) == 1


def test_a_wrong_key_or_model(server: CoherePlatform, output: Path) -> None:
    with pytest.raises(GenerationError, match="invalid api token") as caught:
        teacher(server, api_key="my-secret").score(candidates(), output)
    assert "my-secret" not in str(caught.value)
    with pytest.raises(GenerationError, match="model 'nobody' not found"):
        teacher(server, model="nobody").score(candidates(), output)


def test_one_refused_call_does_not_stop_the_others(server: CoherePlatform, output: Path) -> None:
    server.fail(400, on=RERANK)
    with pytest.raises(GenerationError, match=r"1 of 12 calls failed; .*rejects it"):
        teacher(server, num_workers=1).score(candidates(), output)
    assert not output.exists()
    assert scores(teacher(server).score(candidates(), output)) == expected(candidates())
    assert server.count(RERANK) == 13


def test_no_answer_is_said_to_be_kept_where_none_is(server: CoherePlatform, output: Path) -> None:
    server.fail(400, times=9, on=RERANK)
    with pytest.raises(GenerationError, match=r"1 of 1 call failed; .*with 5 documents") as caught:
        teacher(server).score(candidates(1), output)
    assert "kept" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "kind", "content"),
    [
        (200, "application/json", b'[{"index": 0, "score": 0.5}]'),  # Text Embeddings Inference
        (200, "application/json", b'{"results": ["a"]}'),
        (200, "text/html", b"<html>"),
        (404, "text/html", b"<html>"),
    ],
)
def test_another_api_is_named_at_once(
    server: CoherePlatform, output: Path, status: int, kind: str, content: bytes
) -> None:
    server.behaviour.foreign = Reply(content=content, status=status, content_type=kind)
    with pytest.raises(GenerationError, match=r"is no rerank answer .*; check base_url") as caught:
        teacher(server, num_workers=1).score(candidates(), output)
    assert "<html>" not in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("content", [b"{}", b"null", b'{"results": 3}'])
def test_an_answer_without_results(server: CoherePlatform, output: Path, content: bytes) -> None:
    server.behaviour.foreign = Reply(content=content, content_type="application/json")
    with pytest.raises(GenerationError, match="answers 3 times what does not fit"):
        teacher(server).score(candidates(1), output)


def test_odd_texts(server: CoherePlatform, output: Path) -> None:
    dataset = RerankDataset(
        examples=[
            {
                "query": "harbour \x00\u202e\U0001f6a2?",
                "documents": [{"text": "\x07 harbour"}, {"text": "港\u200b"}, {"text": "x" * 9999}],
            }
        ]
    )
    assert scores(teacher(server).score(dataset, output)) == expected(dataset)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([{"query": "q", "documents": []}], "documents: the query has no document"),
        ([], "has no example"),
    ],
)
def test_nothing_to_score(
    server: CoherePlatform, output: Path, examples: list[Any], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        teacher(server).score(examples, output)
    assert server.requests == []


def test_no_file_holds_the_key(server: CoherePlatform, output: Path) -> None:
    teacher(server).score(candidates(), output)
    for path in output.parent.iterdir():
        assert server.api_key not in path.read_text(encoding="utf-8")
    for line in output.read_text(encoding="utf-8").splitlines():
        assert json.loads(line)["documents"]


def test_coheres_training_file_becomes_a_students_data(
    server: CoherePlatform, tmp_path: Path, output: Path
) -> None:
    """The way that `CohereRerankerFinetuneEngine` names where fine-tuning is closed."""
    path = tmp_path / "train.jsonl"
    CohereRerankerFile.from_rerank(candidates()).save(path)
    teacher(server).score(CohereRerankerFile.load(path).to_rerank(), output)
    scored = RerankDataset.load(output)
    scored.check_trainable("teacher_score")
    scored.check_trainable("label")
    assert len(scored.to_pairs("teacher_score")) == 12 * 5
