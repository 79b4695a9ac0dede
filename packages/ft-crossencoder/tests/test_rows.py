"""`training_rows`: what each loss is given of a dataset."""

from itertools import pairwise

import pytest

from ft_core.datasets import RerankDataset
from ft_core.errors import DatasetError
from ft_crossencoder.rows import LOSSES, default_loss, training_rows


def dataset(*examples, field="label"):
    """One query each; a mapping from text to number."""
    return RerankDataset.coerce(
        [
            {
                "query": f"q{number}",
                "documents": [{"text": text, field: value} for text, value in numbers.items()],
            }
            for number, numbers in enumerate(examples)
        ]
    )


def rows(data, loss, negatives=2, seed=0):
    return training_rows(data, loss, negatives=negatives, seed=seed)


ONE_AND_FIVE = {"good": 1.0, "b": 0.0, "c": 0.0, "d": 0.0, "e": 0.0, "f": 0.0}


def test_a_list_is_a_relevant_document_and_as_many_others_as_wanted():
    (row,) = rows(dataset(ONE_AND_FIVE), "listnet", negatives=3)
    assert list(row) == ["query", "documents", "label"]
    assert row["query"] == "q0"
    assert row["documents"][0] == "good"
    assert len(set(row["documents"])) == 4
    assert row["label"] == [10.0, 0.0, 0.0, 0.0]
    (plain,) = rows(dataset(ONE_AND_FIVE), "lambda", negatives=3)
    assert plain["documents"] == row["documents"]
    assert plain["label"] == [1.0, 0.0, 0.0, 0.0]


def test_every_relevant_document_has_its_own_others():
    found = rows(dataset({"good": 1.0, "fine": 1.0, "b": 0.0, "c": 0.0, "d": 0.0}), "listnet")
    assert [row["documents"][0] for row in found] == ["good", "fine"]
    assert all(not {"good", "fine"} <= set(row["documents"]) for row in found)


def test_a_lower_grade_stands_below_a_higher_one():
    found = rows(dataset({"good": 2, "best": 3, "bad": 0}), "lambda")
    assert [(row["documents"], row["label"]) for row in found] == [
        (["best", "good", "bad"], [1.0, pytest.approx(2 / 3), 0.0]),
        (["good", "bad"], [pytest.approx(2 / 3), 0.0]),
    ]


def test_pairs_have_labels_from_0_to_1():
    found = rows(dataset({"good": 4, "bad": 0}), "binary_cross_entropy")
    assert found == [
        {"query": "q0", "document": "good", "label": 1.0},
        {"query": "q0", "document": "bad", "label": 0.0},
    ]


def test_queries_without_a_relevant_document_teach_pairs_and_no_lists():
    data = dataset({"good": 1, "bad": 0}, {"x": 0, "y": 0, "z": 0})
    assert {row["query"] for row in rows(data, "listnet")} == {"q0"}
    assert {row["query"] for row in rows(data, "multiple_negatives_ranking")} == {"q0"}
    pairs = rows(data, "binary_cross_entropy")
    assert [row["label"] for row in pairs if row["query"] == "q1"] == [0.0, 0.0, 0.0]


def test_tuples_of_one_table_have_as_many_columns_each():
    found = rows(dataset({"best": 3, "good": 2, "bad": 0}), "multiple_negatives_ranking")
    assert [list(row.items()) for row in found] == [
        [("query", "q0"), ("positive", "best"), ("negative_1", "good"), ("negative_2", "bad")],
        [("query", "q0"), ("positive", "good"), ("negative_1", "bad"), ("negative_2", "bad")],
    ]


def test_documents_of_other_queries_stand_in_where_too_few_are_known_to_be_wrong():
    data = dataset({"good": 1, "bad": 0}, *[{f"x{n}": 1, f"y{n}": 0} for n in range(9)])
    first = rows(data, "lambda", negatives=4)[0]
    assert first["documents"][:2] == ["good", "bad"]
    assert len(set(first["documents"])) == 5
    assert first["label"] == [1.0, 0.0, 0.0, 0.0, 0.0]
    unjudged = {"query": "q0", "documents": [{"text": "good", "label": 1}, {"text": "maybe"}]}
    data = RerankDataset.coerce([unjudged, data.examples[1]])
    assert set(rows(data, "lambda", negatives=4)[0]["documents"]) == {"good", "x0", "y0"}


def test_margins_keep_each_documents_own_score_best_first():
    scores = {"a": 0.0, "b": 4.0, "c": 2.0, "d": -6.0}
    (row, other) = rows(dataset(scores, {"x": 1, "y": 3}, field="teacher_score"), "margin_mse", 3)
    assert [row["positive"], *(row[f"negative_{n}"] for n in (1, 2, 3))] == ["b", "c", "a", "d"]
    differences = [high - low for high, low in pairwise(row["label"])]
    assert [each / differences[0] for each in differences] == pytest.approx([1, 1, 3])
    assert [other["positive"], *(other[f"negative_{n}"] for n in (1, 2, 3))] == ["y", *["x"] * 3]
    assert len(set(other["label"][1:])) == 1


