import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from llama_index.core.base.llms.types import ChatMessage

from ft_core.datasets.chat import ChatDataset, ChatExample
from ft_core.errors import ArgumentError, ArtifactError, DatasetError, TrainingError
from ft_core.jobs import JobStatus, WaitTimeoutError
from ft_core.sft import LocalFinetuneEngine, SFTSettings
from ft_core.sft.chat_format import ChatFormat
from ft_core.sft.evaluation import answer_losses
from ft_core.sft.models import load_model
from ft_core.sft.rows import rows_of
from ft_core.sft.training import check_packing

ANSWERS = {"cat": "red", "dog": "blue", "tree": "green", "car": "black"}
FULL: dict[str, Any] = {"lora_rank": None, "learning_rate": 5e-3, "show_progress": False}
FULL |= {"device": "cpu", "precision": "fp32", "batch_size": 4, "epochs": 2}


def example(question: str, answer: str) -> ChatExample:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return ChatExample(messages=messages)


def colors(shift: int = 0) -> ChatDataset:
    words = list(ANSWERS.values())
    examples = [
        example(f"What color is the {thing}{mark}", f"It is {words[(i + shift) % 4]}.")
        for i, thing in enumerate(ANSWERS)
        for mark in ("?", " here?")
    ]
    return ChatDataset(examples=examples)


