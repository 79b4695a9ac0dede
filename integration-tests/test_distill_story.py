"""From a live teacher to a student in its place: every part is real, on one machine.

The teacher answers by rules over a socket (`openai_platform`), the student is a Llama of 100,000
random weights. It can learn the task within seconds: to answer, from the retrieved passage, with
the sentence that names the cargo. The ships that it is asked about are not those it learned on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import model_assets
import pytest
import testkit
from llama_index.core import PromptTemplate, VectorStoreIndex
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.llms import LLM
from llama_index.core.schema import TextNode
from llama_index.llms.openai import OpenAI
from openai_platform import OpenAIPlatform
from platform_trainer import LocalTrainer

from ft_core.errors import TrainingError
from ft_core.jobs import JobStatus
from ft_core.sft.evaluation import answer_losses
from ft_core.sft.models import load_model
from ft_openai_distill import (
    ChatDataset,
    LocalFinetuneEngine,
    LocalLLM,
    OpenAIFinetuneEngine,
    OpenAIFineTuningHandler,
    evaluate_distillation,
)

pytestmark = pytest.mark.slow

MODEL = "gpt-4o-mini-2024-07-18"
RECORDED = Path(__file__).resolve().parents[2] / "shared/data/distill"

SHIP_NAMES = """Albatross Avocet Bittern Brant Bunting Coot Cormorant Curlew Dipper Dotterel
    Dunlin Egret Eider Finch Fulmar Gannet Garganey Grebe Harrier Heron Hobby Ibis Jacana
    Jackdaw Kestrel Kite Knot Lapwing Lark Linnet Magpie Martin Merlin Nightjar Noddy
    Nuthatch Oriole Osprey Ouzel Petrel Pipit Plover Quail Raven Redstart Rook Sanderling
    Shelduck Swift Tern Turnstone Twite Vireo Whimbrel Wigeon Wren"""
SHIPS = SHIP_NAMES.split()
CARGOES = [
    "Copper ore, which is a heavy cargo.",
    "Tea in chests, which scents the cargo.",
    "Oak beams, which fill a cargo hold.",
    "Soft wool, which makes light cargo.",
]
ANSWERS = {ship: CARGOES[number % 4] for number, ship in enumerate(SHIPS)}
ASKED, HELD_OUT = SHIPS[:42], SHIPS[42:]
TEACHABLE: dict[str, Any] = {"lora_rank": None, "learning_rate": 1e-2, "device": "cpu"}


def question(ship: str) -> str:
    return f"{ship}: which cargo?"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with testkit.one_thread():
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The untrained student."""
    texts = [*CARGOES, *map(question, SHIPS), "(ship) Query: system user assistant"] * 4
    folder = tmp_path_factory.mktemp("tiny")
    return model_assets.tiny_causal_lm(folder, texts, dim=64, window=2048, vocabulary=600)


@pytest.fixture(scope="module")
def server(tiny: str) -> Iterator[OpenAIPlatform]:
    with OpenAIPlatform(trainer=LocalTrainer({MODEL: tiny}, **TEACHABLE)) as server:
        yield server
    assert server.violations == []


@pytest.fixture(scope="module")
def index() -> VectorStoreIndex:
    nodes = [TextNode(text=f"{ship} (ship)\n\n{cargo}") for ship, cargo in ANSWERS.items()]
    return VectorStoreIndex(nodes, embed_model=model_assets.HashingEmbedding(dim=1024))


def app(index: VectorStoreIndex, llm: LLM) -> BaseQueryEngine:
    """The app; only its LLM changes in this story."""
    prompt = PromptTemplate("{context_str}\nQuery: {query_str}")
    return index.as_query_engine(llm=llm, similarity_top_k=1, text_qa_template=prompt)


def ask(engine: BaseQueryEngine, ships: list[str]) -> dict[str, str]:
    return {ship: str(engine.query(question(ship))) for ship in ships}


@pytest.fixture(scope="module")
def teacher(index: VectorStoreIndex, server: OpenAIPlatform) -> BaseQueryEngine:
    llm = OpenAI(model="gpt-4.1", api_base=server.base_url, api_key=server.api_key)
    return app(index, llm)


