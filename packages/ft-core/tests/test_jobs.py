"""`JobEngine` and `JobRecord` on an engine whose service is a folder of JSON files."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from ft_core.errors import ArtifactError, TrainingError
from ft_core.jobs import Job, JobEngine, JobEvent, JobRecord, JobStatus, WaitTimeoutError, open_lock


class FolderEngine(JobEngine):
    """Jobs are files `job-<n>.json`; each look at one takes the next state of its script."""

    def __init__(self, folder: Path, settings: str = "a", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.folder = folder
        self.settings = settings
        self.script = ["queued", "running", "succeeded"]
        self.failures: list[Exception] = []

    @classmethod
    def from_job_id(cls, job_id: str, **settings: Any) -> FolderEngine:
        return cls(job_id=job_id, **settings)

    def get_finetuned_model(self, **kwargs: Any) -> Any:
        return self._finished_job().model

    def _fingerprint(self) -> str:
        return self.settings

    def _submit(self) -> Job:
        job_id = f"job-{len(list(self.folder.glob('job-*.json')))}"
        self._path(job_id).write_text(json.dumps(["validating_files", *self.script]))
        return self._retrieve(job_id)

    def _retrieve(self, job_id: str) -> Job:
        if self.failures:
            raise self.failures.pop(0)
        if not self._path(job_id).exists():
            raise TrainingError(f"no job {job_id}")
        states = json.loads(self._path(job_id).read_text())
        if len(states) > 1:
            self._path(job_id).write_text(json.dumps(states[1:]))
        status = JobStatus(states[0])
        return Job(
            job_id,
            status,
            model=f"model of {job_id}" if status is JobStatus.SUCCEEDED else None,
            error="the data is bad" if status is JobStatus.FAILED else None,
        )

    def _list_events(self, job_id: str) -> list[JobEvent]:
        left = len(json.loads(self._path(job_id).read_text()))
        return [
            JobEvent(
                datetime(2026, 1, 1, tzinfo=timezone.utc),
                "info",
                f"step {step}",
                {"step": step, "train_loss": 1 / (step + 1)},
            )
            for step in range(len(self.script) + 1 - left)
        ]

    def _cancel(self, job_id: str) -> Job:
        self._path(job_id).write_text(json.dumps(["cancelled"]))
        return self._retrieve(job_id)

    def _path(self, job_id: str) -> Path:
        return self.folder / f"{job_id}.json"


@pytest.fixture
def naps() -> list[float]:
    return []


@pytest.fixture
def engine(tmp_path: Path, naps: list[float]) -> FolderEngine:
    return FolderEngine(tmp_path, record=JobRecord(tmp_path / "r.jobs.json"), sleep=naps.append)


def jobs(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("job-*.json"))


def test_a_job_is_started_and_waited_for(engine: FolderEngine, naps: list[float]) -> None:
    job = engine.finetune()
    assert job.status is JobStatus.SUCCEEDED
    assert engine.get_finetuned_model() == "model of job-0"
    assert naps == [1.0, 1.5]
    assert JobRecord(engine.folder / "r.jobs.json").read("a") == {"job_id": "job-0"}


def test_pauses_grow_to_the_longest(engine: FolderEngine, naps: list[float]) -> None:
    engine.script = ["running"] * 12 + ["succeeded"]
    engine.finetune()
    assert naps[:3] == [1.0, 1.5, 2.25]
    assert naps == sorted(naps)
    assert naps[-1] == 30.0


def test_wait_false_returns_at_once(engine: FolderEngine, naps: list[float]) -> None:
    assert engine.finetune(wait=False).status is JobStatus.VALIDATING_FILES
    assert naps == []
    with pytest.raises(TrainingError, match="job-0 is not done: its status is queued"):
        engine.get_finetuned_model()


def test_events_are_logged_once(
    engine: FolderEngine, caplog: pytest.LogCaptureFixture, naps: list[float]
) -> None:
    with caplog.at_level(logging.INFO, logger="ft_core.jobs"):
        engine.finetune()
        engine.wait()
    assert [r.message for r in caplog.records if r.message.startswith("step")] == [
        "step 0",
        "step 1",
        "step 2",
    ]


def test_a_failed_job_says_why(engine: FolderEngine) -> None:
    engine.script = ["running", "failed"]
    with pytest.raises(TrainingError, match="job job-0 failed: the data is bad"):
        engine.finetune()


def test_a_cancelled_job_is_an_error_to_wait_for(engine: FolderEngine) -> None:
    engine.finetune(wait=False)
    assert engine.cancel().status is JobStatus.CANCELLED
    assert engine.cancel().status is JobStatus.CANCELLED
    with pytest.raises(TrainingError, match="job job-0 was cancelled"):
        engine.wait()


def test_the_time_is_over_but_the_job_goes_on(tmp_path: Path) -> None:
    engine = FolderEngine(tmp_path, poll_seconds=(0.01, 0.02))
    engine.script = ["running"] * 10_000
    with pytest.raises(WaitTimeoutError, match=r"from_job_id\('job-0'\)") as caught:
        engine.finetune(timeout=0.1)
    assert isinstance(caught.value, TimeoutError)
    assert isinstance(caught.value, TrainingError)
    engine._path("job-0").write_text('["succeeded"]')
    resumed = FolderEngine.from_job_id("job-0", folder=tmp_path)
    assert resumed.wait(timeout=0).model == "model of job-0"


class Refused(Exception):
    status_code = 401


class Busy(Exception):
    status_code = 503


def test_a_service_that_is_away_is_asked_again(
    engine: FolderEngine, naps: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    engine.finetune(wait=False)
    engine.failures = [ConnectionResetError("gone"), TimeoutError("slow"), Busy("busy")]
    with caplog.at_level(logging.WARNING, logger="ft_core.jobs"):
        assert engine.wait().status is JobStatus.SUCCEEDED
    assert len(naps) == 5
    assert [record.message for record in caplog.records] == [
        "no answer about job job-0, asking on: gone"
    ]


def test_what_will_not_get_better_ends_the_waiting(engine: FolderEngine) -> None:
    engine.finetune(wait=False)
    engine.failures = [Refused("no")]
    with pytest.raises(Refused):
        engine.wait()


def test_a_timeout_while_the_service_is_away(tmp_path: Path) -> None:
    engine = FolderEngine(tmp_path, poll_seconds=(0.01, 0.01))
    engine.finetune(wait=False)
    engine.failures = [ConnectionResetError("gone")] * 1000
    with pytest.raises(WaitTimeoutError, match="status unknown"):
        engine.wait(timeout=0.05)


@pytest.mark.parametrize(
    ("status", "same"),
    [("running", True), ("succeeded", True), ("failed", False), ("cancelled", False)],
)
def test_another_engine_finds_the_job(engine: FolderEngine, status: str, same: bool) -> None:
    first = engine.finetune(wait=False)
    engine._path(first.id).write_text(json.dumps([status]))
    record = JobRecord(engine.folder / "r.jobs.json")
    other = FolderEngine(engine.folder, record=record)
    assert (other.finetune(wait=False).id == first.id) is same
    assert jobs(engine.folder) == (["job-0"] if same else ["job-0", "job-1"])


def test_other_settings_are_another_job(engine: FolderEngine) -> None:
    engine.finetune(wait=False)
    FolderEngine(engine.folder, "b", record=engine._record).finetune(wait=False)
    engine.settings = "c"
    engine.finetune(wait=False)
    assert jobs(engine.folder) == ["job-0", "job-1", "job-2"]


def test_a_job_named_by_the_caller_is_not_recorded_as_of_these_data(engine: FolderEngine) -> None:
    engine.finetune(wait=False)
    other = FolderEngine(engine.folder, "b", record=engine._record, job_id="job-0")
    assert other.finetune(wait=False).id == "job-0"
    assert JobRecord(engine.folder / "r.jobs.json").read("b") == {}
    third = FolderEngine(engine.folder, "b", record=engine._record)
    assert third.finetune(wait=False).id == "job-1"


def test_a_recorded_job_that_is_gone_is_not_paid_for_again(engine: FolderEngine) -> None:
    first = engine.finetune(wait=False)
    engine._path(first.id).unlink()
    with pytest.raises(TrainingError, match=r"no job job-0. To start another, remove .*r\.jobs"):
        FolderEngine(engine.folder, record=engine._record).finetune()
    assert jobs(engine.folder) == []


def test_without_a_record_the_engine_itself_remembers(tmp_path: Path) -> None:
    engine = FolderEngine(tmp_path)
    assert engine.finetune(wait=False).id == engine.finetune(wait=False).id == "job-0"
    assert [path.name for path in tmp_path.iterdir()] == ["job-0.json"]


def test_threads_start_one_job(tmp_path: Path) -> None:
    # Each with a record of its own, as two engines have.
    engines = [FolderEngine(tmp_path, record=JobRecord(tmp_path / "r.jobs.json")) for _ in range(8)]
    started: list[str] = []
    threads = [
        threading.Thread(target=lambda e=e: started.append(e.finetune(wait=False).id))
        for e in engines
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert started == ["job-0"] * 8


def test_no_job_yet(engine: FolderEngine) -> None:
    for call in (engine.wait, engine.get_current_job, engine.events, engine.cancel):
        with pytest.raises(TrainingError, match="no job yet"):
            call()


def test_the_progress_line_is_silent_without_a_terminal(
    engine: FolderEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    engine.finetune()
    assert capfd.readouterr() == ("", "")


# --------------------------------------------------------------------------------------
# The record


def test_a_record_keeps_and_merges(tmp_path: Path) -> None:
    record = JobRecord(tmp_path / "deep" / "jobs.json")
    assert record.read("a") == {}
    assert not record.path.exists()
    record.update("a", x=1, y=2)
    record.update("b", x=3)
    record.update("a", x=4)
    assert JobRecord(record.path).read("a") == {"x": 4, "y": 2}
    assert JobRecord(record.path).read("b") == {"x": 3}


@pytest.mark.parametrize("content", ["", "{", '{"entries": 3}', "[]", '{"entries": {"a": 1}}'])
def test_a_damaged_record_is_never_taken_for_an_empty_one(tmp_path: Path, content: str) -> None:
    record = JobRecord(tmp_path / "jobs.json")
    record.path.write_text(content)
    for call in (lambda: record.read("a"), lambda: record.update("a", x=1)):
        with pytest.raises(ArtifactError, match=r"jobs\.json"):
            call()
    assert record.path.read_text() == content


def test_no_job_without_a_record_of_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    engine = FolderEngine(tmp_path, record=JobRecord(tmp_path / "file" / "jobs.json"))
    with pytest.raises(ArtifactError, match="job_file"):
        engine.finetune()
    assert jobs(tmp_path) == []


def test_a_job_that_could_not_be_recorded_is_kept(
    engine: FolderEngine, caplog: pytest.LogCaptureFixture
) -> None:
    # While the job is made, the record's place is taken: the id cannot be written any more.
    submit = engine._submit

    def submit_and_block() -> Job:
        job = submit()
        (engine.folder / "r.jobs.json").mkdir()
        return job

    engine._submit = submit_and_block  # type: ignore[method-assign]
    assert engine.finetune().model == "model of job-0"
    assert "job job-0 was started but not recorded" in caplog.text


WRITER = """
import sys
from ft_core.jobs import JobRecord
record = JobRecord(sys.argv[1])
for step in range(40):
    with record.locked():
        record.update("count", n=record.read("count").get("n", 0) + 1)
    if step == 0:
        print("on", flush=True)
"""


def test_processes_do_not_lose_each_others_updates(tmp_path: Path) -> None:
    path = tmp_path / "jobs.json"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path)]) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert JobRecord(path).read("count") == {"n": 120}


HOLDER = """
import sys, time
from ft_core.jobs import JobRecord
record = JobRecord(sys.argv[1])
with record.locked():
    record.update("a", held=True)
    print("on", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / "jobs.json"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "on\n"
        entered = threading.Event()

        def enter() -> None:
            with JobRecord(path).locked():
                entered.set()

        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.3)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert entered.wait(10)
        thread.join()
    assert JobRecord(path).read("a") == {"held": True}


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.jsonl"
    first = open_lock(path)
    assert first is not None
    assert open_lock(path, wait=False) is None
    os.close(first)
    second = open_lock(path, wait=False)
    assert second is not None
    os.close(second)


def test_import_loads_no_client() -> None:
    code = (
        "import sys, ft_core.jobs\n"
        "heavy = {'openai', 'cohere', 'httpx', 'torch', 'transformers', 'llama_index'}\n"
        "assert not heavy & {name.split('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