@pytest.fixture(scope="module")
def base(eager_lm: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    texts = [message["content"] for one in colors() for message in one.messages] * 3
    return eager_lm(tmp_path_factory.mktemp("base"), texts, vocabulary=300, window=128)


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "teacher.jsonl"
    colors().save(path)
    return path


@pytest.fixture(scope="module")
def student(
    base: str, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> LocalFinetuneEngine:
    """All weights, until the eight answers are known by heart."""
    folder = tmp_path_factory.mktemp("student") / "model"
    settings = FULL | {"epochs": 15, "eval_steps": 10}
    engine = LocalFinetuneEngine(base, data_file, output_dir=folder, val_data=colors(), **settings)
    engine.finetune()
    return engine


@pytest.fixture(scope="module")
def lora(base: str, tmp_path_factory: pytest.TempPathFactory) -> LocalFinetuneEngine:
    folder = tmp_path_factory.mktemp("lora") / "model"
    settings = FULL | {"lora_rank": 4, "epochs": 3, "gradient_checkpointing": True}
    engine = LocalFinetuneEngine(
        base, colors(), output_dir=folder, lora={"target_modules": {"v_proj", "q_proj"}}, **settings
    )
    engine.finetune()
    return engine


def answers(llm: Any) -> list[str]:
    return [
        str(llm.chat([ChatMessage(content=one.messages[0]["content"])]).message.content)
        for one in colors()
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    [file] = folder.glob("*.safetensors")
    loaded: dict[str, torch.Tensor] = load_file(file)
    return loaded


def until(done: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


# --- What it learns ------------------------------------------------------------------------------


def test_a_student_knows_the_answers_and_the_base_does_not(
    student: LocalFinetuneEngine, base: str
) -> None:
    from ft_core.sft import LocalLLM

    expected = [one.answer() for one in colors()]
    assert answers(student.get_finetuned_model(max_new_tokens=20)) == expected
    untrained = answers(LocalLLM.from_pretrained(base, device="cpu", max_new_tokens=20))
    assert not set(untrained) & set(expected)


def test_the_losses_are_reported(student: LocalFinetuneEngine, base: str) -> None:
    manifest = json.loads((student.output_dir / "ft.json").read_text())
    metrics = manifest["metrics"]
    model, tokenizer = load_model(student.output_dir, "cpu")
    losses = answer_losses(model, tokenizer, colors(), show_progress=False)
    assert metrics["validation_loss"] == pytest.approx(losses.mean(), rel=0.05)
    model, tokenizer = load_model(base, "cpu")
    losses = answer_losses(model, tokenizer, colors(), show_progress=False)
    assert metrics["base_loss"] == pytest.approx(losses.mean(), rel=0.01)
    chat = ChatFormat(tokenizer)
    tokens = sum(len(row) for row in rows_of(colors().examples, chat, 128, "train"))
    assert metrics["tokens"] == 15 * tokens
    assert student.get_current_job().trained_tokens == 15 * tokens
    events = student.events()
    steps = [event.data["step"] for event in events if "train_loss" in event.data]
    assert steps == sorted(set(steps))
    assert steps[-1] == 30
    assert events[0].data.keys() >= {"step", "steps", "valid_loss"}


def test_the_folder_holds_no_pickle_and_no_rest_of_the_training(
    student: LocalFinetuneEngine,
) -> None:
    names = {path.name for path in student.output_dir.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "ft.json", "README.md"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))}
    assert not student.output_dir.with_name("model.training").exists()
    assert json.loads((student.output_dir / "config.json").read_text()).get("use_cache", True)


def test_a_loaded_engine_answers_but_cannot_train(student: LocalFinetuneEngine) -> None:
    loaded = LocalFinetuneEngine.load(student.output_dir)
    assert loaded.get_current_job().status is JobStatus.SUCCEEDED
    assert loaded.get_current_job().model == str(student.output_dir)
    assert answers(loaded.get_finetuned_model(max_new_tokens=20))[0] == "It is red."
    with pytest.raises(ArgumentError, match="data_path: is not there"):
        loaded.finetune()


def test_the_best_checkpoint_is_kept_and_training_stops_early(base: str, tmp_path: Path) -> None:
    """Validation has other answers than training: it gets worse with every step in the end."""
    engine = LocalFinetuneEngine(
        base,
        colors(),
        output_dir=tmp_path / "model",
        val_data=colors(shift=1),
        **FULL | {"epochs": 20, "early_stopping_patience": 2},
    )
    engine.finetune()
    logged = [event.data for event in engine.events()]
    found = {one["step"]: one["valid_loss"] for one in logged if "valid_loss" in one}
    best = min(loss for step, loss in found.items() if step > 0)
    last = max(found)
    assert found[last] > best
    assert last < 40  # of 40 steps
    metrics = json.loads((tmp_path / "model" / "ft.json").read_text())["metrics"]
    assert metrics["validation_loss"] == pytest.approx(best)
    model, tokenizer = load_model(tmp_path / "model", "cpu")
    losses = answer_losses(model, tokenizer, colors(shift=1), show_progress=False)
    assert losses.mean() == pytest.approx(best, rel=0.02)


def test_training_that_does_not_help_is_said(
    base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = FULL | {"epochs": 1, "learning_rate": 5.0, "warmup_ratio": 0.0}
    engine = LocalFinetuneEngine(
        base, colors(), output_dir=tmp_path / "model", val_data=colors(), **settings
    )
    engine.finetune()
    assert "training did not help on validation" in caplog.text


# --- LoRA and merging ----------------------------------------------------------------------------


def test_lora_saves_the_updates_alone(lora: LocalFinetuneEngine, base: str) -> None:
    names = {path.name for path in lora.output_dir.iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    assert {key.split(".")[-3] for key in weights(lora.output_dir)} == {"q_proj", "v_proj"}
    settings = json.loads((lora.output_dir / "ft.json").read_text())["settings"]
    assert settings["lora"] == {"target_modules": ["q_proj", "v_proj"]}
    model, tokenizer = load_model(lora.output_dir, "cpu")
    plain, _ = load_model(base, "cpu")
    mine = answer_losses(model, tokenizer, colors(), show_progress=False).mean()
    assert mine < answer_losses(plain, tokenizer, colors(), show_progress=False).mean() - 0.1


@pytest.mark.parametrize("name", ["lora", "student"])
def test_a_merged_model_is_an_ordinary_one(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    engine = request.getfixturevalue(name)
    folder = engine.merge(tmp_path / "merged")
    assert folder == tmp_path / "merged"
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tuned, _ = load_model(engine.output_dir, "cpu")
    ids = tokenizer("What color is the cat?", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        torch.testing.assert_close(merged(ids).logits, tuned(ids).logits, atol=1e-4, rtol=1e-4)
    # What vLLM, `transformers serve` and llama.cpp's converter look for.
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    files = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files
    assert {"generation_config.json", "ft.json"} <= files
    assert not any("adapter" in file for file in files)
    assert tokenizer.chat_template
    assert "chat_template.jinja" in files
    with pytest.raises(ArtifactError, match="holds files that no fine-tuning pack saved"):
        engine.merge(Path(__file__).parent)


def test_a_merged_model_has_the_type_of_its_base(base: str, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "half")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(tmp_path / "half")
    engine = LocalFinetuneEngine(
        str(tmp_path / "half"),
        colors(),
        output_dir=tmp_path / "model",
        **FULL | {"lora_rank": 2, "epochs": 1},
    )
    engine.finetune()
    folder = engine.merge(tmp_path / "merged")
    assert {weight.dtype for weight in weights(folder).values()} == {torch.bfloat16}
    # Servers end an answer where the configuration says.
    config = json.loads((folder / "generation_config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id


def test_nothing_to_use_before_training(base: str, tmp_path: Path) -> None:
    engine = LocalFinetuneEngine(base, colors(), output_dir=tmp_path / "none")
    with pytest.raises(ArtifactError, match="no such folder; train first"):
        engine.get_finetuned_model()
    with pytest.raises(ArtifactError, match="no such folder; train first"):
        engine.merge(tmp_path / "merged")
    with pytest.raises(ArtifactError):
        LocalFinetuneEngine.from_job_id(str(tmp_path / "none"))


def test_a_damaged_adapter_is_named(lora: LocalFinetuneEngine, tmp_path: Path) -> None:
    shutil.copytree(lora.output_dir, tmp_path / "copy")
    (tmp_path / "copy" / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ArtifactError, match="the adapter cannot be loaded"):
        load_model(tmp_path / "copy", "cpu")
    (tmp_path / "copy" / "adapter_config.json").write_text("{")
    with pytest.raises(ArtifactError, match="the adapter cannot be loaded"):
        load_model(tmp_path / "copy", "cpu")


# --- The job -------------------------------------------------------------------------------------

SLOW = """
import sys, time
from transformers import TrainerCallback
from ft_core.sft import LocalFinetuneEngine

class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)
        if state.global_step == int(sys.argv[4]):
            time.sleep(600)

LocalFinetuneEngine(
    sys.argv[1], sys.argv[2], output_dir=sys.argv[3], callbacks=[Slow()],
    lora_rank=None, learning_rate=5e-3, device="cpu", precision="fp32", batch_size=4,
    epochs=4, show_progress=False,
).finetune()
"""


class Slow:
    """A process that trains, and stands still at one step."""

    def __init__(self, base: str, data_file: Path, folder: Path, step: int) -> None:
        command = [sys.executable, "-c", SLOW, base, str(data_file), str(folder), str(step)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == f"step {step}\n":
                return
        raise AssertionError(f"it ended with {self.process.wait()}")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


def engine_of(base: str, data: Any, folder: Path, **changes: Any) -> LocalFinetuneEngine:
    return LocalFinetuneEngine(base, data, output_dir=folder, **FULL | {"epochs": 4} | changes)


def test_a_killed_run_goes_on_and_others_see_it(base: str, data_file: Path, tmp_path: Path) -> None:
    slow = Slow(base, data_file, tmp_path / "model", step=5)
    try:
        mine = engine_of(base, data_file, tmp_path / "model")
        job = mine.finetune(wait=False)  # attaches
        assert job.status is JobStatus.RUNNING
        with pytest.raises(WaitTimeoutError):
            mine.wait(timeout=0.3)
        assert {event.data["step"] for event in mine.events()} == {1, 2, 3, 4}  # the fifth stands
        seen = LocalFinetuneEngine.from_job_id(job.id)
        assert seen.base_model == base
        assert seen.get_current_job().status is JobStatus.RUNNING
        for wait in (True, False):
            with pytest.raises(TrainingError, match="another process is training other data"):
                engine_of(base, colors(1), tmp_path / "model").finetune(wait=wait)
    finally:
        slow.kill()
    job = mine.get_current_job()
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert "the process has died; finetune() goes on" in job.error
    begun = {path.name for path in (tmp_path / "model.training").glob("checkpoint-*")}
    assert begun == {"checkpoint-2", "checkpoint-4"}

    assert mine.finetune().status is JobStatus.SUCCEEDED
    # Those of the killed process, and from its checkpoint on: none twice.
    steps = [event.data["step"] for event in mine.events()]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    whole = engine_of(base, data_file, tmp_path / "whole")
    whole.finetune()
    expected = weights(tmp_path / "whole")
    for name, weight in weights(tmp_path / "model").items():
        torch.testing.assert_close(weight, expected[name])


def test_a_finished_run_is_returned(
    base: str, student: LocalFinetuneEngine, caplog: pytest.LogCaptureFixture, data_file: Path
) -> None:
    before = (student.output_dir / "model.safetensors").stat().st_mtime_ns
    settings = FULL | {"epochs": 15, "eval_steps": 10}
    again = LocalFinetuneEngine(
        base, data_file, output_dir=student.output_dir, val_data=colors(), **settings
    )
    caplog.set_level(logging.INFO, logger="ft_core")
    assert again.finetune().status is JobStatus.SUCCEEDED
    assert again.finetune(wait=False).status is JobStatus.SUCCEEDED
    assert (student.output_dir / "model.safetensors").stat().st_mtime_ns == before
    assert "is trained already; delete it to train again" in caplog.text
    assert "step 1 of" not in caplog.text  # told while it was trained


def test_what_another_run_left_behind_does_not_hide_a_finished_one(
    base: str, data_file: Path, tmp_path: Path
) -> None:
    first = engine_of(base, colors(), tmp_path / "model", epochs=1)
    first.finetune()
    slow = Slow(base, data_file, tmp_path / "model", step=1)
    slow.kill()
    again = engine_of(base, colors(), tmp_path / "model", epochs=1)
    assert again.finetune().status is JobStatus.SUCCEEDED
    other = engine_of(base, data_file, tmp_path / "model")
    other.job_id = str(tmp_path / "model")
    assert other.get_current_job().status is JobStatus.FAILED


def test_a_run_in_the_background_is_found_and_cancelled_and_goes_on(
    base: str, tmp_path: Path
) -> None:
    settings = {"epochs": 600, "eval_steps": 10}
    engine = engine_of(base, colors(), tmp_path / "model", **settings)
    job = engine.finetune(wait=False)
    assert job.status in (JobStatus.QUEUED, JobStatus.RUNNING)
    assert job.id == str(tmp_path / "model")
    until(lambda: engine.events())
    # Another process finds it by its id, and cancels it.
    code = (
        "import sys; from ft_core.sft import LocalFinetuneEngine\n"
        "engine = LocalFinetuneEngine.from_job_id(sys.argv[1])\n"
        "print(engine.get_current_job().status.value, len(engine.events()) > 0)\n"
        "engine.cancel()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, job.id], capture_output=True, text=True, cwd="/", check=True
    )
    assert done.stdout == "running True\n"
    with pytest.raises(TrainingError, match="was cancelled"):
        engine.wait()
    assert engine.get_current_job().status is JobStatus.CANCELLED
    last = engine.events()[-1].data["step"]
    assert last < 1200
    folder = tmp_path / "model.training"
    assert list(folder.glob("checkpoint-*"))

    # Called again, it goes on; a second process with the same data attaches.
    assert engine.finetune(wait=False).status in (JobStatus.QUEUED, JobStatus.RUNNING)
    second = engine_of(base, colors(), tmp_path / "model", **settings)
    assert second.finetune(wait=False).status in (JobStatus.QUEUED, JobStatus.RUNNING)
    until(lambda: engine.events()[-1].data["step"] > last)
    second.cancel()
    with pytest.raises(TrainingError, match="was cancelled"):
        second.wait()
    assert "resuming" not in (folder / "log.txt").read_text()  # told by the one that started it


def test_a_run_in_the_background_ends_and_a_cancel_before_its_start_holds(
    base: str, tmp_path: Path
) -> None:
    engine = engine_of(base, colors(), tmp_path / "model", epochs=2)
    engine.finetune(wait=False)
    engine.cancel()
    with pytest.raises(TrainingError, match="was cancelled"):
        engine.wait()
    assert not engine.events()
    assert engine.finetune(timeout=120).status is JobStatus.SUCCEEDED
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert engine.cancel().status is JobStatus.SUCCEEDED


def test_a_worker_that_fails_or_dies_says_why(base: str, tmp_path: Path) -> None:
    bad = engine_of(str(tmp_path / "missing"), colors(), tmp_path / "model")
    bad.finetune(wait=False)
    with pytest.raises(TrainingError, match=r"failed: model: .*missing: no such folder"):
        bad.wait()

    engine = engine_of(base, colors(), tmp_path / "other", epochs=600)
    engine.finetune(wait=False)
    until(lambda: engine.events())
    [pid] = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and str(tmp_path / "other").encode() in _command_line(entry)
    ]
    os.kill(pid, signal.SIGKILL)
    until(lambda: engine.get_current_job().status.ended)
    job = engine.get_current_job()
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert "the process has died; finetune() goes on. Its last words: " in job.error


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_callbacks_stay_in_this_process(base: str, tmp_path: Path) -> None:
    engine = engine_of(base, colors(), tmp_path / "model", callbacks=[object()])
    with pytest.raises(ArgumentError, match="callbacks: cannot go to another process"):
        engine.finetune(wait=False)


# --- The same again, and other ways to the same --------------------------------------------------


def test_the_seed_decides_and_the_app_keeps_its_random_numbers(base: str, tmp_path: Path) -> None:
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    lora: dict[str, Any] = {"lora_rank": 4, "epochs": 2}
    engine_of(base, colors(), tmp_path / "one", **lora).finetune()
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert transformers.logging.get_verbosity() == verbosity
    assert transformers.utils.logging.is_progress_bar_enabled() == bars
    engine_of(base, colors(), tmp_path / "two", **lora).finetune()
    engine_of(base, colors(), tmp_path / "three", seed=1, **lora).finetune()
    one, two, three = (weights(tmp_path / name) for name in ("one", "two", "three"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], three[name]) for name in one)


def test_packing_learns_the_same(base: str, tmp_path: Path) -> None:
    """All examples in one step, packed and apart: the same gradient."""
    settings: dict[str, Any] = {"epochs": 2, "device_batch_size": 8}
    apart = engine_of(base, colors(), tmp_path / "apart", batch_size=8, **settings)
    packed = engine_of(
        base, colors(), tmp_path / "packed", batch_size=2, packing=True, max_length=128, **settings
    )
    apart.finetune()
    packed.finetune()
    losses = [[event.data["train_loss"] for event in engine.events()] for engine in (apart, packed)]
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    expected = weights(tmp_path / "apart")
    for name, weight in weights(tmp_path / "packed").items():
        torch.testing.assert_close(weight, expected[name], atol=1e-3, rtol=1e-2)


def test_packing_is_refused_where_the_model_mixes_the_packed(base: str) -> None:
    model, tokenizer = load_model(base, "cpu")
    rows = rows_of(colors().examples, ChatFormat(tokenizer), 128, "train")
    check_packing(model, rows)

    class Leaky(torch.nn.Module):  # as models with a mask of their own
        device = model.device

        def forward(self, input_ids: Any, position_ids: Any, **kwargs: Any) -> Any:
            mask = torch.ones_like(input_ids)
            return model(
                input_ids=input_ids, position_ids=position_ids, attention_mask=mask, **kwargs
            )

    with pytest.raises(ArgumentError, match="packing: Leaky does not keep packed examples apart"):
        check_packing(Leaky(), rows)


def test_gradients_that_add_up_learn_the_same(base: str, tmp_path: Path) -> None:
    for name, size in (("one", 8), ("two", 2)):
        engine_of(
            base, colors(), tmp_path / name, batch_size=8, device_batch_size=size, epochs=1
        ).finetune()
    expected = weights(tmp_path / "one")
    for name, weight in weights(tmp_path / "two").items():
        torch.testing.assert_close(weight, expected[name], atol=1e-3, rtol=1e-2)


def test_callbacks_and_no_trackers(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = []

    class Look(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((args.report_to, args.max_grad_norm, type(kwargs["model"]).__name__))

    engine_of(
        base, colors(), Path("here"), callbacks=[Look()], epochs=1, max_grad_norm=0.5
    ).finetune()
    assert seen == [([], 0.5, "LlamaForCausalLM")]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"here", ".here.training.lock"}
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "%|" not in captured.err  # no bars


# --- What goes wrong -----------------------------------------------------------------------------


def test_a_learning_rate_that_breaks_the_weights(base: str, tmp_path: Path) -> None:
    settings = {"learning_rate": 1e38, "max_grad_norm": 1e30, "warmup_ratio": 0.0, "epochs": 2}
    engine = engine_of(base, colors(), tmp_path / "model", **settings)
    with pytest.raises(TrainingError, match="the weights became NaN or infinite; lower learning"):
        engine.finetune()
    assert engine_of(base, colors(), tmp_path / "model", **settings)._retrieve("x").status is (
        JobStatus.FAILED
    )
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("broken", ["checkpoint", "model"])
def test_a_full_disk(base: str, tmp_path: Path, broken: str) -> None:
    """A limit on the size of files stands for the disk."""
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    small = 20_000

    class Fill(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if broken == "checkpoint":
                resource.setrlimit(resource.RLIMIT_FSIZE, (small, hard))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (small, hard))

    engine = engine_of(base, colors(), tmp_path / "model", epochs=1, callbacks=[Fill()])
    try:
        with pytest.raises(TrainingError, match=r"cannot be written.*Make room, and run it again"):
            engine.finetune()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "model").exists()
    engine.callbacks = []
    assert engine.finetune().status is JobStatus.SUCCEEDED


def test_4_bits_need_a_gpu(base: str, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ArgumentError, match="load_in_4bit: needs a CUDA GPU"):
        engine_of(base, colors(), tmp_path / "m", load_in_4bit=True, lora_rank=2).finetune()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs: is a whole number from 1, not 0"),
        ({"batch_size": True}, "batch_size: is a whole number from 1"),
        ({"learning_rate": "1e-4"}, "learning_rate: is a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate: is a number above 0"),
        ({"warmup_ratio": 1.0}, "warmup_ratio: is at least 0 and below 1"),
        ({"precision": "int8"}, "precision: is auto, fp32, bf16 or fp16"),
        ({"seed": -1}, "seed: is a whole number from 0"),
        ({"load_in_4bit": True}, "load_in_4bit: holds the base model fixed; give a lora_rank"),
        ({"n_epochs": 3}, "n_epochs: is no argument; settings are epochs,"),
        ({"lora": {"target_modules": ["q_proj"]}}, "lora: has no effect"),
        ({"lora_rank": 2, "lora": {"r": object()}}, "lora: holds texts, numbers and lists only"),
    ],
)
def test_arguments_are_checked_at_once(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        engine_of("any", colors(), tmp_path / "m", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": "zigzag"}, "settings: do not work here: .*zigzag"),
        ({"device": "cuda:1"}, "device: training takes the first GPU .*CUDA_VISIBLE_DEVICES=1"),
    ],
)
def test_settings_that_do_not_work(
    base: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        engine_of(base, colors(), tmp_path / "m", **changes).finetune()


def test_models_that_cannot_be_used(base: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no such folder"):
        engine_of(str(tmp_path / "none"), colors(), tmp_path / "m").finetune()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match=r"model: .*empty' cannot be loaded"):
        engine_of(str(tmp_path / "empty"), colors(), tmp_path / "m").finetune()
    shutil.copytree(base, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    with pytest.raises(ArgumentError, match="base_model: has no chat template"):
        engine_of(str(tmp_path / "plain"), colors(), tmp_path / "m").finetune()


def test_bad_data_is_named(base: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "?"}]}\n')
    with pytest.raises(DatasetError, match=r"bad.jsonl: line 1"):
        engine_of(base, file, tmp_path / "m").finetune()
    long = ChatDataset(examples=[*colors().examples, example("?", "a b c " * 200)])
    with pytest.raises(DatasetError, match=r"train\[8\]: an answer takes more than the 128 tokens"):
        engine_of(base, long, tmp_path / "m").finetune()
    assert not (tmp_path / "m").exists()


def test_an_output_folder_with_other_files_is_left_alone(base: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    for wait in (True, False):
        with pytest.raises(ArtifactError, match="holds files that no fine-tuning pack saved"):
            engine_of(base, colors(), tmp_path / "mine").finetune(wait=wait)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"
    (tmp_path / "m.training").mkdir()
    (tmp_path / "m.training" / "notes.txt").write_text("mine")
    with pytest.raises(TrainingError, match="is in the way of the checkpoints; move it"):
        engine_of(base, colors(), tmp_path / "m").finetune()
    assert (tmp_path / "m.training" / "notes.txt").exists()


def test_the_engine_is_made_without_torch() -> None:
    code = (
        "import sys; from ft_core.sft import LocalFinetuneEngine, SFTSettings\n"
        "LocalFinetuneEngine('any', None, output_dir='x')\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_settings_are_one_object_or_names(tmp_path: Path) -> None:
    settings = SFTSettings(epochs=5, seed=3)
    engine = LocalFinetuneEngine(
        "any", None, output_dir=tmp_path / "m", settings=settings, epochs=7
    )
    assert (engine.settings.epochs, engine.settings.seed) == (7, 3)
    assert SimpleNamespace(**engine.settings.to_dict()).epochs == 7
