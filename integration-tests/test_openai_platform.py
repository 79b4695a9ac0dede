"""The platform server, spoken to by the real SDK, by LlamaIndex and by hand."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from contract_server import Call, Reply
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai import OpenAI as LlamaOpenAI
from llama_index.llms.openai_like import OpenAILike
from openai_platform import API_DESCRIPTION, OpenAIPlatform
from platform_trainer import LocalTrainer, Refused, Step, TrainingRequest
from pydantic import BaseModel

MODEL = "gpt-4o-mini-2024-07-18"

by_description = pytest.mark.skipif(
    not API_DESCRIPTION.exists(),
    reason="needs ../shared/specs/openai.json, which this machine lacks",
)
"""For what the types of OpenAI's SDK do not say: ranges, lengths and unknown fields."""


def example(number: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"What is port {number} for?"},
            {"role": "assistant", "content": f"Port {number} is for service {number % 3}."},
        ]
    }


def jsonl(count: int = 12) -> bytes:
    return "".join(json.dumps(example(number)) + "\n" for number in range(count)).encode()


@pytest.fixture
def server() -> Iterator[OpenAIPlatform]:
    before = set(threading.enumerate())
    with OpenAIPlatform(state_seconds=0.01, file_seconds=0.01) as server:
        yield server
    left = set(threading.enumerate()) - before
    assert not [thread.name for thread in left if "openai-platform" in thread.name]
    assert not [thread.name for thread in left if thread.name.startswith("ftjob-")]
    assert not [thread.name for thread in left if "process_request" in thread.name]


@pytest.fixture
def client(server: OpenAIPlatform) -> Iterator[openai.OpenAI]:
    with sdk(server) as client:
        yield client


def sdk(server: OpenAIPlatform, **settings: Any) -> openai.OpenAI:
    given = {"base_url": server.base_url, "api_key": server.api_key, "max_retries": 0}
    return openai.OpenAI(**given | settings)


def upload(client: openai.OpenAI, content: bytes = b"", name: str = "train.jsonl") -> str:
    return client.files.create(file=(name, content or jsonl()), purpose="fine-tune").id


def trained(server: OpenAIPlatform, client: openai.OpenAI, **settings: Any) -> Any:
    job = client.fine_tuning.jobs.create(
        **{"model": MODEL, "training_file": upload(client)} | settings
    )
    server.wait_for(job.id, "succeeded", "failed", "cancelled")
    return client.fine_tuning.jobs.retrieve(job.id)


