"""The commands on files, with a tiny model from a folder."""

from __future__ import annotations

import json
from pathlib import Path

import model_assets
import pytest
from llama_index.core import SummaryIndex, VectorStoreIndex
from llama_index.core.schema import TextNode

from ft_adapter.saved import load_adapter
from ft_core.cli import main
from ft_core.datasets import EmbeddingQAFinetuneDataset as Dataset
from ft_core.embed_models import load_embed_model


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, related: Dataset, related_heldout: Dataset
) -> Path:
    """`train.json`, `val.json`, a model in `model`, and its index of the corpus in `index`."""
    folder = tmp_path_factory.mktemp("cli")
    related.save(folder / "train.json")
    related_heldout.save(folder / "val.json")
    texts = [*related.corpus.values(), *related.queries.values()]
    made = model_assets.tiny_sentence_transformer(folder / "tiny", texts)
    (folder / "model").symlink_to(made)
    index_of(related, load_embed_model(str(folder / "model")), folder / "index")
    return folder


def index_of(dataset: Dataset, model: object, folder: Path) -> None:
    nodes = [TextNode(id_=key, text=text) for key, text in dataset.corpus.items()]
    VectorStoreIndex(nodes, embed_model=model).storage_context.persist(folder)


def ft(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def train(folder: Path, output: Path, *more: str | Path) -> int:
    return ft(
        "adapter", "train", folder / "train.json", "--embed-model", folder / "model",
        "--output", output, "--epochs", "20", "--learning-rate", "0.01", "--identity-pull", "0",
        "--cache", output.parent / "cache", *more,
    )  # fmt: skip


def evaluate(folder: Path, adapter: Path, *more: str | Path) -> int:
    return ft(
        "adapter", "eval", folder / "val.json", "--embed-model", folder / "model",
        "--adapter", adapter, "--cache", adapter.parent / "cache", *more,
    )  # fmt: skip


def test_train_and_eval_on_datasets(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    code = train(
        folder, tmp_path / "out", "--validation", folder / "val.json", "--html", page,
        "--adapter", "low_rank", "--batch-size", "16", "--seed", "3", "--json",
    )  # fmt: skip
    shown = capsys.readouterr()
    assert code == 0, shown.err
    document = json.loads(shown.out)
    assert document["adapter"] == str(tmp_path / "out")
    assert document["kept"] == "adapter"
    assert [run["name"] for run in document["report"]["runs"]] == ["identity", "adapter"]
    assert "the adapter is kept" in shown.err
    assert "the adapter is kept" in page.read_text()
    manifest = json.loads((tmp_path / "out" / "ft.json").read_text())
    assert manifest["settings"]["adapter_model"] == "low_rank"
    assert (manifest["settings"]["batch_size"], manifest["settings"]["seed"]) == (16, 3)
    assert manifest["settings"]["epochs"] == 20

    assert evaluate(folder, tmp_path / "out", "--json") == 0
    compared = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in compared["runs"]] == ["identity", str(tmp_path / "out")]
    assert means(compared) == pytest.approx(means(document["report"]))
    assert means(compared)[1] > means(compared)[0]


def means(report: dict) -> list[float]:  # type: ignore[type-arg]
    return [run["metrics"]["ndcg@10"]["mean"] for run in report["runs"]]


def test_text_is_for_people_and_folds_judge_without_validation(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(folder, tmp_path / "out") == 0
    shown = capsys.readouterr()
    assert "identity" in shown.out
    assert f"adapter: {tmp_path / 'out'}" in shown.err
    with pytest.raises(ValueError):
        json.loads(shown.out)
    assert evaluate(folder, tmp_path / "out", "--html", tmp_path / "eval.html") == 0
    assert "identity" in capsys.readouterr().out
    assert "identity" in (tmp_path / "eval.html").read_text()


def test_train_and_eval_on_a_persisted_index(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("a document was embedded")

    for name in ("_get_text_embedding", "_get_text_embeddings"):
        monkeypatch.setattr(HuggingFaceEmbedding, name, refuse)
    index = ("--index", folder / "index")
    before = {path.name: path.read_bytes() for path in (folder / "index").iterdir()}
    assert train(folder, tmp_path / "out", *index, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    manifest = json.loads((tmp_path / "out" / "ft.json").read_text())
    assert manifest["settings"]["documents"] == "index"
    assert manifest["metrics"]["kept"] == document["kept"]
    assert load_adapter(tmp_path / "out").identity == (document["kept"] == "identity")

    assert evaluate(folder, tmp_path / "out", *index, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 2
    assert {path.name: path.read_bytes() for path in (folder / "index").iterdir()} == before


def test_a_wrong_index_folder_is_one_line_on_standard_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], related: Dataset
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    for path in (folder / "index").iterdir():
        (tmp_path / "damaged" / path.name).write_text(path.read_text()[:20])
    nodes = [TextNode(id_=key, text=text) for key, text in related.corpus.items()]
    SummaryIndex(nodes).storage_context.persist(tmp_path / "list")
    index_of(related, model_assets.HashingEmbedding(dim=16), tmp_path / "narrow")
    for name, message in (
        ("nowhere", "is no folder that one index was persisted to"),
        ("empty", "is no folder that one index was persisted to"),
        ("damaged", "is no folder that one index was persisted to"),
        ("list", "holds a SummaryIndex, no vector index"),
        ("narrow", "gives queries of dimension 32, and the documents have 16"),
    ):
        for command in (train, evaluate_saved(folder, tmp_path)):
            code = command(folder, tmp_path / "out", "--index", tmp_path / name)
            shown = capsys.readouterr()
            assert code == 1, name
            assert shown.out == ""
            (line,) = [line for line in shown.err.splitlines() if line.startswith("Error: ")]
            assert message in line
            assert "Traceback" not in shown.err
            if name != "narrow":
                assert str(tmp_path / name) in line
    assert not (tmp_path / "out").exists()


def evaluate_saved(folder: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Return `evaluate` on an adapter that fits the model, whatever folder it is told."""
    from ft_adapter.adapters import LinearLayer
    from ft_adapter.saved import save_adapter

    save_adapter(tmp_path / "saved", LinearLayer(32, 32))
    return lambda folder, _, *more: evaluate(folder, tmp_path / "saved", *more)


def test_bad_input_is_one_line_on_standard_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("--embed-model", folder / "model")
    output = ("--output", tmp_path / "out")
    for arguments, message in (
        (("train", tmp_path / "no.json", *model, *output), f"{tmp_path / 'no.json'}: no such file"),
        (("train", folder / "train.json", *model, *output, "--adapter", "x"), "adapter_model: is"),
        (("train", folder / "train.json", *model, *output, "--loss", "mse"), "loss: is one of"),
        (("eval", folder / "val.json", *model, "--adapter", tmp_path / "no"), str(tmp_path / "no")),
    ):
        assert ft("adapter", *arguments) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert f"Error: {message}" in shown.err
        assert "Traceback" not in shown.err
    assert not (tmp_path / "out").exists()


def test_an_error_is_a_document_with_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = ft(
        "adapter", "eval", folder / "val.json", "--embed-model", folder / "model",
        "--adapter", tmp_path / "no", "--json",
    )  # fmt: skip
    assert code == 1
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "ArtifactError"


def test_the_commands_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("adapter", "--help") == 0
    shown = capsys.readouterr().out
    assert "train" in shown
    assert "eval" in shown
