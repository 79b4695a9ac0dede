"""What trains behind `openai_platform`: the protocol, a trainer of counts, and a real one.

A trainer is a callable that takes a `TrainingRequest` and yields a `Step` after each step. A
step with an `answer` is a checkpoint, and the last such answer is the finished model. The
server closes the iterator when the job is cancelled.
"""

from __future__ import annotations

import json
import math
import queue
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

Message = dict[str, Any]
Answer = Callable[[list[Message], dict[str, Any]], Message]
"""Gets the messages and the whole body of a chat request, returns the assistant's message."""


class Refused(Exception):
    """A model or a trainer cannot do what the client asks: status 400, or a failed job."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class TrainingRequest:
    """One fine-tuning job, its files already validated."""

    model: str
    """The base model that the client named, or a model fine-tuned before."""
    fine_tuned_model: str
    """The name that the trained model will have."""
    training_file: Path
    validation_file: Path | None
    method: str
    """`supervised` or `dpo`."""
    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    seed: int
    folder: Path
    """An empty folder for the trainer's own files, kept until the server stops."""
    cancelled: threading.Event
    """Set when the job is cancelled or the server stops."""


@dataclass(frozen=True)
class Step:
    """What a trainer reports after one step; losses in nats per token."""

    step: int
    total_steps: int
    train_loss: float
    valid_loss: float | None = None
    train_accuracy: float | None = None
    answer: Answer | None = None
    """Answers with the model as it is now, which makes this step a checkpoint."""


class Trainer(Protocol):
    def __call__(self, request: TrainingRequest, /) -> Iterator[Step]: ...


def count_words(request: TrainingRequest) -> Iterator[Step]:
    """Train a bigram model of the answers' words by counting: real losses within milliseconds.

    The model answers with the words of its likeliest bigrams, starting from the word that
    the question has in common with the answers it has seen.
    """
    examples = [_answer_words(line) for line in _lines(request.training_file)]
    held_out = [_answer_words(line) for line in _lines(request.validation_file)]
    vocabulary = {word for words in examples + held_out for word in words}
    bigrams: dict[str, Counter[str]] = {}
    batches = [
        examples[start : start + request.batch_size]
        for start in range(0, len(examples), request.batch_size)
    ]
    total = len(batches) * request.n_epochs
    for step in range(1, total + 1):
        batch = batches[(step - 1) % len(batches)]
        train_loss = _loss(batch, bigrams, len(vocabulary))
        for words in batch:
            for first, second in zip(["<s>", *words], words, strict=False):
                bigrams.setdefault(first, Counter())[second] += 1
        ends_epoch = step % len(batches) == 0
        yield Step(
            step=step,
            total_steps=total,
            train_loss=train_loss,
            valid_loss=_loss(held_out, bigrams, len(vocabulary)) if held_out else None,
            answer=_likeliest({first: Counter(c) for first, c in bigrams.items()})
            if ends_epoch
            else None,
        )


def _lines(path: Path | None) -> list[dict[str, Any]]:
    if path is None:
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def _answer_words(example: dict[str, Any]) -> list[str]:
    answers = example.get("messages") or example.get("preferred_output") or []
    return re.findall(r"\w+", str(answers[-1].get("content") or "")) if answers else []


def _loss(batch: list[list[str]], bigrams: Mapping[str, Counter[str]], size: int) -> float:
    """Mean negative log-likelihood per word, with one added to each count."""
    losses = []
    for words in batch:
        for first, second in zip(["<s>", *words], words, strict=False):
            seen = bigrams.get(first, Counter())
            losses.append(-math.log((seen[second] + 1) / (seen.total() + size)))
    return sum(losses) / len(losses) if losses else 0.0


def _likeliest(bigrams: Mapping[str, Counter[str]]) -> Answer:
    def answer(messages: list[Message], body: dict[str, Any]) -> Message:
        asked = set(re.findall(r"\w+", str(messages[-1].get("content"))))
        words = [next((word for word in sorted(asked) if word in bigrams), "<s>")]
        while len(words) < 12 and bigrams.get(words[-1]):
            words.append(max(sorted(bigrams[words[-1]]), key=bigrams[words[-1]].__getitem__))
        return {"content": " ".join(word for word in words if word != "<s>") or "I do not know."}

    return answer


class LocalTrainer:
    """Really fine-tunes with `ft_core.sft`, one job at a time, and answers with the students.

    Every checkpoint that the engine saves can be chatted with, and a student can be the base
    model of another job.

    Args:
        folders: a model's name at the service to the folder of a causal language model with a
            chat template.
        settings: of `LocalFinetuneEngine`, over those that the job gives.
    """

    learning_rate = 2e-4
    """What the job's multiplier multiplies."""

    def __init__(self, folders: Mapping[str, str], **settings: Any) -> None:
        self.folders = dict(folders)
        self.settings = settings
        self._students: dict[str, Path] = {}
        self._training = threading.Lock()

    def __call__(self, request: TrainingRequest) -> Iterator[Step]:
        if request.method != "supervised":
            raise Refused(f"the method {request.method} is not offered for {request.model}")
        output = request.folder / "student"
        reports: queue.Queue[_Report] = queue.Queue()
        with self._training:  # a training run sets the process's random seed
            engine = self._engine(request, output, reports)
            thread = threading.Thread(
                target=_run, args=(engine, reports), name=f"train-{output.parent.parent.name}"
            )
            thread.start()
            try:
                last = yield from _steps(reports, request)
            finally:
                while thread.is_alive():  # the server has closed this generator
                    _cancel(output)
                    thread.join(0.05)
        self._students[request.fine_tuned_model] = output
        if last is not None:
            yield replace(last, answer=_Student(output))

    def _engine(self, request: TrainingRequest, output: Path, reports: Any) -> Any:
        from ft_core.sft import LocalFinetuneEngine

        settings: dict[str, Any] = {
            "epochs": request.n_epochs,
            "batch_size": request.batch_size,
            "learning_rate": self.learning_rate * request.learning_rate_multiplier,
            "seed": request.seed,
        }
        return LocalFinetuneEngine(
            self._base(request),
            request.training_file,
            val_data=request.validation_file,
            output_dir=output,
            callbacks=[_reporter(reports, request.folder)],
            show_progress=False,
            **settings | self.settings,
        )

    def _base(self, request: TrainingRequest) -> str:
        if request.model in self.folders:
            return self.folders[request.model]
        from ft_core.sft import LocalFinetuneEngine

        student = LocalFinetuneEngine.load(self._students[request.model])
        return str(student.merge(request.folder / "base"))