def until(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def slow_trainer(request: TrainingRequest) -> Iterator[Step]:
    for step in range(1, 10_000):
        yield Step(step, 10_000, 1 / step)
        request.cancelled.wait(0.005)


class TestFiles:
    def test_upload_is_processed_after_a_while(
        self, server: OpenAIPlatform, client: openai.OpenAI
    ) -> None:
        server.behaviour.file_seconds = 0.3
        file = client.files.create(file=("a.jsonl", jsonl()), purpose="fine-tune")
        assert (file.status, file.filename, file.bytes) == ("uploaded", "a.jsonl", len(jsonl()))
        until(lambda: client.files.retrieve(file.id).status == "processed")
        assert client.files.wait_for_processing(file.id, poll_interval=0.01).id == file.id
        assert server.violations == []

    def test_content_comes_back_byte_by_byte(
        self, server: OpenAIPlatform, client: openai.OpenAI
    ) -> None:
        content = bytes(range(256)) + "\r\n\r--x\n\x85\u2028 ünï".encode() + b"\r\n"
        assert client.files.content(upload(client, content)).read() == content
        assert server.violations == []

    def test_list_pages_filters_and_orders(
        self, server: OpenAIPlatform, client: openai.OpenAI
    ) -> None:
        assert client.files.list().data == []
        ids = [upload(client, name=f"{number}.jsonl") for number in range(5)]
        client.files.create(file=("b.jsonl", b"{}"), purpose="batch")
        page = client.files.list(purpose="fine-tune", limit=2)
        assert [file.id for file in page.data] == ids[:2:-1]
        assert page.has_more
        assert [file.id for file in page] == ids[::-1]  # fetches the other pages
        assert [file.id for file in client.files.list(order="asc")][:5] == ids
        assert server.violations == []

    def test_delete_and_unknown(self, server: OpenAIPlatform, client: openai.OpenAI) -> None:
        file = upload(client)
        assert client.files.delete(file).deleted
        for call in (client.files.retrieve, client.files.delete, client.files.content):
            with pytest.raises(openai.NotFoundError, match=f"No such File object: {file}"):
                call(file)

    @by_description
    def test_expiry_goes_through_the_form(
        self, server: OpenAIPlatform, client: openai.OpenAI
    ) -> None:
        file = client.files.create(
            file=("a.jsonl", jsonl()),
            purpose="fine-tune",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
        assert file.expires_at == file.created_at + 3600
        with pytest.raises(openai.BadRequestError, match="less than the minimum"):
            client.files.create(
                file=("a.jsonl", jsonl()),
                purpose="fine-tune",
                expires_after={"anchor": "created_at", "seconds": 60},
            )
        assert len(server.violations) == 1

    @by_description
    def test_wrong_purpose_and_empty_file(
        self, server: OpenAIPlatform, client: openai.OpenAI
    ) -> None:
        with pytest.raises(openai.BadRequestError, match="empty"):
            client.files.create(file=("a.jsonl", b""), purpose="fine-tune")
        with pytest.raises(openai.BadRequestError, match="fine-tunes"):
            client.files.create(file=("a.jsonl", b"x"), purpose="fine-tunes")  # type: ignore[arg-type]
        assert [text for text in server.violations if "$.purpose" in text] == server.violations


class TestJobs:
    def test_states_events_checkpoints_and_model(
        self, server: OpenAIPlatform, client: openai.OpenAI
    ) -> None:
        server.behaviour.state_seconds = 0.1
        validation = upload(client, jsonl(3), "val.jsonl")
        job = client.fine_tuning.jobs.create(
            model="gpt-4o-mini",
            training_file=upload(client),
            validation_file=validation,
            suffix="ports",
            seed=7,
            metadata={"run": "a"},
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}},
            },
        )
        assert (job.status, job.model, job.seed) == ("validating_files", MODEL, 7)
        assert job.fine_tuned_model is None
        assert job.hyperparameters.learning_rate_multiplier == "auto"
        server.wait_for(job.id, "queued")
        server.wait_for(job.id, "succeeded")
        job = client.fine_tuning.jobs.retrieve(job.id)
        assert job.fine_tuned_model is not None
        assert job.fine_tuned_model.startswith(f"ft:{MODEL}:org-platform:ports:")
        assert (job.metadata, job.hyperparameters.n_epochs) == ({"run": "a"}, 2)
        assert job.trained_tokens is not None
        assert job.trained_tokens > 100

        events = list(client.fine_tuning.jobs.list_events(job.id, limit=4))  # several pages
        assert len({event.id for event in events}) == len(events)
        assert events[-1].message == f"Created fine-tuning job: {job.id}"
        assert events[0].message == "The job has successfully completed"
        metrics = [event.data for event in events if event.type == "metrics"][::-1]
        assert [data["step"] for data in metrics] == [1, 2, 3, 4, 5, 6]  # type: ignore[index]
        losses = [(data["train_loss"], data["valid_loss"]) for data in metrics]  # type: ignore[index]
        assert losses[-1] < losses[0]

        checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
        assert [checkpoint.step_number for checkpoint in checkpoints] == [6, 3]
        assert checkpoints[0].fine_tuned_model_checkpoint == job.fine_tuned_model
        for checkpoint in checkpoints:
            name = checkpoint.fine_tuned_model_checkpoint
            answer = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "Port"}]
            )
            assert "is for service" in (answer.choices[0].message.content or "")

        table = base64.b64decode(client.files.content(job.result_files[0]).read()).decode()
        assert len(table.splitlines()) == 7
        assert server.violations == []

    def test_list_pages_and_filters_by_metadata(
        self, server: OpenAIPlatform, client: openai.OpenAI
    ) -> None:
        ids = []
        for number in range(5):
            metadata = {"run": f"{number % 2}", "x": "y"} if number else None
            job = client.fine_tuning.jobs.create(
                model=MODEL, training_file=upload(client), metadata=metadata
            )
            ids.append(job.id)
        page = client.fine_tuning.jobs.list(limit=2)
        assert [job.id for job in page.data] == ids[:2:-1]
        assert [job.id for job in page] == ids[::-1]
        found = client.fine_tuning.jobs.list(metadata={"run": "1"})
        assert [job.id for job in found] == [ids[3], ids[1]]
        without = client.fine_tuning.jobs.list(extra_query={"metadata": "null"})
        assert [job.id for job in without] == ids[:1]
        assert server.violations == []

    def test_cancel(self, server: OpenAIPlatform, client: openai.OpenAI) -> None:
        server.trainer = slow_trainer
        job = client.fine_tuning.jobs.create(model=MODEL, training_file=upload(client))
        server.wait_for(job.id, "running")
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
        until(lambda: not [t for t in threading.enumerate() if t.name == job.id])
        job = client.fine_tuning.jobs.retrieve(job.id)
        assert (job.status, job.fine_tuned_model) == ("cancelled", None)
        assert job.finished_at is not None
        with pytest.raises(openai.BadRequestError, match="already ended"):
            client.fine_tuning.jobs.cancel(job.id)
        assert server.violations == []

    def test_pause_and_resume(self, server: OpenAIPlatform, client: openai.OpenAI) -> None:
        server.trainer = slow_trainer
        job = client.fine_tuning.jobs.create(model=MODEL, training_file=upload(client))

        def steps() -> int:
            return len(client.fine_tuning.jobs.list_events(job.id, limit=100).data)

        until(lambda: steps() > 5)
        assert client.fine_tuning.jobs.pause(job.id).status == "running"
        time.sleep(0.05)
        stood = steps()
        time.sleep(0.1)
        assert steps() == stood
        client.fine_tuning.jobs.resume(job.id)
        until(lambda: steps() > stood + 1)

    def test_only_so_many_run(self, server: OpenAIPlatform, client: openai.OpenAI) -> None:
        server.behaviour.running_jobs = 1
        server.trainer = slow_trainer
        first, second = (
            client.fine_tuning.jobs.create(model=MODEL, training_file=upload(client)).id
            for _ in range(2)
        )
        until(lambda: {server.jobs[first]["status"], server.jobs[second]["status"]} >= {"running"})
        time.sleep(0.1)
        states = sorted([server.jobs[first]["status"], server.jobs[second]["status"]])
        assert states == ["queued", "running"]
        running = first if server.jobs[first]["status"] == "running" else second
        client.fine_tuning.jobs.cancel(running)
        server.wait_for(second if running == first else first, "running")

    @pytest.mark.parametrize(
        ("content", "code", "message"),
        [
            (jsonl(9), "invalid_n_examples", "has 9 example(s), but must have at least 10"),
            (jsonl(12) + b"{\n", "invalid_training_file", "Line 13: "),
            (jsonl(2) + b"[]\n" + jsonl(9), "invalid_training_file", "Line 3: the example is not"),
            (b"\xff\n", "invalid_training_file", "not UTF-8"),
            (b'{"messages": []}\n', "invalid_training_file", 'Line 1: key "messages"'),
            (b'{"prompt": "a"}\n', "invalid_training_file", 'Line 1: missing key "messages"'),
            (
                jsonl(3) + json.dumps(example(1) | {"metadata": {}}).encode(),
                "invalid_training_file",
                'Line 4: unexpected key "metadata"',
            ),
            (
                b'{"messages": [{"role": "user", "content": "a"}]}',
                "invalid_training_file",
                "Line 1: the last message must be from the assistant",
            ),
            (
                b'{"messages": [{"role": "usr", "content": "a"}]}',
                "invalid_training_file",
                "Line 1: message 1, ",
            ),
        ],
    )
    def test_bad_files_fail_the_job_not_the_upload(
        self,
        server: OpenAIPlatform,
        client: openai.OpenAI,
        content: bytes,
        code: str,
        message: str,
    ) -> None:
        job = trained(server, client, training_file=upload(client, content))
        assert (job.status, job.error.code, job.error.param) == ("failed", code, "training_file")
        assert message in job.error.message
        event = client.fine_tuning.jobs.list_events(job.id, limit=1).data[0]
        assert (event.level, event.message) == ("error", job.error.message)
        assert server.violations == []

    def test_bad_validation_file_and_unsafe_file(
        self, server: OpenAIPlatform, client: openai.OpenAI
    ) -> None:
        job = trained(server, client, validation_file=upload(client, jsonl(2) + b"{"))
        assert (job.error.code, job.error.param) == ("invalid_validation_file", "validation_file")
        assert "Line 3" in job.error.message
        server.behaviour.unsafe_files = True
        assert trained(server, client).error.code == "unsafe_file"

    def test_preference_files(self, server: OpenAIPlatform, client: openai.OpenAI) -> None:
        line = {
            "input": {"messages": [{"role": "user", "content": "Hello"}]},
            "preferred_output": [{"role": "assistant", "content": "Good day"}],
            "non_preferred_output": [{"role": "assistant", "content": "Hi"}],
        }
        content = (json.dumps(line) + "\n").encode() * 10
        method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}}
        job = trained(server, client, training_file=upload(client, content), method=method)
        assert job.status == "succeeded"
        assert job.method.dpo.hyperparameters.beta == 0.2
        job = trained(server, client, method=method)
        assert 'missing key "input"' in job.error.message
        assert server.violations == []

    @by_description
    def test_refused_at_once(self, server: OpenAIPlatform, client: openai.OpenAI) -> None:
        create = client.fine_tuning.jobs.create
        file = upload(client)
        with pytest.raises(openai.BadRequestError, match="not available for fine-tuning") as caught:
            create(model="gpt-9", training_file=file)
        assert caught.value.code == "model_not_available"
        with pytest.raises(openai.BadRequestError, match="invalid training_file: file-none"):
            create(model=MODEL, training_file="file-none")
        with pytest.raises(openai.BadRequestError, match="invalid validation_file: file-none"):
            create(model=MODEL, training_file=file, validation_file="file-none")
        batch = client.files.create(file=("b.jsonl", b"{}"), purpose="batch").id
        with pytest.raises(openai.BadRequestError, match="purpose 'batch'"):
            create(model=MODEL, training_file=batch)
        with pytest.raises(openai.BadRequestError, match="16 pairs"):
            create(model=MODEL, training_file=file, metadata={f"{n}": "" for n in range(17)})
        with pytest.raises(openai.NotFoundError) as missing:
            client.fine_tuning.jobs.retrieve("ftjob-none")
        assert missing.value.code == "fine_tune_not_found"
        assert server.violations == []  # nothing of this is against the description
        with pytest.raises(openai.BadRequestError, match="is too long"):
            create(model=MODEL, training_file=file, suffix="x" * 65)
        with pytest.raises(openai.BadRequestError, match="less than the minimum of 1"):
            create(model=MODEL, training_file=file, hyperparameters={"n_epochs": 0})
        with pytest.raises(openai.BadRequestError, match="equal to the minimum of 0"):
            create(model=MODEL, training_file=file, hyperparameters={"learning_rate_multiplier": 0})
        assert len(server.violations) == 3
        assert server.jobs == {}

    def test_unprocessed_file(self, server: OpenAIPlatform, client: openai.OpenAI) -> None:
        server.behaviour.file_seconds = 0.3
        server.behaviour.accepts_unprocessed_files = False
        file = upload(client)
        with pytest.raises(openai.BadRequestError, match="still being processed"):
            client.fine_tuning.jobs.create(model=MODEL, training_file=file)
        client.files.wait_for_processing(file, poll_interval=0.01)
        client.fine_tuning.jobs.create(model=MODEL, training_file=file)

    def test_closed_account_and_quota(self, server: OpenAIPlatform, client: openai.OpenAI) -> None:
        file = upload(client)
        server.behaviour.fine_tuning_closed = True
        with pytest.raises(openai.PermissionDeniedError, match="not available to your org") as no:
            client.fine_tuning.jobs.create(model=MODEL, training_file=file)
        assert no.value.code == "fine_tuning_unavailable"
        server.behaviour.fine_tuning_closed = False
        server.behaviour.quota_exceeded = True
        with pytest.raises(openai.RateLimitError, match="exceeded your current quota") as over:
            client.fine_tuning.jobs.create(model=MODEL, training_file=file)
        assert over.value.code == "insufficient_quota"
        assert server.violations == []

    def test_a_trainer_that_breaks_fails_its_job(
        self, server: OpenAIPlatform, client: openai.OpenAI
    ) -> None:
        def broken(request: TrainingRequest) -> Iterator[Step]:
            yield Step(1, 2, 0.5)
            raise MemoryError("no room")

        server.trainer = broken
        job = trained(server, client)
        assert (job.status, job.error.code) == ("failed", "server_error")
        assert "no room" in job.error.message

    def test_models(self, server: OpenAIPlatform, client: openai.OpenAI) -> None:
        name = trained(server, client).fine_tuned_model
        assert name in [model.id for model in client.models.list()]
        assert client.models.retrieve(name).owned_by == "org-platform"
        again = trained(server, client, model=name)  # a fine-tuned model as the base
        assert (again.status, again.model) == ("succeeded", name)
        assert client.models.delete(name).deleted
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.chat.completions.create(model=name, messages=[{"role": "user", "content": "a"}])
        assert server.violations == []


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look_up_port",
        "parameters": {
            "type": "object",
            "properties": {"port": {"type": "integer"}, "name": {"type": "string"}},
            "required": ["port", "name"],
        },
    },
}


