"""Existing verdicts: explicit columns, and one clear error or a counted choice for the rest."""

import json
from pathlib import Path

import pytest

from ft_core.errors import ArgumentError, DatasetError
from ft_judge import JudgeDataset, read_llmbar, read_verdicts

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "judge"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/judge")

COLUMNS = {
    "query": "question",
    "answer": "answers.0.text",
    "second_answer": "answers.1.text",
    "verdict": "winner",
}
VALUES = {"A": 1, "B": 0, "tie": 0.5, "error": None}


def row(question="Which rope floats?", first="Hemp.", second="Polypropylene.", winner="B", **more):
    answers = [{"text": first}, {"text": second}]
    return {"question": question, "answers": answers, "winner": winner, **more}


def write(tmp_path, rows, name="v.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_columns_and_values(tmp_path, caplog):
    path = write(
        tmp_path,
        [
            row(swapped="A", by="ann"),
            row("q2", winner="tie", swapped="tie", by="bob"),
            row("q3", winner=None, swapped="error", by="bob"),
        ],
    )
    columns = COLUMNS | {"flipped_verdict": "swapped"}
    dataset = read_verdicts(path, columns, values=VALUES, flipped_as_shown=True, keep=["by"])
    assert [e.verdict for e in dataset] == [0.0, 0.5, None]
    assert [e.flipped_verdict for e in dataset] == [0.0, 0.5, None]  # A, shown first, is B here
    assert [e.metadata["by"] for e in dataset] == ["ann", "bob", "bob"]
    assert "1 of 3 rows without verdict" in caplog.text
    assert "1 of 3 rows tied by verdict" in caplog.text
    array = tmp_path / "v.json"
    array.write_text(json.dumps([json.loads(line) for line in path.read_text().splitlines()]))
    same = read_verdicts(array, columns, values=VALUES, flipped_as_shown=True, keep=["by"])
    assert same == dataset
    plain = read_verdicts(path, columns, values=VALUES)
    assert [e.flipped_verdict for e in plain] == [1.0, 0.5, None]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"question": "q", "winner": "A"}, r"column 'answers.0.text': is missing: .* 'answers'"),
        (row(winner="C"), "column 'winner': 'C' is none of A, B, tie, error; add it to `values`"),
        (row(question=""), "query: is missing; pairwise needs it"),
        (row(first=3), "answer: Input should be a valid string"),
        ({"question": "q", "answers": [{"text": "a"}], "winner": "A"}, r"no '1' in list"),
        ([1], "is not an object"),
    ],
)
def test_bad_rows_name_line_and_column(tmp_path, bad, reason):
    path = write(tmp_path, [row(), bad])
    with pytest.raises(DatasetError, match=reason) as caught:
        read_verdicts(path, COLUMNS, values=VALUES)
    assert str(caught.value).startswith(f"{path}: line 2")


def test_scores(tmp_path):
    rows = [
        {"q": "q", "a": "a", "s": 4},
        {"q": "q", "a": "b", "s": "5"},
        {"q": "q", "a": "c", "s": 6},
    ]
    columns = {"query": "q", "answer": "a", "score": "s"}
    with pytest.raises(DatasetError, match=r"line 2, column 's': '5' is no number; say what"):
        read_verdicts(write(tmp_path, rows), columns, task="correctness")
    with pytest.raises(DatasetError, match=r"line 2, column 's': 6 is outside 1 to 5"):
        read_verdicts(write(tmp_path, [rows[0], rows[2]]), columns, task="correctness")
    dataset = read_verdicts(
        write(tmp_path, rows), columns, task="correctness", values={"4": 4, 5: 5, 6.0: None}
    )
    assert [e.score for e in dataset] == [4.0, 5.0, None]
    passes = write(tmp_path, [{"a": "x", "c": "one context", "s": True}])
    columns = {"answer": "a", "contexts": "c", "score": "s"}
    (example,) = read_verdicts(passes, columns, task="faithfulness")
    assert (example.contexts, example.score) == (["one context"], 1.0)


def test_repeats_and_contradictions_are_counted(tmp_path, caplog):
    path = write(tmp_path, [row(), row(), row("q2", winner="A"), row("q2", winner="B")])
    dataset = read_verdicts(path, COLUMNS, values=VALUES)
    assert "1 of 4 rows that judge the same answers as another" in caplog.text
    assert "2 of 4 rows that contradict each other" in caplog.text
    assert (len(dataset), len(dataset.merged())) == (4, 1)


def test_a_dataset_is_read_as_it_is_and_arguments_are_checked(tmp_path):
    dataset = read_verdicts(write(tmp_path, [row()]), COLUMNS, values=VALUES)
    dataset.save(tmp_path / "own.jsonl")
    assert read_verdicts(tmp_path / "own.jsonl") == dataset == JudgeDataset.coerce(dataset)
    with pytest.raises(ArgumentError, match="columns: are missing"):
        read_verdicts(tmp_path / "own.jsonl", values=VALUES)
    with pytest.raises(ArgumentError, match="columns: 'question' is no field"):
        read_verdicts(tmp_path / "own.jsonl", {"question": "q"})
    with pytest.raises(ArgumentError, match="columns: name the column of the answer"):
        read_verdicts(tmp_path / "own.jsonl", {"query": "q"})
    with pytest.raises(ArgumentError, match="columns: 'answer' stands in a column, a text, not 3"):
        read_verdicts(tmp_path / "own.jsonl", {"answer": 3})
    with pytest.raises(ArgumentError, match=r"columns: is a mapping, .* not \['answer'\]"):
        read_verdicts(tmp_path / "own.jsonl", ["answer"])
    with pytest.raises(ArgumentError, match=r"values: is a mapping, .* not \['A', 'B'\]"):
        read_verdicts(tmp_path / "own.jsonl", COLUMNS, values=["A", "B"])
    with pytest.raises(DatasetError, match="there is no '²' in list"):
        read_verdicts(write(tmp_path, [row()]), {"answer": "answers.²"})
    with pytest.raises(ArgumentError, match="task: 'style' is none of pairwise"):
        read_verdicts(tmp_path / "own.jsonl", COLUMNS, task="style")
    with pytest.raises(DatasetError, match=r"none\.jsonl: no such file"):
        read_llmbar(tmp_path / "none.jsonl")


@needs_data
def test_llmbar_with_gpt4_in_both_orders(caplog):
    dataset = read_llmbar(DATA / "llmbar_gpt4.jsonl")
    stats = dataset.stats()
    assert len(dataset) == stats["human labels"] == stats["pairs judged in both orders"] == 734
    assert stats["pairs judged alike in both"] == 687
    assert stats["repeats of the same answers"] == 2
    kept, dropped = dataset.consistency()
    assert dropped["the two orders disagree"] == 47
    assert len(kept) + sum(dropped.values()) == 734
    assert len(kept.both_orders()) == 2 * len(kept)
    assert dataset.examples[0].metadata["subset"] == "CaseStudy/Base_10"
    assert all(example.reasoning and example.flipped_reasoning for example in dataset)


@needs_data
@pytest.mark.parametrize(
    ("name", "pairs"), [("faireval", 66), ("llmeval2", 200), ("mt-bench", 200)]
)
def test_pairs_with_human_labels(name, pairs, caplog):
    dataset = read_llmbar(DATA / f"{name}_human.json")
    assert len(dataset) == dataset.stats()["human labels"] == pairs
    assert ("6 of 200 rows without verdict" in caplog.text) == (name == "llmeval2")
    assert all(example.flipped_verdict is None for example in dataset)
