"""The Cohere platform server, spoken to by hand and by the real SDK."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from cohere_platform import API_DESCRIPTION, TUNED, CoherePlatform, cosines, search_units
from contract_server import Reply

NOWHERE = Path("/nowhere/cohere.json")

needs_description = pytest.mark.skipif(
    not API_DESCRIPTION.exists(), reason="needs ../shared/specs/cohere.json"
)


def row(number: int) -> dict[str, Any]:
    return {
        "query": f"which port does service {number} listen on",
        "relevant_passages": [f"service {number}: number {8000 + number}"],
        "hard_negatives": [
            f"which port does a service listen on, asked {number} times",
            f"port of service {number + 1} which does listen on",
        ],
    }


def jsonl(count: int = 256, first: int = 0) -> bytes:
    return b"".join(json.dumps(row(first + n)).encode() + b"\n" for n in range(count))


@pytest.fixture
def server() -> Iterator[CoherePlatform]:
    before = set(threading.enumerate())
    with CoherePlatform(state_seconds=0.01, dataset_seconds=0.01) as server:
        yield server
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not [name for name in left if name.startswith(("cohere-platform", "finetune-"))]
    assert not [name for name in left if "process_request" in name]


@pytest.fixture
def client(server: CoherePlatform) -> Iterator[httpx.Client]:
    with raw(server) as client:
        yield client


def raw(server: CoherePlatform, **settings: Any) -> httpx.Client:
    headers = {"Authorization": f"Bearer {server.api_key}"}
    return httpx.Client(base_url=server.base_url, headers=headers, timeout=30, **settings)


def rerank(client: httpx.Client, documents: list[Any], **given: Any) -> httpx.Response:
    body = {"model": "rerank-v3.5", "query": "red apple pie", "documents": documents} | given
    return client.post("/v2/rerank", json=body)


def upload(client: httpx.Client, data: bytes | None = None, **given: Any) -> httpx.Response:
    files = {"data": ("train.jsonl", jsonl() if data is None else data)}
    if "eval_data" in given:
        files["eval_data"] = ("eval.jsonl", given.pop("eval_data"))
    query = {"name": "ports", "type": "reranker-finetune-input"} | given
    return client.post("/v1/datasets", params=query, files=files)


def validated(client: httpx.Client, data: bytes | None = None, **given: Any) -> dict[str, Any]:
    """Upload, wait, and return the dataset as the service tells it."""
    return settled(client, upload(client, data, **given).raise_for_status().json()["id"])


def settled(client: httpx.Client, dataset_id: str) -> dict[str, Any]:
    for _ in range(1000):
        dataset: dict[str, Any] = client.get(f"/v1/datasets/{dataset_id}").json()["dataset"]
        if dataset["validation_status"] not in ("queued", "processing"):
            return dataset
        time.sleep(0.005)
    raise TimeoutError


def wanted(dataset_id: str, **settings: Any) -> dict[str, Any]:
    base = {"name": "english", "base_type": "BASE_TYPE_RERANK"}
    return {
        "name": "ports-ft",
        "settings": {"base_model": base, "dataset_id": dataset_id} | settings,
    }


def create(client: httpx.Client, dataset_id: str, **settings: Any) -> httpx.Response:
    return client.post(TUNED, json=wanted(dataset_id, **settings))


@needs_description
class TestRerank:
    def test_v2_orders_by_score(self, server: CoherePlatform, client: httpx.Client) -> None:
        body = rerank(client, ["a blue car", "red apple pie", "an apple"]).json()
        assert [result["index"] for result in body["results"]] == [1, 2, 0]
        assert [result["relevance_score"] for result in body["results"]] == [1, 1 / 3, 0]
        assert body["meta"]["billed_units"] == {"search_units": 1}
        top = rerank(client, ["a blue car", "red apple pie", "an apple"], top_n=1).json()["results"]
        assert [result["index"] for result in top] == [1]
        assert server.violations == []

    def test_v1_takes_documents_and_gives_them_back(
        self, server: CoherePlatform, client: httpx.Client
    ) -> None:
        documents = ["a car", {"text": "red pie", "page": 7}, {"title": "red apple pie"}]
        body = {"query": "red apple pie", "documents": documents[:2], "return_documents": True}
        results = client.post("/v1/rerank", json=body).json()["results"]
        assert results[0]["document"] == {"text": "red pie", "page": 7}
        assert results[1]["document"] == {"text": "a car"}
        bare = client.post("/v1/rerank", json=body | {"return_documents": False}).json()
        assert "document" not in bare["results"][0]
        many = client.post("/v1/rerank", json=body | {"max_chunks_per_doc": 6000})
        assert (many.status_code, "10000" in many.json()["message"]) == (400, True)
        assert server.violations == []

    def test_minilm_scores(self) -> None:
        from model_assets import minilm

        with CoherePlatform(score=cosines(minilm())) as server, raw(server) as client:
            texts = ["Trains leave from platform two.", "A kitten slept.", "Dogs bark."]
            given = {"query": "Where does the young cat sleep?"}
            with ThreadPoolExecutor(4) as pool:
                answers = [
                    answer.json()["results"]
                    for answer in pool.map(lambda _: rerank(client, texts, **given), range(8))
                ]
            assert all(answer == answers[0] for answer in answers)
            assert [result["index"] for result in answers[0]] == [1, 2, 0]
            assert 0.6 < answers[0][0]["relevance_score"] < 1
            assert server.violations == []

    def test_long_documents_are_cut(self, server: CoherePlatform, client: httpx.Client) -> None:
        text = "filler " * 5 + "red apple pie"
        whole = rerank(client, [text]).json()["results"][0]["relevance_score"]
        cut = rerank(client, [text], max_tokens_per_doc=6).json()["results"][0]["relevance_score"]
        assert (whole, cut) == (1, 1 / 3)

    def test_search_units(self) -> None:
        assert search_units("q", ["a"] * 100) == 1
        assert search_units("q", ["a"] * 101) == 2
        assert search_units("q", ["a " * 499] * 51) == 1
        assert search_units("q", ["a " * 500] * 51) == 2

    @pytest.mark.parametrize(
        ("given", "status", "text"),
        [
            ({"documents": []}, 400, "list of documents must not be empty"),
            ({"query": " \n"}, 400, "query must not be empty or be only whitespace"),
            ({"model": "rerank-english-v2.0"}, 404, "model 'rerank-english-v2.0' not found"),
            ({"model": "0000-ft"}, 404, "model '0000-ft' not found"),
            ({"top_n": 0}, 422, "minimum"),
            ({"documents": ["a", 3]}, 422, "not of type 'string'"),
            ({"documents": ["a"] * 10_001}, 400, "at most 10000 - received 10001"),
            ({"top_k": 3}, 422, "parameter 'top_k' is not a valid field"),
        ],
    )
    def test_refusals(
        self, client: httpx.Client, given: dict[str, Any], status: int, text: str
    ) -> None:
        response = rerank(client, **{"documents": ["a"]} | given)
        assert (response.status_code, text in response.json()["message"]) == (status, True)

    def test_missing_model_and_broken_json(
        self, server: CoherePlatform, client: httpx.Client
    ) -> None:
        response = client.post("/v2/rerank", json={"query": "a", "documents": ["b"]})
        assert (response.status_code, "'model'" in response.json()["message"]) == (400, True)
        response = client.post(
            "/v2/rerank", content=b'{"query": ', headers={"Content-Type": "application/json"}
        )
        assert (response.status_code, "json" in response.json()["message"]) == (400, True)
        assert len(server.violations) == 2

    def test_empty_documents_where_they_are_refused(
        self, server: CoherePlatform, client: httpx.Client
    ) -> None:
        assert rerank(client, ["a", ""]).status_code == 200
        server.behaviour.refuses_empty_documents = True
        assert rerank(client, ["a", ""]).status_code == 400

    def test_a_minute_holds_so_many_calls(
        self, server: CoherePlatform, client: httpx.Client
    ) -> None:
        server.behaviour.rerank_per_minute = 2
        server.behaviour.minute_seconds = 0.5
        codes = [rerank(client, ["a"]) for _ in range(3)]
        assert [response.status_code for response in codes] == [200, 200, 429]
        assert codes[-1].headers["retry-after"] == "1"
        time.sleep(0.5)
        assert rerank(client, ["a"]).status_code == 200

    def test_a_spoilt_answer(self, server: CoherePlatform, client: httpx.Client) -> None:
        server.behaviour.spoil = lambda body: body | {"results": body["results"][:1] * 2}
        results = rerank(client, ["a blue car", "red apple pie"]).json()["results"]
        assert [result["index"] for result in results] == [1, 1]
        assert server.violations == []


@needs_description
class TestKeysAndFaults:
    def test_keys(self, server: CoherePlatform, client: httpx.Client) -> None:
        assert client.post("/v1/check-api-key").json()["valid"] is True
        with httpx.Client(base_url=server.base_url) as stranger:
            response = stranger.get("/v1/datasets")
            assert (response.status_code, response.json()["message"]) == (
                401,
                "no api key supplied",
            )
            response = stranger.get("/v1/datasets", headers={"Authorization": "Bearer x"})
            assert (response.status_code, response.json()["message"]) == (401, "invalid api token")
        assert not [
            name for request in server.requests for name in request.headers if "auth" in name
        ]

    @pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 429, 500, 503, 504])
    def test_any_status(self, server: CoherePlatform, client: httpx.Client, status: int) -> None:
        server.fail(status, on="POST /v2/rerank", times=2, retry_after=3)
        responses = [rerank(client, ["a"]) for _ in range(3)]
        assert [response.status_code for response in responses] == [status, status, 200]
        assert responses[0].json()["message"]
        assert responses[0].headers.get("retry-after") == ("3" if status == 429 else None)
        assert server.count("POST /v2/rerank", done=True) == 1

    def test_a_fault_after_the_work(self, server: CoherePlatform, client: httpx.Client) -> None:
        server.fail(500, on="/v1/datasets", done=True)
        assert upload(client).status_code == 500
        assert len(server.datasets) == 1

    def test_hang_and_drop(self, server: CoherePlatform) -> None:
        server.fail("hang", seconds=30)
        server.fail("drop")
        with raw(server) as client:
            client.timeout = httpx.Timeout(0.2)
            with pytest.raises(httpx.ReadTimeout):
                rerank(client, ["a"])
            with pytest.raises(httpx.RemoteProtocolError):
                rerank(client, ["a"])
            assert rerank(client, ["a"]).status_code == 200

    def test_unknown_url(self, server: CoherePlatform, client: httpx.Client) -> None:
        assert client.get("/v1/chat").status_code == 404
        assert len(server.violations) == 1

    def test_models(self, server: CoherePlatform, client: httpx.Client) -> None:
        names = [card["name"] for card in client.get("/v1/models").json()["models"]]
        assert "rerank-v3.5" in names
        assert client.get("/v1/models", params={"endpoint": "chat"}).json() == {"models": []}
        assert client.get("/v1/models/rerank-v3.5").json()["finetuned"] is False
        assert client.get("/v1/models/none").status_code == 404
        assert server.violations == []


@needs_description
class TestDatasets:
    def test_states_and_metrics(self, server: CoherePlatform, client: httpx.Client) -> None:
        server.behaviour.dataset_seconds = 0.2
        dataset_id = upload(client, eval_data=jsonl(64, first=1000)).json()["id"]
        seen = []
        while not seen or seen[-1] not in ("validated", "failed"):
            answer = client.get(f"/v1/datasets/{dataset_id}").json()["dataset"]
            seen.append(answer["validation_status"])
            time.sleep(0.02)
        assert [status for status, _ in itertools.groupby(seen)] == [
            "queued",
            "processing",
            "validated",
        ]
        metrics = answer["metrics"]["finetune_dataset_metrics"]
        assert (metrics["train_examples"], metrics["eval_examples"]) == (256, 64)
        assert metrics["reranker_data_metrics"]["num_train_hard_negatives"] == 512
        assert server.datasets[dataset_id]["data"] == jsonl()
        assert server.violations == []

    def test_without_evaluation_data_a_fifth_is_held_out(self, client: httpx.Client) -> None:
        metrics = validated(client)["metrics"]["finetune_dataset_metrics"]
        assert (metrics["train_examples"], metrics["eval_examples"]) == (205, 51)

    def test_list_usage_delete(self, server: CoherePlatform, client: httpx.Client) -> None:
        first, second = validated(client)["id"], validated(client, b"{}", name="other")["id"]
        ids = [dataset["id"] for dataset in client.get("/v1/datasets").json()["datasets"]]
        assert ids == [second, first]
        listed = client.get("/v1/datasets", params={"validationStatus": "failed"}).json()
        assert [dataset["id"] for dataset in listed["datasets"]] == [second]
        listed = client.get("/v1/datasets", params={"limit": 1, "offset": 1}).json()
        assert [dataset["id"] for dataset in listed["datasets"]] == [first]
        past = {"before": "2020-01-01T00:00:00Z"}
        assert client.get("/v1/datasets", params=past).json() == {"datasets": []}
        used = client.get("/v1/datasets/usage").json()["organization_usage"]
        assert used == len(jsonl()) + 2
        assert client.delete(f"/v1/datasets/{first}").json() == {}
        assert client.get(f"/v1/datasets/{first}").status_code == 404
        assert client.delete(f"/v1/datasets/{first}").status_code == 404
        assert server.violations == []

    @pytest.mark.parametrize(
        ("line", "text"),
        [
            (b"{", "not JSON (line: 257)"),
            (b"[]", "not a JSON object (line: 257)"),
            (b'{"query": "a", "relevant_passages": ["b"]}', "field hard_negatives was not found"),
            (b'{"query": " ", "relevant_passages": ["b"], "hard_negatives": []}', "query must"),
            (b'{"query": "a", "relevant_passages": [], "hard_negatives": []}', "at least one"),
            (b'{"query": "a", "relevant_passages": "b", "hard_negatives": []}', "list of texts"),
            (b'{"query": "a", "relevant_passages": ["b"], "hard_negatives": ["b"]}', "both in"),
            (b'"\xff"', "UTF-8"),
        ],
    )
    def test_a_bad_line(self, client: httpx.Client, line: bytes, text: str) -> None:
        dataset = validated(client, jsonl() + line)
        assert (dataset["validation_status"], text in dataset["validation_error"]) == (
            "failed",
            True,
        ), dataset["validation_error"]

    def test_malformed_lines_can_be_skipped(self, client: httpx.Client) -> None:
        dataset = validated(client, jsonl() + b"{", skip_malformed_input="true")
        assert dataset["validation_status"] == "validated"
        assert "line: 257" in dataset["validation_warnings"][0]

    def test_empty_and_repeated_negatives_are_removed(self, client: httpx.Client) -> None:
        line = row(999) | {"hard_negatives": ["x", "", "x"]}
        dataset = validated(client, jsonl(255) + json.dumps(line).encode())
        assert dataset["validation_warnings"] == [
            "removed 2 empty or repeated hard_negatives (line: 256)"
        ]

    @pytest.mark.parametrize(
        ("train", "evaluation", "text"),
        [
            (jsonl(255), None, "at least 256 valid train examples"),
            (jsonl(255) + jsonl(1), None, "but there are 255"),
            (jsonl(), jsonl(63), "at least 64 valid evaluation examples"),
        ],
    )
    def test_too_few(
        self, client: httpx.Client, train: bytes, evaluation: bytes | None, text: str
    ) -> None:
        given = {} if evaluation is None else {"eval_data": evaluation}
        assert text in validated(client, train, **given)["validation_error"]

    def test_refused_at_once(self, server: CoherePlatform, client: httpx.Client) -> None:
        def message(response: httpx.Response) -> str:
            assert response.status_code in (400, 422), response.text
            text: str = response.json()["message"]
            return text

        assert "less than 50" in message(upload(client, name="x" * 50))
        assert "cannot be empty" in message(upload(client, name=""))
        assert "is not one of" in message(upload(client, type="rerank"))
        server.behaviour.dataset_bytes = 10
        assert "larger" in message(upload(client))
        server.behaviour.dataset_bytes = server.behaviour.capacity_bytes = len(jsonl())
        upload(client).raise_for_status()
        assert "capacity" in message(upload(client))
        assert server.datasets != {}
        response = client.post(
            "/v1/datasets",
            params={"name": "a", "type": "reranker-finetune-input"},
            files={"file": ("a.jsonl", jsonl())},
        )
        assert "'data' is a required property" in message(response)

    def test_wrong_extension(self, client: httpx.Client) -> None:
        query = {"name": "a", "type": "reranker-finetune-input"}
        response = client.post("/v1/datasets", params=query, files={"data": ("a.csv", jsonl())})
        assert "only jsonl" in settled(client, response.json()["id"])["validation_error"]


@needs_description
class TestFineTuning:
    def test_states_events_metrics_and_rerank(
        self, server: CoherePlatform, client: httpx.Client
    ) -> None:
        numbers = {"train_epochs": 3, "train_batch_size": 8}
        created = create(client, validated(client)["id"], hyperparameters=numbers).json()
        model = created["finetuned_model"]
        assert model["status"] == "STATUS_QUEUED"
        assert model["settings"]["hyperparameters"]["learning_rate"] == 0.01
        assert model["settings"]["hyperparameters"]["train_epochs"] == 3
        server.wait_for(model["id"], "STATUS_READY", "STATUS_FAILED")
        model = client.get(f"{TUNED}/{model['id']}").json()["finetuned_model"]
        assert (model["status"], model["completed_at"] >= model["created_at"]) == (
            "STATUS_READY",
            True,
        )
        events = client.get(f"{TUNED}/{model['id']}/events").json()
        assert [event["status"] for event in events["events"]] == [
            "STATUS_QUEUED",
            "STATUS_FINETUNING",
            "STATUS_DEPLOYING_API",
            "STATUS_READY",
        ]
        lines = client.get(f"{TUNED}/{model['id']}/training-step-metrics").json()["step_metrics"]
        assert [line["step_number"] for line in lines] == [0, 1, 2, 3]
        assert lines[0]["metrics"]["mrr@10"] < 0.5 < lines[-1]["metrics"]["mrr@10"]

        query, passages = row(7)["query"], row(7)["hard_negatives"] + row(7)["relevant_passages"]
        before = rerank(client, passages, query=query).json()["results"]
        tuned = rerank(client, passages, query=query, model=model["id"] + "-ft").json()["results"]
        assert (before[0]["index"], tuned[0]["index"]) == (0, 2)
        assert rerank(client, passages, model=model["id"]).status_code == 404  # without -ft
        card = client.get(f"/v1/models/{model['id']}-ft").json()
        assert (card["finetuned"], card["context_length"]) == (True, 510)
        assert server.violations == []

    def test_pages(self, server: CoherePlatform, client: httpx.Client) -> None:
        dataset = validated(client)["id"]
        ids = [create(client, dataset).json()["finetuned_model"]["id"] for _ in range(3)]
        page = client.get(TUNED, params={"page_size": 2}).json()
        assert [model["id"] for model in page["finetuned_models"]] == ids[:2]
        rest = client.get(TUNED, params={"page_token": page["next_page_token"]}).json()
        assert [model["id"] for model in rest["finetuned_models"]] == ids[2:]
        assert (rest["next_page_token"], rest["total_size"]) == ("", 3)
        newest = client.get(TUNED, params={"order_by": "created_at desc"}).json()
        assert [model["id"] for model in newest["finetuned_models"]] == ids[::-1]
        assert client.get(TUNED, params={"order_by": "name"}).status_code == 400
        assert client.get(TUNED, params={"page_token": "x"}).status_code == 400
        assert server.violations == []

    def test_one_training_at_a_time(self, server: CoherePlatform, client: httpx.Client) -> None:
        server.behaviour.step_seconds = 0.2
        dataset = validated(client)["id"]
        first, second = (create(client, dataset).json()["finetuned_model"]["id"] for _ in "ab")
        seen = set()
        while True:
            statuses = [server.models[model]["status"] for model in (first, second)]
            seen.add(tuple(sorted(statuses)))
            if statuses == ["STATUS_READY"] * 2:
                break
            time.sleep(0.01)
        assert ("STATUS_FINETUNING", "STATUS_QUEUED") in seen
        assert ("STATUS_FINETUNING", "STATUS_FINETUNING") not in seen

    def test_delete_while_it_trains(self, server: CoherePlatform, client: httpx.Client) -> None:
        server.behaviour.step_seconds = 60
        model = create(client, validated(client)["id"]).json()["finetuned_model"]["id"]
        server.wait_for(model, "STATUS_FINETUNING")
        assert rerank(client, ["a"], model=model + "-ft").status_code == 400  # not ready
        assert client.delete(f"{TUNED}/{model}").json() == {}
        for path in ("", "/events", "/training-step-metrics"):
            assert client.get(f"{TUNED}/{model}{path}").status_code == 404
        assert server.models == {}

    def test_failed_and_forced_states(self, server: CoherePlatform, client: httpx.Client) -> None:
        server.behaviour.failing = True
        dataset = validated(client)["id"]
        model = create(client, dataset).json()["finetuned_model"]["id"]
        server.wait_for(model, "STATUS_FAILED")
        assert rerank(client, ["a"], model=model + "-ft").status_code == 400
        server.set_status(model, "STATUS_TEMPORARILY_OFFLINE")
        told = client.get(f"{TUNED}/{model}").json()["finetuned_model"]["status"]
        assert told == "STATUS_TEMPORARILY_OFFLINE"
        server.set_status(dataset, "skipped")
        assert "is skipped" in create(client, dataset).json()["message"]
        assert server.violations == []

    def test_refusals(self, server: CoherePlatform, client: httpx.Client) -> None:
        good, bad = validated(client)["id"], validated(client, b"{")["id"]
        other = validated(client, type="chat-finetune-input")["id"]
        chat = {"name": "english", "base_type": "BASE_TYPE_CHAT"}
        tiny = {"name": "tiny", "base_type": "BASE_TYPE_RERANK"}
        for response, status, text in (
            (create(client, "nothing"), 404, "'nothing' was not found"),
            (create(client, bad), 400, "is failed"),
            (create(client, other), 400, "has type chat-finetune-input"),
            (create(client, good, base_model=chat), 400, "BASE_TYPE_CHAT"),
            (create(client, good, base_model=tiny), 400, "'tiny' does not exist"),
            (create(client, good, hyperparameters={"train_epochs": 0}), 400, "train_epochs"),
            (client.post(TUNED, json=wanted(good) | {"seed": 1}), 400, "'seed'"),
            (client.post(TUNED, json={"name": "a"}), 400, "'settings' is a required"),
        ):
            message = response.json()["message"]
            assert (response.status_code, text in message) == (status, True), message
        server.behaviour.jobs_per_day = 1
        assert create(client, good).status_code == 200
        assert "at most 1 fine-tuning jobs" in create(client, good).json()["message"]
        assert len(server.models) == 1

    def test_closed(self, server: CoherePlatform, client: httpx.Client) -> None:
        dataset = validated(client)["id"]
        model = create(client, dataset).json()["finetuned_model"]["id"]
        server.wait_for(model, "STATUS_READY")
        server.behaviour.fine_tuning = "closed"
        response = create(client, dataset)
        assert (response.status_code, "deprecated" in response.json()["message"]) == (403, True)
        assert rerank(client, ["a"], model=model + "-ft").status_code == 200
        assert client.get(f"{TUNED}/{model}").status_code == 200

    def test_removed(self, server: CoherePlatform, client: httpx.Client) -> None:
        server.behaviour.fine_tuning = "removed"
        response = client.get(TUNED)
        assert (response.status_code, response.text) == (404, "404 page not found")
        assert "dataset type is invalid" in upload(client).json()["message"]
        assert rerank(client, ["a"]).status_code == 200


class WrongPlatform(CoherePlatform):
    def rerank_v2(self, call: Any) -> Reply:
        reply = super().rerank_v2(call)
        assert reply.body is not None
        reply.body["results"][0]["relevance_score"] = "high"
        return reply

    def get_dataset(self, call: Any, dataset_id: str) -> Reply:
        reply = super().get_dataset(call, dataset_id)
        assert reply.body is not None
        reply.body["dataset"]["validation_status"] = "fine"
        return reply

    def get_tuned(self, call: Any, model_id: str) -> Reply:
        reply = super().get_tuned(call, model_id)
        assert reply.body is not None
        reply.body["finetuned_model"]["status"] = "STATUS_DONE"
        return reply


@needs_description
def test_wrong_answers_are_caught() -> None:
    with WrongPlatform(dataset_seconds=0) as server, raw(server) as client:
        dataset = upload(client).json()["id"]
        model = create(client, dataset).json()["finetuned_model"]["id"]
        for call in (
            lambda: rerank(client, ["a"]),
            lambda: client.get(f"/v1/datasets/{dataset}"),
            lambda: client.get(f"{TUNED}/{model}"),
        ):
            before = len(server.violations)
            response = call()
            assert response.status_code == 500
            assert "wrong answer of the server" in response.json()["message"]
            assert server.violations[before].startswith("answer: ")
        assert len(server.violations) == 3


@needs_description
def test_a_bad_score_function_is_told() -> None:
    with (
        CoherePlatform(score=lambda query, documents: [2.0]) as server,
        raw(server) as client,
    ):
        assert rerank(client, ["a"]).status_code == 500
        assert "between 0 and 1" in server.violations[0]


@needs_description
def test_as_a_process_of_its_own() -> None:
    command = [sys.executable, str(Path(__file__).with_name("cohere_platform.py"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline())
            headers = {"Authorization": f"Bearer {said['api_key']}"}
            response = httpx.get(f"{said['base_url']}/v1/datasets", headers=headers)
            assert response.json() == {"datasets": []}
        finally:
            process.terminate()


class TestSDK:
    """The real client, and LlamaIndex's postprocessor."""

    @pytest.fixture(params=["description", "types"])
    def server(self, request: pytest.FixtureRequest) -> Iterator[CoherePlatform]:
        pytest.importorskip("cohere")
        if request.param == "description" and not API_DESCRIPTION.exists():
            pytest.skip("needs ../shared/specs/cohere.json")
        description = API_DESCRIPTION if request.param == "description" else NOWHERE
        settings = {"description": description, "state_seconds": 0.01, "dataset_seconds": 0.01}
        with CoherePlatform(**settings) as server:
            yield server

    def test_fine_tuning_from_upload_to_rerank(
        self, server: CoherePlatform, tmp_path: Path
    ) -> None:
        import cohere
        from cohere.finetuning import BaseModel, FinetunedModel, Hyperparameters, Settings

        client = cohere.Client(api_key=server.api_key, base_url=server.base_url)
        (tmp_path / "train.jsonl").write_bytes(jsonl())
        with (tmp_path / "train.jsonl").open("rb") as file:
            uploaded = client.datasets.create(
                name="ports", type="reranker-finetune-input", data=file
            )
        assert uploaded.id is not None
        settled_dataset = client.wait(uploaded, interval=0.02)
        assert settled_dataset.dataset.validation_status == "validated"
        assert client.datasets.get_usage().organization_usage == len(jsonl())
        assert [dataset.id for dataset in client.datasets.list(limit=5).datasets] == [uploaded.id]
        base = BaseModel(name="english", base_type="BASE_TYPE_RERANK")
        numbers = Hyperparameters(train_epochs=2)
        settings = Settings(base_model=base, dataset_id=uploaded.id, hyperparameters=numbers)
        request = FinetunedModel(name="ports-ft", settings=settings)
        model = client.finetuning.create_finetuned_model(request=request).finetuned_model
        assert model is not None
        assert model.id is not None
        server.wait_for(model.id, "STATUS_READY")
        told = client.finetuning.get_finetuned_model(model.id).finetuned_model
        assert (told.status, told.completed_at is not None) == ("STATUS_READY", True)
        assert len(client.finetuning.list_events(model.id).events) == 4
        lines = client.finetuning.list_training_step_metrics(model.id).step_metrics
        assert [line.step_number for line in lines] == [0, 1, 2]
        assert client.finetuning.list_finetuned_models(page_size=5).total_size == 1
        results = client.rerank(
            query="q", documents=[{"text": "a"}, "b"], model=model.id + "-ft", return_documents=True
        ).results
        assert results[0].document.text == "a"
        client.finetuning.delete_finetuned_model(model.id)
        client.datasets.delete(uploaded.id)
        assert (server.models, server.datasets, server.violations) == ({}, {}, [])

    def test_errors_are_the_clients_own(self, server: CoherePlatform) -> None:
        import cohere

        client = cohere.ClientV2(api_key=server.api_key, base_url=server.base_url)
        options = {"max_retries": 0}

        def ask(**given: Any) -> Any:
            wanted = {"model": "rerank-v3.5", "query": "q", "documents": ["d"]} | given
            return client.rerank(**wanted, request_options=options)

        assert ask().results[0].index == 0
        with pytest.raises(cohere.BadRequestError, match="list of documents"):
            ask(documents=[])
        with pytest.raises(cohere.NotFoundError, match="not found"):
            ask(model="none")
        for status, kind in (
            (403, cohere.ForbiddenError),
            (429, cohere.TooManyRequestsError),
            (500, cohere.InternalServerError),
        ):
            server.fail(status, retry_after=2)
            with pytest.raises(kind) as caught:
                ask()
            if status == 429:
                assert caught.value.headers["retry-after"] == "2"
        stranger = cohere.ClientV2(api_key="x", base_url=server.base_url)
        with pytest.raises(cohere.UnauthorizedError, match="invalid api token"):
            stranger.rerank(model="m", query="q", documents=["d"], request_options=options)
        server.behaviour.fine_tuning = "removed"
        with pytest.raises(cohere.core.ApiError) as caught:  # its NotFoundError needs JSON
            client.finetuning.list_finetuned_models(request_options=options)
        assert (caught.value.status_code, caught.value.body) == (404, "404 page not found")

    def test_the_client_waits_as_told(self, server: CoherePlatform) -> None:
        import cohere

        client = cohere.ClientV2(api_key=server.api_key, base_url=server.base_url)
        server.fail(429, retry_after=1)
        began = time.monotonic()
        client.rerank(model="rerank-v3.5", query="q", documents=["d"])
        assert 1 <= time.monotonic() - began < 5
        assert server.count("POST /v2/rerank") == 2

    def test_llama_index(self, server: CoherePlatform) -> None:
        postprocessor = pytest.importorskip("llama_index.postprocessor.cohere_rerank")
        from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

        reranker = postprocessor.CohereRerank(
            top_n=2, model="rerank-v3.5", api_key=server.api_key, base_url=server.base_url
        )
        texts = ["a blue car", "red apple pie", "an apple"]
        nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in texts]
        found = reranker.postprocess_nodes(nodes, QueryBundle("red apple pie"))
        assert [(node.text, round(node.score, 2)) for node in found] == [
            ("red apple pie", 1.0),
            ("an apple", 0.33),
        ]
        assert server.violations == []