@pytest.fixture(scope="module")
def journal(teacher: BaseQueryEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the handler writes while the teacher works."""
    path = tmp_path_factory.mktemp("journal") / "teacher.jsonl"
    with OpenAIFineTuningHandler(path).attach(teacher):
        answers = ask(teacher, ASKED)
    assert answers == {ship: ANSWERS[ship] for ship in ASKED}
    return path


def agreement(
    index: VectorStoreIndex, teacher: BaseQueryEngine, base: LLM, student: LLM
) -> dict[str, Any]:
    """Run name to its ROUGE-L with the teacher's answers about ships that nobody learned on."""
    report = evaluate_distillation(
        [question(ship) for ship in HELD_OUT],
        base=app(index, base),
        student=app(index, student),
        teacher=teacher,
        num_workers=1,
        show_progress=False,
    )
    runs = {run["name"]: run for run in report.to_dict()["runs"]}
    assert not any(run["failures"] for run in runs.values())
    return {name: runs[name]["metrics"]["rouge_l"] for name in ("base", "student")}


def assert_learned(rouge: dict[str, Any]) -> None:
    assert rouge["student"]["mean"] > 0.8 > 0.4 > rouge["base"]["mean"]
    assert rouge["student"]["difference"]["p_value"] < 0.01


def test_a_hosted_student_takes_the_teachers_place(
    index: VectorStoreIndex,
    teacher: BaseQueryEngine,
    server: OpenAIPlatform,
    journal: Path,
    tiny: str,
) -> None:
    engine = OpenAIFinetuneEngine(
        MODEL,
        journal,
        hyperparameters={"n_epochs": 14, "batch_size": 8},
        base_url=server.base_url,
        api_key=server.api_key,
        poll_seconds=(0.05, 0.2),
    )
    job = engine.finetune()
    assert job.status is JobStatus.SUCCEEDED
    [uploaded] = [content for content in server.files.values() if b'"messages"' in content]
    assert len(uploaded.splitlines()) == len(ASKED)
    losses = [event.data["train_loss"] for event in engine.events() if "train_loss" in event.data]
    assert losses[-1] < losses[0] / 5

    student = engine.get_finetuned_model(max_tokens=24)
    assert (student.model, student.api_base) == (job.model, server.base_url)
    before = server.count("POST /chat/completions")
    answers = ask(app(index, student), HELD_OUT)
    assert server.count("POST /chat/completions") == before + len(HELD_OUT)
    right = sum(answers[ship] == ANSWERS[ship] for ship in HELD_OUT)
    assert right >= 0.8 * len(HELD_OUT), answers

    base = LocalLLM.from_pretrained(tiny, device="cpu", max_new_tokens=24)
    assert_learned(agreement(index, teacher, base, student))
    assert server.violations == []


def test_a_student_of_ones_own_learns_from_the_same_journal(
    index: VectorStoreIndex, teacher: BaseQueryEngine, journal: Path, tiny: str, tmp_path: Path
) -> None:
    settings = TEACHABLE | {"epochs": 14, "show_progress": False}
    engine = LocalFinetuneEngine(tiny, journal, output_dir=tmp_path / "student", **settings)
    assert engine.finetune().status is JobStatus.SUCCEEDED
    base = LocalLLM.from_pretrained(tiny, device="cpu", max_new_tokens=24)
    student = engine.get_finetuned_model(max_new_tokens=24)
    assert_learned(agreement(index, teacher, base, student))


def test_a_closed_account_is_shown_a_way_that_works(
    journal: Path, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with OpenAIPlatform(fine_tuning_closed=True) as closed:
        engine = OpenAIFinetuneEngine(
            MODEL, journal, base_url=closed.base_url, api_key=closed.api_key
        )
        with pytest.raises(TrainingError, match="not available to your organization") as caught:
            engine.finetune()
        assert closed.jobs == {}
        assert closed.violations == []

    message = str(caught.value)
    assert "pip install 'ft-openai-distill[local]'" in message
    [call] = re.findall(r"LocalFinetuneEngine\(.*?\)", message)
    assert repr(str(journal)) in call
    shown = eval(call.replace("<open model>", tiny), {"LocalFinetuneEngine": LocalFinetuneEngine})
    assert shown.finetune().status is JobStatus.SUCCEEDED
    losses = [event.data["train_loss"] for event in shown.events()]
    assert losses[-1] < losses[0]
    assert str(shown.get_finetuned_model(max_new_tokens=4).complete("Which cargo?"))


@pytest.mark.parametrize("name", ["gpt4_rag_events.jsonl", "gpt4_react_events.jsonl"])
def test_the_predecessors_recorded_files_train_a_student(name: str, tmp_path: Path) -> None:
    if not (RECORDED / name).exists():
        pytest.skip(f"{name} is not in ../shared/data/distill")
    dataset = ChatDataset.load(RECORDED / name)
    dataset.to_openai_jsonl(tmp_path / "openai.jsonl")
    assert [example.messages for example in ChatDataset.load(tmp_path / "openai.jsonl")] == [
        example.messages for example in dataset
    ]
    with OpenAIPlatform() as server:
        hosted = OpenAIFinetuneEngine(
            MODEL,
            RECORDED / name,
            base_url=server.base_url,
            api_key=server.api_key,
            job_file=tmp_path / "jobs.json",
            poll_seconds=(0.02, 0.1),
        )
        assert hosted.estimate().examples == len(dataset)
        assert hosted.finetune().status is JobStatus.SUCCEEDED
        assert (tmp_path / "openai.jsonl").read_bytes() in server.files.values()
        assert server.violations == []

    parts = dataset.split({"train": 0.8, "held-out": 0.2})
    texts = [message["content"] for example in dataset for message in example.messages]
    tiny = model_assets.tiny_causal_lm(tmp_path / "tiny", texts, window=1024, vocabulary=2000)
    engine = LocalFinetuneEngine(
        tiny,
        ChatDataset(examples=parts["train"].examples[:80]),
        output_dir=tmp_path / "student",
        epochs=1,
        max_length=640,
        show_progress=False,
        **TEACHABLE,
    )
    assert engine.finetune().status is JobStatus.SUCCEEDED
    base, student = (
        answer_losses(*load_model(folder, "cpu"), parts["held-out"], max_length=640)
        for folder in (tiny, engine.output_dir)
    )
    assert (student < base).mean() > 0.9
    assert student.mean() < base.mean() - 0.3
