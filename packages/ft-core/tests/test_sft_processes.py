import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from model_assets import tiny_causal_lm

from ft_core.datasets.chat import ChatDataset, ChatExample
from ft_core.sft import LocalLLM

COUNT = 12

SCRIPT = """
import json, os, sys
from transformers import TrainerCallback
from ft_core.sft import LocalFinetuneEngine

arguments = json.loads(sys.argv[1])
stop_at = arguments.pop("stop_at", None)
cancel_at = arguments.pop("cancel_at", None)
rank = os.environ.get("RANK", "0")
seen = open(arguments.pop("seen") + "." + rank, "a")


class Watch(TrainerCallback):
    def on_train_begin(self, args, state, control, model, **kwargs):
        def note(module, given, named):
            if module.training:
                for row, mask in zip(named["input_ids"], named["attention_mask"].bool()):
                    print(json.dumps(row[mask].tolist()), file=seen, flush=True)
        model.register_forward_pre_hook(note, with_kwargs=True)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == stop_at:
            os.kill(os.getpid(), 9)
        if state.global_step == cancel_at and rank == "0":
            engine.cancel()


engine = LocalFinetuneEngine(**arguments, callbacks=[Watch()], show_progress=False)
engine.job_id = str(engine.output_dir)
try:
    job = engine.finetune()
    end = job.status.value
except Exception as error:
    end = f"{type(error).__name__} {error}"
print(json.dumps({"end": end}), file=seen, flush=True)
"""


def dataset() -> ChatDataset:
    return ChatDataset(
        examples=[
            ChatExample(
                messages=[
                    {"role": "user", "content": f"Number {i}?"},
                    {"role": "assistant", "content": f"It is {i * 7}."},
                ]
            )
            for i in range(COUNT)
        ]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    dataset().save(folder / "data.jsonl")
    texts = [message["content"] for one in dataset() for message in one.messages]
    tiny_causal_lm(folder / "base", texts, vocabulary=300, window=128)
    (folder / "train.py").write_text(SCRIPT)
    return folder


@dataclass
class Launched:
    output: str
    seen: list[str]
    """The examples that went through a model in training."""
    ends: list[str]
    """How each process ended."""


def launch(folder: Path, name: str, **changes: Any) -> Launched:
    """Train with two processes."""
    arguments = {
        "base_model": str(folder / "base"),
        "data_path": str(folder / "data.jsonl"),
        "output_dir": str(folder / name),
        "seen": str(folder / f"{name}.seen"),
        "lora_rank": None,
        "learning_rate": 1e-2,
        "batch_size": 4,
        "epochs": 1,
        "device": "cpu",
        "precision": "fp32",
        **changes,
    }
    # As `accelerate launch` does for GPUs; on CPUs, that starts one process or asks for MPI.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(folder / "train.py"), json.dumps(arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    seen, ends = [], []
    for file in sorted(folder.glob(f"{name}.seen.*")):
        lines = file.read_text().splitlines()
        seen += [line for line in lines if line.startswith("[")]
        ends += [json.loads(line)["end"] for line in lines if line.startswith("{")]
        file.unlink()
    return Launched(done.stdout + done.stderr, seen, ends)


def test_two_processes_see_each_example_once_an_epoch_and_one_saves(folder: Path) -> None:
    ran = launch(folder, "two")
    assert ran.ends == ["succeeded", "succeeded"], ran.output
    assert len(ran.seen) == len(set(ran.seen)) == COUNT
    names = {path.name for path in (folder / "two").iterdir()}
    assert {"model.safetensors", "ft.json", "tokenizer.json"} <= names
    assert not (folder / "two.training").exists()
    events = (folder / "two" / "training.jsonl").read_text().splitlines()
    assert [json.loads(line)["data"]["step"] for line in events] == [1, 2, 3]
    llm = LocalLLM.from_pretrained(folder / "two", device="cpu", max_new_tokens=3)
    assert llm.complete("Number 3?").raw["usage"]["completion_tokens"] > 0


def test_two_processes_go_on_together_after_a_kill(folder: Path) -> None:
    before = launch(folder, "killed", eval_steps=1, epochs=2, stop_at=3)
    assert before.ends == []
    after = launch(folder, "killed", eval_steps=1, epochs=2)
    assert after.ends == ["succeeded", "succeeded"], after.output
    # The step that was killed before its checkpoint is taken again.
    assert len(after.seen) == 2 * COUNT - 8
    assert len(before.seen) == 12


def test_a_cancel_ends_both_processes_at_the_same_step(folder: Path) -> None:
    ran = launch(folder, "cancelled", epochs=50, cancel_at=3)
    kept = "Cancelled cancelled; the newest checkpoint is kept"
    assert ran.ends == [kept, kept], ran.output
    # Callbacks come after ours: the next step sees it.
    assert len(ran.seen) in (3 * 4, 4 * 4)


def test_what_the_main_process_refuses_ends_both(folder: Path) -> None:
    (folder / "foreign").mkdir(exist_ok=True)
    (folder / "foreign" / "thesis.txt").write_text("all of it")
    ran = launch(folder, "foreign")
    assert [end.partition(" ")[0] for end in ran.ends] == ["ArtifactError", "TrainingError"]
    assert all("holds files that no fine-tuning pack saved" in end for end in ran.ends)
    assert not ran.seen