def test_a_teachers_scores_are_standardised_and_all_are_learned():
    scores = {chr(ord("a") + n): 100.0 + 50 * n for n in range(7)}
    found = rows(dataset(scores, field="teacher_score"), "mse", negatives=2)
    labels = [row["label"] for row in sorted(found, key=lambda row: row["document"])]
    assert len(labels) == 7
    assert sum(labels) == pytest.approx(0)
    assert sum(label**2 for label in labels) / 7 == pytest.approx(1)
    assert labels == sorted(labels)


def test_documents_without_the_number_are_left_out():
    data = RerankDataset.coerce(
        [
            {
                "query": "q",
                "documents": [
                    {"text": "good", "label": 1},
                    {"text": "unjudged", "teacher_score": 3},
                    {"text": "bad", "label": 0},
                ],
            }
        ]
    )
    for loss in ("listnet", "binary_cross_entropy", "multiple_negatives_ranking"):
        assert "unjudged" not in str(rows(data, loss))


def test_a_seed_takes_its_negatives_and_another_query_changes_nothing():
    several = [dict(ONE_AND_FIVE) for _ in range(12)]
    first = rows(dataset(*several), "listnet", seed=1)
    assert first == rows(dataset(*several), "listnet", seed=1)
    assert first != rows(dataset(*several), "listnet", seed=2)
    assert first[:11] == rows(dataset(*several[:11]), "listnet", seed=1)
    assert len({tuple(row["documents"]) for row in first}) > 1


@pytest.mark.parametrize("loss", LOSSES)
def test_a_dataset_without_the_number_says_what_to_do(loss):
    data = dataset({"a": 1, "b": 0}, field="retrieval_score")
    with pytest.raises(DatasetError, match=r"no document has a (label|teacher score); \w+"):
        rows(data, loss)


def test_one_class_is_refused():
    with pytest.raises(DatasetError, match="every label is 1: a model learns from relevant and"):
        rows(dataset({"a": 1, "b": 1}), "listnet")
    with pytest.raises(DatasetError, match="no query has two documents of different label"):
        rows(dataset({"a": 1}, {"b": 0}), "listnet")
    assert len(rows(dataset({"a": 1}, {"b": 0}), "binary_cross_entropy")) == 2


@pytest.mark.parametrize("loss", ["listnet", "lambda", "multiple_negatives_ranking"])
def test_nothing_relevant_is_an_error_and_no_empty_training(loss):
    with pytest.raises(DatasetError, match=r"no query has a document with a label of 0\.5 or more"):
        rows(dataset({"a": 0.4, "b": 0.1}), loss)


@pytest.mark.parametrize("count", range(2, 12))
def test_of_a_teachers_scores_every_one_is_in_a_group_that_spans_good_and_bad(count):
    scores = {f"d{n}": float(n) for n in range(count)}
    found = rows(dataset(scores, field="teacher_score"), "margin_mse", negatives=3)
    texts = {row[name] for row in found for name in row if name[:4] in ("posi", "nega")}
    assert texts == scores.keys()
    best = {f"d{count - place}" for place in range(1, len(found) + 1)}
    assert {row["positive"] for row in found} == best
    assert all(row["label"][0] == max(row["label"]) for row in found)


def test_the_default_loss_is_for_what_there_is_more_of():
    assert default_loss(dataset({"a": 1, "b": 0})) == "listnet"
    assert default_loss(dataset({"a": 1, "b": 0}, field="teacher_score")) == "margin_mse"
    few = {"query": "q", "documents": [{"text": "a", "label": 1, "teacher_score": 2}]}
    many = {"query": "p", "documents": [{"text": t, "label": 0} for t in "bcd"]}
    assert default_loss(RerankDataset.coerce([few, many])) == "listnet"
    with pytest.raises(DatasetError, match="no document has a label or a teacher's score"):
        default_loss(dataset({"a": 1}, field="retrieval_score"))


def test_another_passage_of_a_querys_own_document_is_no_negative_of_it():
    own = {"query": "late fee", "documents": [{"id": "a", "text": "the fee", "label": 1}]}
    other = {
        "query": "opening hours",
        "documents": [
            {"id": "a", "text": "the same page, further down", "label": 0},
            {"id": "b", "text": "the hours", "label": 1},
        ],
    }
    rows = training_rows(RerankDataset.coerce([own, other]), "listnet", negatives=2, seed=0)
    (row,) = [row for row in rows if row["query"] == "late fee"]
    assert row["documents"] == ["the fee", "the hours"]