class _Student:
    """Answers with a folder's model, loaded at the first question."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._llm: Any = None

    def __call__(self, messages: list[Message], body: dict[str, Any]) -> Message:
        from ft_core.errors import ArgumentError
        from ft_core.sft import LocalLLM

        with self._lock:
            if self._llm is None:
                self._llm = LocalLLM.from_pretrained(self._folder)
        given = {key: body[key] for key in ("temperature", "stop") if body.get(key) is not None}
        given["max_tokens"] = body.get("max_completion_tokens") or body.get("max_tokens")
        if body.get("tools") and body.get("tool_choice") != "none":
            given["tools"] = body["tools"]
        if body.get("response_format"):
            given["response_format"] = body["response_format"]
        try:
            response = self._llm.chat([_to_llama_index(message) for message in messages], **given)
        except ArgumentError as error:
            raise Refused(str(error), "context_length_exceeded") from None
        return _from_llama_index(response.message) | {"usage": response.raw["usage"]}


def _to_llama_index(message: Message) -> Any:
    from llama_index.core.base.llms.types import ChatMessage, TextBlock, ToolCallBlock

    content = message.get("content") or []
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    blocks: list[Any] = [TextBlock(text=part["text"]) for part in parts if part["type"] == "text"]
    for call in message.get("tool_calls") or ():
        function = call["function"]
        block = ToolCallBlock(
            tool_call_id=call["id"], tool_name=function["name"], tool_kwargs=function["arguments"]
        )
        blocks.append(block)
    extra = {key: message[key] for key in ("tool_call_id", "name") if key in message}
    return ChatMessage(role=message["role"], blocks=blocks, additional_kwargs=extra)


def _from_llama_index(message: Any) -> Message:
    from llama_index.core.base.llms.types import TextBlock, ToolCallBlock

    texts = [block.text for block in message.blocks if isinstance(block, TextBlock)]
    calls = [
        {
            "id": block.tool_call_id,
            "function": {"name": block.tool_name, "arguments": block.tool_kwargs},
        }
        for block in message.blocks
        if isinstance(block, ToolCallBlock)
    ]
    result: Message = {"content": "".join(texts) if texts or not calls else None}
    return result | {"tool_calls": calls} if calls else result


@dataclass(frozen=True)
class _Report:
    """What the training thread says: one line of its log, a saved checkpoint, or its end."""

    step: int = 0
    total_steps: int = 0
    numbers: Mapping[str, float] | None = None
    checkpoint: Path | None = None
    ended: bool = False
    error: BaseException | None = None


def _run(engine: Any, reports: queue.Queue[_Report]) -> None:
    try:
        engine.finetune()
    except BaseException as error:
        reports.put(_Report(ended=True, error=error))
    else:
        reports.put(_Report(ended=True))


def _cancel(output: Path) -> None:
    from ft_core.errors import ArtifactError
    from ft_core.sft import LocalFinetuneEngine

    with suppress(ArtifactError):  # not begun yet, or just over
        LocalFinetuneEngine.from_job_id(str(output)).cancel()


def _steps(
    reports: queue.Queue[_Report], request: TrainingRequest
) -> Generator[Step, None, Step | None]:
    """Yield each step once its evaluation and its checkpoint are known; return the last."""
    step: Step | None = None
    while not request.cancelled.is_set():
        try:
            report = reports.get(timeout=0.05)
        except queue.Empty:
            continue
        if report.ended:
            if report.error is not None:
                raise report.error
            return step
        numbers = report.numbers or {}
        if "loss" in numbers:
            if step is not None:
                yield step
            step = Step(
                report.step,
                report.total_steps,
                numbers["loss"],
                train_accuracy=numbers.get("mean_token_accuracy"),
            )
        elif step is not None and "eval_loss" in numbers:
            step = replace(step, valid_loss=numbers["eval_loss"])
        elif step is not None and report.checkpoint is not None:
            step = replace(step, answer=_Student(report.checkpoint))
    return None


def _reporter(reports: queue.Queue[_Report], folder: Path) -> Any:
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            reports.put(_Report(state.global_step, state.max_steps, numbers=dict(logs or {})))

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # A copy: the engine keeps only the newest checkpoints, and none in the end.
            name = f"checkpoint-{state.global_step}"
            shutil.copytree(Path(args.output_dir) / name, folder / name)
            reports.put(_Report(state.global_step, state.max_steps, checkpoint=folder / name))

    return Reporter()