class Invoice(BaseModel):
    class Line(BaseModel):
        what: str
        price: float

    number: int
    lines: list[Line]


class TestChat:
    def test_answers_out_of_the_context(
        self, server: OpenAIPlatform, client: openai.OpenAI
    ) -> None:
        prompt = (
            "Context information is below.\n---------------------\n"
            "Cats sleep all day. Dogs bark at night.\n---------------------\n"
            "Query: What do dogs do?\nAnswer: "
        )
        answer = client.chat.completions.create(
            model="gpt-4o", messages=[{"role": "user", "content": prompt}]
        )
        assert answer.choices[0].message.content == "Dogs bark at night."
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.total_tokens > 20
        short = client.chat.completions.create(
            model="gpt-4o",
            messages=[{"role": "user", "content": prompt}],
            max_completion_tokens=2,
            n=2,
        )
        assert [choice.message.content for choice in short.choices] == ["Dogs bark"] * 2
        assert short.choices[0].finish_reason == "length"
        assert server.violations == []

    def test_stream_is_the_same_text(self, server: OpenAIPlatform, client: openai.OpenAI) -> None:
        asked: Any = [{"role": "user", "content": "  One two,  three\n\n four. "}]
        server.teacher = lambda messages, body: {"content": messages[-1]["content"]}
        stream = client.chat.completions.create(
            model="gpt-4o", messages=asked, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == asked[0]["content"]
        assert chunks[-1].usage is not None
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
        assert all(chunk.usage is None for chunk in chunks[:-1])
        assert len(chunks) > 5
        assert server.violations == []

    def test_tool_calls_whole_and_streamed(
        self, server: OpenAIPlatform, client: openai.OpenAI
    ) -> None:
        asked: Any = [{"role": "user", "content": "Ask look_up_port about 443"}]
        whole = client.chat.completions.create(model="gpt-4o", messages=asked, tools=[TOOL])
        calls = whole.choices[0].message.tool_calls or []
        assert whole.choices[0].finish_reason == "tool_calls"
        assert calls[0].type == "function"
        arguments = json.loads(calls[0].function.arguments)
        assert arguments["port"] == 443
        with client.chat.completions.stream(
            model="gpt-4o", messages=asked, tools=[TOOL]
        ) as stream:  # the SDK puts the deltas together
            final = stream.get_final_completion().choices[0].message.tool_calls or []
        assert json.loads(final[0].function.arguments) == arguments
        follow: Any = [
            *asked,
            whole.choices[0].message.to_dict(),
            {"role": "tool", "tool_call_id": calls[0].id, "content": "look_up_port says HTTPS."},
        ]
        last = client.chat.completions.create(model="gpt-4o", messages=follow, tools=[TOOL])
        assert last.choices[0].message.content == "look_up_port says HTTPS."
        old = client.chat.completions.create(
            model="gpt-4o", messages=asked, functions=[TOOL["function"]]
        )
        assert old.choices[0].finish_reason == "function_call"
        assert old.choices[0].message.function_call is not None
        assert server.violations == []

    def test_structured_output(self, server: OpenAIPlatform, client: openai.OpenAI) -> None:
        answer = client.chat.completions.parse(
            model="gpt-4o",
            messages=[{"role": "user", "content": "Invoice 17: two pens."}],
            response_format=Invoice,
        )
        assert answer.choices[0].message.parsed is not None
        assert answer.choices[0].message.parsed.number == 17
        server.teacher = lambda messages, body: {"content": "{}"}
        with pytest.raises(openai.InternalServerError, match="does not fit response_format"):
            client.chat.completions.parse(
                model="gpt-4o",
                messages=[{"role": "user", "content": "Invoice"}],
                response_format=Invoice,
            )

    def test_teachers_may_refuse_and_models_be_unknown(
        self, server: OpenAIPlatform, client: openai.OpenAI
    ) -> None:
        def refusing(messages: list[dict[str, Any]], body: dict[str, Any]) -> dict[str, Any]:
            raise Refused("too long", "context_length_exceeded")

        server.teacher = refusing
        server.behaviour.chat_models = {"gpt-4o"}
        asked: Any = [{"role": "user", "content": "a"}]
        with pytest.raises(openai.BadRequestError, match="too long") as caught:
            client.chat.completions.create(model="gpt-4o", messages=asked)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt-5", messages=asked)
        assert missing.value.code == "model_not_found"

    def test_embeddings(self, server: OpenAIPlatform, client: openai.OpenAI) -> None:
        same = client.embeddings.create(model="e", input=["a cat sleeps", "a cat sleeps", "x"]).data
        assert same[0].embedding == same[1].embedding != same[2].embedding
        assert sum(number**2 for number in same[0].embedding) == pytest.approx(1)
        assert server.violations == []

    async def _everything(self, server: OpenAIPlatform) -> str:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key=server.api_key) as client:
            file = await client.files.create(file=("a.jsonl", jsonl()), purpose="fine-tune")
            job = await client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
            while job.status not in ("succeeded", "failed"):
                job = await client.fine_tuning.jobs.retrieve(job.id)
            assert [event async for event in client.fine_tuning.jobs.list_events(job.id)]
            stream = await client.chat.completions.create(
                model=str(job.fine_tuned_model),
                messages=[{"role": "user", "content": "Port"}],
                stream=True,
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    def test_async_sdk(self, server: OpenAIPlatform) -> None:
        import asyncio

        assert "is for service" in asyncio.run(self._everything(server))
        assert server.violations == []


class TestLlamaIndex:
    @pytest.mark.parametrize("kind", [LlamaOpenAI, OpenAILike])
    def test_llm(self, server: OpenAIPlatform, kind: Any) -> None:
        llm = kind(
            model="gpt-4o",
            api_base=server.base_url,
            api_key=server.api_key,
            **{"is_chat_model": True, "is_function_calling_model": True}
            if kind is OpenAILike
            else {},
        )
        message = [ChatMessage(role="user", content="Dogs bark. Query: dogs?")]
        assert llm.chat(message).message.content == "Dogs bark."
        assert llm.complete("Dogs bark. Query: dogs?").text == "Dogs bark."
        assert [part.delta for part in llm.stream_chat(message)][-1] is not None

        def look_up_port(port: int) -> str:
            """Say what a port is for."""
            return str(port)

        tool = FunctionTool.from_defaults(look_up_port)
        response = llm.chat_with_tools([tool], "Ask look_up_port about 22")
        [call] = llm.get_tool_calls_from_response(response)
        assert (call.tool_name, call.tool_kwargs) == ("look_up_port", {"port": 22})
        *_, last = llm.stream_chat_with_tools([tool], "Ask look_up_port about 22")
        assert llm.get_tool_calls_from_response(last)[0].tool_kwargs == {"port": 22}
        invoice = llm.as_structured_llm(Invoice).complete("Invoice 17: pens").raw
        assert invoice.number == 17
        assert server.violations == []


class TestFaults:
    def test_the_sdk_comes_back_after_429_and_5xx(self, server: OpenAIPlatform) -> None:
        server.fail(429, retry_after=0.05)
        server.fail(503)
        with sdk(server, max_retries=2) as client:
            client.models.list()
        assert [request.status for request in server.requests] == [429, 503, 200]
        assert [request.retry for request in server.requests] == [0, 1, 2]

    def test_429_says_when_to_come_back(
        self, server: OpenAIPlatform, client: openai.OpenAI
    ) -> None:
        server.fail(429, retry_after=1.5)
        with pytest.raises(openai.RateLimitError) as caught:
            client.models.list()
        headers = caught.value.response.headers
        assert (headers["retry-after-ms"], headers["retry-after"]) == ("1500", "2")

    @pytest.mark.parametrize("what", [500, "drop", "hang"])
    @pytest.mark.parametrize("done", [False, True])
    def test_only_work_that_was_done_leaves_a_job(
        self, server: OpenAIPlatform, client: openai.OpenAI, what: Any, done: bool
    ) -> None:
        file = upload(client)
        server.fail(what, on="POST /fine_tuning/jobs", done=done, seconds=0.05)
        with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
            client.fine_tuning.jobs.create(model=MODEL, training_file=file)
        assert len(server.jobs) == done
        assert server.count("POST /fine_tuning/jobs", done=True) == done
        assert server.requests[-1].status == (None if isinstance(what, str) else 500)
        client.fine_tuning.jobs.create(model=MODEL, training_file=file)
        assert len(server.jobs) == done + 1
        assert server.violations == []

    def test_the_sdk_sends_no_idempotency_key_so_a_retry_makes_a_second_job(
        self, server: OpenAIPlatform
    ) -> None:
        with sdk(server, max_retries=1) as client:
            file = upload(client)
            server.fail("drop", on="POST /fine_tuning/jobs", done=True)
            client.fine_tuning.jobs.create(model=MODEL, training_file=file)
        assert len(server.jobs) == 2
        sent = server.requests[-1].headers
        assert "idempotency-key" not in sent
        assert "authorization" not in sent

    def test_faults_by_described_path(self, server: OpenAIPlatform, client: openai.OpenAI) -> None:
        file = upload(client)
        server.fail(500, on="GET /files/{file_id}", times=2)
        client.files.list()
        for _ in range(2):
            with pytest.raises(openai.InternalServerError):
                client.files.retrieve(file)
        client.files.retrieve(file)
        assert server.count("GET /files/{file_id}") == 3

    def test_cut_stream(self, server: OpenAIPlatform, client: openai.OpenAI) -> None:
        server.fail("cut", on="/chat/completions")
        stream = client.chat.completions.create(
            model="gpt-4o",
            messages=[{"role": "user", "content": "one two three four five six"}],
            stream=True,
        )
        with pytest.raises((openai.APIConnectionError, httpx.RemoteProtocolError)):
            list(stream)


class TestContract:
    def raw(self, server: OpenAIPlatform, method: str, path: str, **given: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {server.api_key}"} | given.pop("headers", {})
        return httpx.request(method, server.base_url + path, headers=headers, **given)

    @by_description
    @pytest.mark.parametrize(
        ("method", "path", "given", "place"),
        [
            ("POST", "/chat/completions", {"json": {"model": "m"}}, "messages"),
            ("POST", "/chat/completions", {"content": b"{"}, "deserialize"),
            ("POST", "/chat/completions", {"json": []}, "not of type"),
            (
                "POST",
                "/chat/completions",
                {"json": {"model": "m", "messages": [{"role": "user"}]}},
                "$.messages",
            ),
            (
                "POST",
                "/chat/completions",
                {
                    "json": {
                        "model": "m",
                        "messages": [{"role": "user", "content": "a"}],
                        "temprature": 0,
                    }
                },
                "Unrecognized request argument supplied: temprature",
            ),
            (
                "POST",
                "/fine_tuning/jobs",
                {"json": {"model": "m", "training_file": 3}},
                "$.training_file",
            ),
            ("POST", "/fine_tuning/jobs", {"json": {"model": "m"}}, "training_file"),
            ("GET", "/fine_tuning/jobs?limit=many", {}, "limit"),
            ("GET", "/fine_tuning/jobs?page=2", {}, "query parameter supplied: page"),
            ("POST", "/files", {"data": {"purpose": "fine-tune"}}, "/files"),
            (
                "POST",
                "/files",
                {"data": {"purpose": "x"}, "files": {"file": ("a", b"{}")}},
                "$.purpose",
            ),
            (
                "POST",
                "/files",
                {"data": {"purpose": "batch", "x": "y"}, "files": {"file": ("a", b"{}")}},
                "Unrecognized request argument supplied: x",
            ),
            ("POST", "/files", {"json": {"purpose": "fine-tune"}}, "/files"),
        ],
    )
    def test_bad_requests(
        self, server: OpenAIPlatform, method: str, path: str, given: Any, place: str
    ) -> None:
        given = dict(given)
        if "content" in given:
            given["headers"] = {"Content-Type": "application/json"}
        response = self.raw(server, method, path, **given)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert place in error["message"]
        assert len(server.violations) == 1
        assert place in server.violations[0]

    def test_null_where_the_description_allows_it(self, server: OpenAIPlatform) -> None:
        with sdk(server) as client:
            file = upload(client)
        nothing = {"suffix": None, "validation_file": None, "seed": None, "integrations": None}
        body = {"model": MODEL, "training_file": file} | nothing
        assert self.raw(server, "POST", "/fine_tuning/jobs", json=body).status_code == 200

    def test_unknown_urls(self, server: OpenAIPlatform) -> None:
        assert self.raw(server, "GET", "/fine-tunes").status_code == 404
        assert self.raw(server, "PUT", "/files").status_code == 404
        assert len(server.violations) == 2

    def test_keys(self, server: OpenAIPlatform) -> None:
        with (
            sdk(server, api_key="sk-wrong-secret") as client,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        assert "wrong-secret" not in str(caught.value)
        response = httpx.get(server.base_url + "/models")
        assert response.status_code == 401
        assert "didn't provide an API key" in response.json()["error"]["message"]

    def test_many_clients_at_once(self, server: OpenAIPlatform) -> None:
        from concurrent.futures import ThreadPoolExecutor

        with sdk(server) as client, ThreadPoolExecutor(16) as pool:
            ids = list(pool.map(lambda _: upload(client), range(64)))
        assert len(set(ids)) == 64 == len(server.files)
        assert server.violations == []


class WrongPlatform(OpenAIPlatform):
    """Answers against the description, each in another way."""

    def retrieve_file(self, call: Call, file_id: str) -> Reply:
        reply = super().retrieve_file(call, file_id)
        assert reply.body is not None
        reply.body["status"] = "done"
        return reply

    def list_models(self, call: Call) -> Reply:
        return Reply({"object": "list", "data": [{"id": "m", "object": "model"}]})

    def retrieve_job(self, call: Call, job_id: str) -> Reply:
        reply = super().retrieve_job(call, job_id)
        assert reply.body is not None
        reply.body["status"] = "pending"
        return reply

    def stream_chunks(
        self, completion: dict[str, Any], body: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        for number, chunk in enumerate(super().stream_chunks(completion, body)):
            if number == 2:
                chunk["choices"][0]["finish_reason"] = "done"
            yield chunk


@pytest.mark.parametrize("description", [API_DESCRIPTION, Path("/nowhere/openai.json")])
def test_wrong_answers_are_caught(description: Path) -> None:
    with WrongPlatform(description=description) as server, sdk(server) as client:
        file = upload(client)
        asked: Any = [{"role": "user", "content": "one two three"}]
        job = client.fine_tuning.jobs.create(model=MODEL, training_file=file)
        for call in (
            lambda: client.files.retrieve(file),
            lambda: client.models.list(),
            lambda: client.fine_tuning.jobs.retrieve(job.id),
            lambda: client.chat.completions.create(model="m", messages=asked, stream=True),
        ):
            before = len(server.violations)
            with pytest.raises(openai.InternalServerError, match="wrong answer of the server"):
                call()
            assert server.violations[before].startswith("answer: ")
        client.chat.completions.create(model="m", messages=asked)
        assert len(server.violations) == 4


def test_without_the_description_the_sdk_types_check() -> None:
    with OpenAIPlatform(description=Path("/nowhere/openai.json")) as server, sdk(server) as client:
        job = trained(server, client, validation_file=upload(client))
        assert job.status == "succeeded"
        for listed in (
            client.files.list(),
            client.models.list(),
            client.fine_tuning.jobs.list(),
            client.fine_tuning.jobs.list_events(job.id),
            client.fine_tuning.jobs.checkpoints.list(job.id),
        ):
            assert listed.data
        asked: Any = [{"role": "user", "content": "Port"}]
        client.chat.completions.create(model=job.fine_tuned_model, messages=asked)
        list(client.chat.completions.create(model="m", messages=asked, stream=True))
        client.embeddings.create(model="e", input="a")
        bad = trained(
            server, client, training_file=upload(client, jsonl(10).replace(b"user", b"u"))
        )
        assert "Line 1: message 1" in bad.error.message
        client.files.delete(job.training_file)
        client.models.delete(job.fine_tuned_model)
        assert server.violations == []
        for body in ({"model": "m"}, {"model": "m", "messages": [{"role": "usr"}]}):
            with pytest.raises(openai.BadRequestError):
                client.post("/chat/completions", body=body, cast_to=object)
        with pytest.raises(openai.BadRequestError):
            client.files.create(file=("a", b"x"), purpose="x")  # type: ignore[arg-type]
        assert len(server.violations) == 3


def test_stops_at_once_with_jobs_and_clients_under_way() -> None:
    began = time.monotonic()
    with OpenAIPlatform(trainer=slow_trainer, chat_seconds=60) as server:
        client = sdk(server)
        job = client.fine_tuning.jobs.create(model=MODEL, training_file=upload(client))
        server.wait_for(job.id, "running")

        def ask() -> None:
            with contextlib.suppress(openai.APIConnectionError):  # or the answer, just in time
                client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": "a"}]
                )

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: server.count("/chat/completions") == 1)
    asking.join(5)
    assert not asking.is_alive()
    assert time.monotonic() - began < 10
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
    client.close()


def test_as_a_process_of_its_own() -> None:
    command = [sys.executable, str(Path(__file__).with_name("openai_platform.py"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline())
            with openai.OpenAI(**said) as client:
                assert client.models.list().data
        finally:
            process.terminate()


# ---------------------------------------------------------------------------------------
# Real training

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Llama of 60,000 random weights, with a tokenizer of letters and a chat template."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("trl")
    import tokenizers

    special = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([jsonl().decode()], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(fast),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
        )
    )
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, a small model's threads only wait
    yield str(folder)
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_really_fine_tunes(tiny_model: str) -> None:
    trainer = LocalTrainer({MODEL: tiny_model}, device="cpu", lora_rank=None, learning_rate=1e-2)
    with OpenAIPlatform(trainer=trainer, minimum_examples=4) as server, sdk(server) as client:
        job = client.fine_tuning.jobs.create(
            model=MODEL,
            training_file=upload(client),
            validation_file=upload(client, jsonl(4)),
            hyperparameters={"n_epochs": 16, "batch_size": 4},
        )
        server.wait_for(job.id, "succeeded", "failed", timeout=300)
        job = client.fine_tuning.jobs.retrieve(job.id)
        assert job.status == "succeeded", job.error
        events = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
        metrics: list[Any] = [event.data for event in events if event.type == "metrics"][::-1]
        assert metrics[-1]["train_loss"] < metrics[0]["train_loss"] / 3
        assert metrics[-1]["valid_loss"] < 1
        assert metrics[-1]["step"] == metrics[-1]["total_steps"] == 48
        question: Any = example(7)["messages"][:1]
        answer = client.chat.completions.create(
            model=str(job.fine_tuned_model), messages=question, temperature=0
        )
        text = answer.choices[0].message.content or ""
        assert re.fullmatch(r"Port \d+ is for service \d\.", text)
        first = list(client.fine_tuning.jobs.checkpoints.list(job.id))[-1]
        early = client.chat.completions.create(
            model=first.fine_tuned_model_checkpoint,
            messages=question,
            temperature=0,
            max_completion_tokens=8,
        )
        assert not text.startswith(early.choices[0].message.content or "nothing")
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model=str(job.fine_tuned_model), messages=[{"role": "user", "content": "x " * 500}]
            )
        assert caught.value.code == "context_length_exceeded"
        assert server.violations == []


@pytest.mark.slow
def test_a_real_job_is_cancelled_and_a_student_trained_on(tiny_model: str) -> None:
    trainer = LocalTrainer({MODEL: tiny_model}, device="cpu", lora_rank=4)
    with OpenAIPlatform(trainer=trainer, minimum_examples=4) as server, sdk(server) as client:
        file = upload(client)
        endless = client.fine_tuning.jobs.create(
            model=MODEL, training_file=file, hyperparameters={"n_epochs": 50, "batch_size": 6}
        )
        server.wait_for(endless.id, "running")
        until(lambda: client.fine_tuning.jobs.checkpoints.list(endless.id).data, 120)
        assert client.fine_tuning.jobs.cancel(endless.id).status == "cancelled"
        until(lambda: not [t for t in threading.enumerate() if t.name == endless.id], 60)
        assert not [t for t in threading.enumerate() if t.name.startswith("train-")]
        short: Any = {"n_epochs": 1, "batch_size": 12}
        job = trained(server, client, training_file=file, hyperparameters=short)
        assert job.status == "succeeded", job.error
        again = client.fine_tuning.jobs.create(
            model=job.fine_tuned_model, training_file=file, hyperparameters=short
        )
        server.wait_for(again.id, "succeeded", "failed")
        again = client.fine_tuning.jobs.retrieve(again.id)
        assert (again.status, again.model) == ("succeeded", job.fine_tuned_model), again.error
        assert server.violations == []
