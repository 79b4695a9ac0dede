"""Rerank data: what is refused and where, joining with a retriever, conversions, evaluation."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, TextNode

from ft_core import cli
from ft_core.datasets import (
    EmbeddingQAFinetuneDataset,
    RerankDataset,
    RerankDocument,
    RerankExample,
)
from ft_core.datasets.rerank import merge_repeats
from ft_core.errors import ArgumentError, DatasetError
from ft_core.evaluation import compare, evaluate_reranker, evaluate_retriever
from ft_core.files import Journal
from ft_core.mining import mine_hard_negatives, retrieve_candidates
from ft_core.report import Report

Row = dict[str, Any]


def row(query: str = "who?", *documents: Any, **fields: Any) -> Row:
    """Return one line; a document is a dict, or a text with its label."""
    given = documents or (("she", 1), ("they", 0))
    texts = [d if isinstance(d, dict) else {"text": d[0], "label": d[1]} for d in given]
    return {"query": query, "documents": texts, **fields}


def write(path: Path, *lines: Row | str) -> Path:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def of(*rows: Row) -> RerankDataset:
    return RerankDataset.coerce(rows)


class InOrder(BaseRetriever):
    """Finds the same nodes, in the same order, for every query."""

    def __init__(self, *found: tuple[str, float | None]) -> None:
        super().__init__()
        self.found = found

    def _retrieve(self, query_bundle: Any) -> list[NodeWithScore]:
        return [NodeWithScore(node=TextNode(id_=k, text=k), score=s) for k, s in self.found]


@pytest.fixture
def qa() -> EmbeddingQAFinetuneDataset:
    return EmbeddingQAFinetuneDataset(
        queries={"q1": "When is the lock open?", "q2": "What does a barge pay?"},
        corpus={
            "open": "The lock is open from six to ten.",
            "fee": "A barge pays twelve euros.",
            "copy": "A barge pays twelve euros!",
            "river": "The river is deep, and the lock is old.",
        },
        relevant_docs={"q1": ["open"], "q2": ["fee", "open"]},
        grades={"q2": {"fee": 3}},
    )


FOUND = {"q1": [("river", 0.9), ("open", 0.5)], "q2": [("copy", 0.8), ("fee", 0.7)]}


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("line", "place", "reason"),
        [
            (row(""), "query", "the text is empty"),
            (row(" \n\u3000"), "query", "the text is empty"),
            (row("\x00\x1f"), "query", "the text is empty"),
            (row("?", ("", 1)), "documents[0].text", "the text is empty"),
            (row("?", ("a", 1), ("\u200b\ufeff", 0)), "documents[1].text", "the text is empty"),
            ({"query": "?", "documents": []}, "documents", "has no document; name one or drop"),
            ({"query": "?"}, "documents", "Field required"),
            (row("?", ("a", -1)), "documents[0].label", "from 0 (not relevant) to 1"),
            (row("?", ("a", 1.5)), "documents[0].label", "whole grade up to 100"),
            (row("?", ("a", 101)), "documents[0].label", "whole grade up to 100"),
            (row("?", ("a", math.nan)), "documents[0].label", "is nan, not a finite number"),
            (row("?", ("a", math.inf)), "documents[0].label", "is inf, not a finite number"),
            (row("?", ("a", "1")), "documents[0].label", "is '1', not a finite number; write a"),
            (row("?", ("a", "yes")), "documents[0].label", "is 'yes', not a finite number"),
            (row("?", ("a", 10**400)), "documents[0].label", "not a finite number"),
            (
                row("?", {"text": "a", "teacher_score": math.nan}),
                "documents[0].teacher_score",
                "is nan",
            ),
            (
                row("?", {"text": "a"}, {"text": "b", "retrieval_score": -math.inf}),
                "documents[1].retrieval_score",
                "is -inf",
            ),
            (row("?", ("a", 1), ("b", 0), (" a\n", 0)), "documents[2]", "repeats the text of doc"),
            (
                row("?", {"id": "x", "text": "a"}, {"id": "x", "text": "b"}),
                "documents[1]",
                "repeats the id of documents[0]",
            ),
            (row("a\ud800"), "query", "half of a surrogate pair"),
            (row("?", ("a\udfff", 1)), "documents[0].text", "half of a surrogate pair"),
            (row(metadata={"a": ["\ud800"]}), "metadata.a[0]", "half of a surrogate pair"),
            (row("?", {"text": "a", "score": 1}), "documents[0].score", "Extra inputs"),
            ({"query": "?", "documents": "text"}, "documents", "valid list"),
        ],
    )
    def test_the_line_and_the_place_are_named(
        self, tmp_path: Path, line: Row, place: str, reason: str
    ) -> None:
        path = write(tmp_path / "bad.jsonl", row("fine?"), "", line)
        with pytest.raises(DatasetError) as raised:
            RerankDataset.load(path)
        assert str(raised.value).startswith(f"{path}: line 3, {place}: ")
        assert reason in str(raised.value)
        with pytest.raises(DatasetError, match="examples"):
            of(line)

    def test_a_document_alone_is_checked_too(self) -> None:
        with pytest.raises(DatasetError, match="label: is -1"):
            RerankDocument(text="a", label=-1)

    def test_one_broken_line_in_ten_thousand(self, tmp_path: Path) -> None:
        lines: list[Row | str] = [row(f"question {number}?") for number in range(10_000)]
        lines[7_776] = json.dumps(lines[7_776]).replace('"documents":', '"documents"')
        with pytest.raises(DatasetError, match="line 7777, column"):
            RerankDataset.load(write(tmp_path / "one.jsonl", *lines))
        lines[7_776] = row("?", ("a", 7.5))
        with pytest.raises(DatasetError, match=r"line 7777, documents\[0\].label: is 7.5"):
            RerankDataset.load(write(tmp_path / "one.jsonl", *lines))

    def test_nothing_in_it(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"is empty|has no example"):
            RerankDataset.load(write(tmp_path / "none.jsonl", ""))

    def test_two_scales_of_labels(self) -> None:
        with pytest.raises(DatasetError) as raised:
            of(row("a?", ("x", 0.5), ("y", 1)), row("b?", ("x", 3)))
        assert "examples[0].documents[0].label is 0.5" in str(raised.value)
        assert "examples[1].documents[0].label is 3" in str(raised.value)
        assert len(of(row("a?", ("x", 0), ("y", 1)), row("b?", ("x", 3)))) == 2


class TestFiles:
    def test_what_is_saved_comes_back(self, tmp_path: Path) -> None:
        data = of(
            row(
                "ctrl \x00\x07 \u2028 \x85 \U0001f600 e\u0301?",
                {"id": "n1", "text": "a\r\nb\x0c", "label": 0, "retrieval_score": -3.5},
                {"text": "מים", "teacher_score": 0.0, "retrieved": False},
                id="q",
                metadata={"time": 1},
            ),
            row("plain?"),
        )
        data.save(tmp_path / "data.jsonl")
        again = RerankDataset.load(tmp_path / "data.jsonl")
        assert again == data
        assert again.content_hash == data.content_hash
        # A label of 0 is not the absence of one, and what is not set takes no room.
        first = json.loads((tmp_path / "data.jsonl").read_text("utf-8").split("\n")[0])
        assert first["documents"][0]["label"] == 0
        assert set(first["documents"][1]) == {"text", "teacher_score", "retrieved"}

    def test_numbers_of_other_libraries(self) -> None:
        document = RerankDocument(
            text="a", label=True, retrieval_score=np.float32(0.5), teacher_score=np.int64(2)
        )
        assert document.model_dump(mode="json") == {
            **{"id": None, "text": "a", "retrieved": True},
            **{"label": 1.0, "retrieval_score": 0.5, "teacher_score": 2.0},
        }

    def test_the_order_of_candidates_is_content(self) -> None:
        assert (
            of(row("?", ("a", 1), ("b", 0))).content_hash
            != of(row("?", ("b", 0), ("a", 1))).content_hash
        )

    def test_a_journal_with_a_torn_line(self, tmp_path: Path, caplog: Any) -> None:
        path = tmp_path / "journal.jsonl"
        journal = Journal(path)
        journal.append(row("first?", metadata={"time": 1}))
        path.write_bytes(path.read_bytes() + b'{"query": "torn \xc3')
        journal.append(row("second?", metadata={"time": 2}))
        with caplog.at_level(logging.WARNING):
            data = RerankDataset.load(path)
        assert [example.query for example in data] == ["first?", "second?"]
        assert "line 2 was cut short" in caplog.text
        # Of a file that is no journal, nothing is passed over.
        with pytest.raises(DatasetError, match="line 1"):
            RerankDataset.load(write(tmp_path / "plain.jsonl", '{"query": "to', row()))

    def test_split_by_query_without_a_leak(self) -> None:
        asked = ["What does a barge pay?", "what does a barge pay", "How tall is a giraffe?"]
        data = of(*(row(query) for query in asked), row("Who wrote Faust?"))
        for seed in range(5):
            parts = data.split({"train": 0.5, "test": 0.5}, seed=seed)
            found = [{example.query for example in part} for part in parts.values()]
            assert not found[0] & found[1]
            assert sum(map(len, parts.values())) == 4
            assert any(set(asked[:2]) <= queries for queries in found)

    def test_deduplicated(self) -> None:
        data = of(
            row("?", id="1", metadata={"time": 1}),
            row("?", id="2", metadata={"time": 2}),
            row("?", ("she", 0), ("they", 0)),
        )
        assert [example.id for example in data.deduplicated()] == ["1", None]

    def test_stats(self) -> None:
        data = of(
            row("one two?", ("a", 2), ("b", 0), {"text": "c c c", "teacher_score": 1}),
            row("One two", {"text": "a", "retrieval_score": 1}),
            row("three", {"text": "d", "label": 1, "retrieved": False}),
        )
        stats = data.stats()
        expected = {
            "queries": 3,
            "distinct queries": 2,
            "queries without a relevant document": 1,
            "pairs": 5,
            "relevant": 2,
            "not relevant": 1,
            "unjudged": 2,
            "missed by the retriever": 1,
            "with a retrieval score": 1,
            "with a teacher score": 1,
            "distinct document texts": 4,
        }
        assert {key: stats[key] for key in expected} == expected


class TestMergeRepeats:
    def test_the_first_place_and_the_highest_label(self) -> None:
        merged = merge_repeats(
            [
                RerankDocument(id="a", text="x", label=0, retrieval_score=0.9),
                RerankDocument(id="b", text="y"),
                RerankDocument(id="c", text=" x", label=1, retrieval_score=0.1, teacher_score=4),
                RerankDocument(id="b", text="z", label=0, retrieved=False),
            ]
        )
        assert [d.model_dump(exclude_defaults=True) for d in merged] == [
            {"id": "a", "text": "x", "label": 1, "retrieval_score": 0.9, "teacher_score": 4},
            {"id": "b", "text": "y", "label": 0},
        ]

    @given(
        st.lists(
            st.tuples(st.sampled_from(["a", "b", "c", None]), st.sampled_from("xyz")), min_size=1
        )
    )
    def test_an_example_can_hold_the_rest(self, documents: list[tuple[str | None, str]]) -> None:
        merged = merge_repeats(RerankDocument(id=key, text=text) for key, text in documents)
        assert RerankExample(query="?", documents=merged).documents[0].text == documents[0][1]


class TestFromEmbeddingQA:
    def test_what_was_missed_stands_behind(self, qa: EmbeddingQAFinetuneDataset) -> None:
        data = RerankDataset.from_embedding_qa(qa, FOUND)
        assert [example.id for example in data] == ["q1", "q2"]
        assert [
            (d.id, d.label, d.retrieval_score, d.retrieved) for d in data.examples[1].documents
        ] == [
            ("copy", None, 0.8, True),
            ("fee", 3, 0.7, True),
            ("open", 1, None, False),
        ]
        assert [d.id for d in data.examples[1].candidates] == ["copy", "fee"]

    def test_negatives_by_an_explicit_argument(self, qa: EmbeddingQAFinetuneDataset) -> None:
        def labels(negatives: Any) -> list[dict[str | None, float | None]]:
            data = RerankDataset.from_embedding_qa(qa, FOUND, negatives=negatives)
            return [{d.id: d.label for d in example.documents} for example in data]

        assert labels(None)[0] == {"river": None, "open": 1}
        assert labels("all") == [{"river": 0, "open": 1}, {"copy": 0, "fee": 3, "open": 1}]
        # Mined ones need not be candidates.
        assert labels({"q1": ["fee"]}) == [
            {"river": None, "open": 1, "fee": 0},
            {"copy": None, "fee": 3, "open": 1},
        ]

    def test_a_copy_of_a_relevant_text_is_one_document(self) -> None:
        qa = EmbeddingQAFinetuneDataset(
            queries={"q": "?"}, corpus={"a": "same", "b": "same"}, relevant_docs={"q": ["b"]}
        )
        found = {"q": [("a", 0.9), ("b", 0.8)]}
        documents = RerankDataset.from_embedding_qa(qa, found, negatives="all").examples[0]
        assert [(d.id, d.label) for d in documents.documents] == [("a", 1)]

    @pytest.mark.parametrize(
        ("candidates", "negatives", "message"),
        [
            ({"q1": []}, None, r"candidates: has no entry for queries\['q2'\]; retrieve for"),
            ({**FOUND, "q9": []}, None, "candidates: there is no query 'q9'"),
            ({**FOUND, "q1": [("no", 1.0)]}, None, "candidates: 'no' of .*q1.* is no document"),
            ({**FOUND, "q1": [("fee", math.nan)]}, None, "the score of 'fee' for .*q1.* is nan"),
            ([("q1", [])], None, "candidates: maps each query id"),
            (FOUND, {"q9": []}, "negatives: there is no query 'q9'"),
            (FOUND, {"q1": ["no"]}, "negatives: 'no' of .*q1.* is no document"),
            (FOUND, {"q2": ["fee"]}, "negatives: 'fee' is a relevant document of .*q2"),
            (FOUND, "some", 'negatives: is a mapping, "all" or None'),
        ],
    )
    def test_bad_arguments(
        self, qa: EmbeddingQAFinetuneDataset, candidates: Any, negatives: Any, message: str
    ) -> None:
        with pytest.raises(ArgumentError, match=message):
            RerankDataset.from_embedding_qa(qa, candidates, negatives=negatives)

    def test_an_empty_candidate_list(self, qa: EmbeddingQAFinetuneDataset) -> None:
        data = RerankDataset.from_embedding_qa(qa, {**FOUND, "q1": []})
        assert [d.id for d in data.examples[0].documents] == ["open"]
        assert evaluate_reranker(None, data).scores["hit_rate@10"] == {"q1": 0.0, "q2": 1.0}

    def test_there_and_back(self, qa: EmbeddingQAFinetuneDataset) -> None:
        found = {query: [(key, 0.5) for key in qa.corpus] for query in qa.queries}
        again = RerankDataset.from_embedding_qa(qa, found, negatives="all").to_embedding_qa()
        assert again.queries == qa.queries
        assert again.corpus == qa.corpus
        assert again.qrels == qa.qrels


class TestRetrieveCandidates:
    def test_as_the_retriever_gives_them(self, qa: EmbeddingQAFinetuneDataset) -> None:
        retriever = InOrder(("fee", 0.2), ("open", 0.9), ("river", None))
        found = retrieve_candidates(qa, retriever, top_k=2)
        assert dict(found) == {query: [("fee", 0.2), ("open", 0.9)] for query in qa.queries}

    def test_every_source_gives_top_k_with_the_relevant_ones(
        self, qa: EmbeddingQAFinetuneDataset
    ) -> None:
        nodes = [TextNode(id_=key, text=text) for key, text in qa.corpus.items()]
        model = MockEmbedding(embed_dim=4)
        index = VectorStoreIndex(nodes, embed_model=model)
        retriever = index.as_retriever(similarity_top_k=1)
        for source in (model, retriever):
            found = retrieve_candidates(qa, source, top_k=3)
            assert [len(found[query]) for query in qa.queries] == [3, 3]
            assert all(score == pytest.approx(1) for _, score in found["q1"])
        assert retriever.similarity_top_k == 1
        bm25 = retrieve_candidates(qa, "bm25", top_k=3)
        assert bm25["q1"][0][0] == "open"
        assert {key for key, _ in bm25["q2"]} >= {"fee", "copy"}
        scores = [score for _, score in bm25["q2"]]
        assert scores == sorted(scores, reverse=True)

    def test_negatives_are_those_that_mining_would_take(
        self, qa: EmbeddingQAFinetuneDataset
    ) -> None:
        retriever = InOrder(("river", 0.96), ("open", 1.0), ("copy", 0.5), ("fee", 0.9))
        found = retrieve_candidates(qa, retriever, top_k=10)
        safe = found.negatives()
        # Of q1 `river` scores too close to the answer; of q2 `copy` is the answer once more.
        assert safe == {"q1": ["copy", "fee"], "q2": []}
        assert found.negatives(relative_margin=None)["q1"] == ["river", "copy", "fee"]
        assert found.negatives(duplicate_threshold=None)["q2"] == ["copy"]
        mined = mine_hard_negatives(qa, retriever)
        assert all(set(mined[query]) <= set(safe[query]) for query in qa.queries)
        data = RerankDataset.from_embedding_qa(qa, found, negatives=safe)
        assert {d.id: d.label for d in data.examples[0].documents}["river"] is None
        data.check_trainable()

    def test_bad_arguments(self, qa: EmbeddingQAFinetuneDataset) -> None:
        with pytest.raises(ArgumentError, match="top_k: must be at least 1, not 0"):
            retrieve_candidates(qa, "bm25", top_k=0)
        with pytest.raises(ArgumentError, match=r"gave .*open.* the score nan"):
            retrieve_candidates(qa, InOrder(("open", math.nan)))
        with pytest.raises(ArgumentError, match="relative_margin: must be at least 0"):
            retrieve_candidates(qa, "bm25").negatives(relative_margin=-1)
        with pytest.raises(ArgumentError, match="duplicate_threshold: is above 0"):
            retrieve_candidates(qa, "bm25").negatives(duplicate_threshold=2)


class TestTrainable:
    @pytest.mark.parametrize(
        ("rows", "target", "message"),
        [
            ([row("?", {"text": "a"})], "label", "no document has a label; judge documents"),
            ([row("?", ("a", 1), ("b", 1))], "label", "every label is 1: .*pass negatives="),
            ([row("?", ("a", 0)), row("!", ("b", 0))], "label", "every label is 0"),
            ([row("?", ("a", 1)), row("!", ("b", 0))], "label", "no query has two documents"),
            ([row()], "teacher_score", "no document has a teacher score; score .* with a teacher"),
            (
                [row("?", *({"text": t, "teacher_score": 0.5} for t in "ab"))],
                "teacher_score",
                "every teacher score is 0.5: the teacher tells no document from another",
            ),
        ],
    )
    def test_what_cannot_be_learnt(self, rows: list[Row], target: Any, message: str) -> None:
        with pytest.raises(DatasetError, match=message):
            of(*rows).check_trainable(target)

    def test_what_can(self) -> None:
        of(row()).check_trainable()
        of(row("?", ("a", 1)), row("!", ("b", 0))).check_trainable(within_query=False)
        with pytest.raises(ArgumentError, match="target: 'score' is none of label, teacher_score"):
            of(row()).check_trainable("score")  # type: ignore[arg-type]


class TestConversions:
    def test_pairs(self) -> None:
        data = of(
            row("?", ("a", 2), ("b", 0), {"text": "c", "teacher_score": -4.5, "label": 1}),
            row("!", {"text": "d", "teacher_score": 3}),
        )
        assert data.to_pairs() == [("?", "a", 1.0), ("?", "b", 0.0), ("?", "c", 0.5)]
        assert data.to_pairs(max_label=4)[0] == ("?", "a", 0.5)
        assert data.to_pairs("teacher_score") == [("?", "c", -4.5), ("!", "d", 3.0)]
        assert data.to_pairs("retrieval_score") == []
        with pytest.raises(ArgumentError, match="max_label: is 1; the highest label here is 2"):
            data.to_pairs(max_label=1)

    def test_triplets(self) -> None:
        data = of(
            row(
                "?",
                {"text": "none"},
                {"text": "bad", "label": 0, "teacher_score": -1},
                {"text": "good", "label": 2, "teacher_score": 3},
                {"text": "fair", "label": 1, "retrieval_score": 1},
                {"text": "poor", "label": 0, "teacher_score": 4},
            )
        )
        assert {(t.positive, t.negative): t.margin for t in data.to_triplets()} == {
            ("good", "bad"): 4.0,
            ("good", "fair"): None,
            ("good", "poor"): -1.0,  # the teacher disagrees, and its margin says so
            ("fair", "bad"): None,
            ("fair", "poor"): None,
        }
        by_teacher = data.to_triplets("teacher_score")
        assert {(t.positive, t.negative) for t in by_teacher} == {
            ("poor", "good"),
            ("poor", "bad"),
            ("good", "bad"),
        }
        assert all(triplet.margin and triplet.margin > 0 for triplet in by_teacher)

    def test_so_many_triplets_a_query(self) -> None:
        rows = [row(f"{n}?", *((str(i), int(i < 3)) for i in range(8))) for n in range(3)]
        data = of(*rows)
        every = data.to_triplets()
        some = data.to_triplets(max_per_query=4, seed=1)
        assert len(every) == 45
        assert [triplet.query for triplet in some] == ["0?"] * 4 + ["1?"] * 4 + ["2?"] * 4
        assert set(some) < set(every)
        assert some == data.to_triplets(max_per_query=4, seed=1)
        assert some != data.to_triplets(max_per_query=4, seed=2)
        with pytest.raises(ArgumentError, match="max_per_query: must be at least 1"):
            data.to_triplets(max_per_query=0)

    def test_ids_of_what_has_none(self) -> None:
        data = of(
            row("a?", ("x", 1), {"id": "n", "text": "old", "label": 0}, id="q"),
            row("b?", ("x", 1), {"id": "n", "text": "new", "label": 1}, id="q"),
            row("c?", ("x", 0.4), ("y", 0.5)),
            row("d?", ("x", 0)),
        )
        qa = data.to_embedding_qa()
        assert list(qa.queries) == ["q", "q (2)", "3"]
        assert len(qa.corpus) == 4  # x, both texts of n, y
        assert {qa.corpus[key] for key in qa.relevant_docs["q (2)"]} == {"x", "new"}
        assert [qa.corpus[key] for key in qa.relevant_docs["3"]] == ["y"]

    def test_nothing_relevant(self) -> None:
        with pytest.raises(DatasetError, match="no query has a document with a label of"):
            of(row("?", ("a", 0))).to_embedding_qa()


class Best(BaseNodePostprocessor):
    """Puts the longest texts first and cuts."""

    top_n: int = 10

    def _postprocess_nodes(self, nodes: Any, query_bundle: Any = None) -> Any:
        for node in nodes:
            node.score = float(len(node.text))
            node.node.metadata["seen"] = query_bundle.query_str
        return sorted(nodes, key=lambda node: -node.score)[: self.top_n]


class Odd(BaseNodePostprocessor):
    """Returns what it should not."""

    twice: bool = False

    def _postprocess_nodes(self, nodes: Any, query_bundle: Any = None) -> Any:
        if self.twice:
            return [nodes[0], nodes[0]]
        return [NodeWithScore(node=TextNode(id_="new", text="new"))]


def by_length(query: str, texts: list[str]) -> list[float]:
    return [float(len(text)) for text in texts]


class TestEvaluation:
    @pytest.fixture
    def data(self) -> RerankDataset:
        return of(
            row("1?", ("aa", 0), ("bbb", 1), ("c", 0), id="q1"),
            row(
                "2?",
                {"id": "z", "text": "aa", "label": 0},
                {"id": "b", "text": "b", "label": 1},
                {"id": "a", "text": "cc"},
                id="q2",
            ),
            row("3?", ("a", 1), {"text": "zzzz", "label": 1, "retrieved": False}, id="q3"),
        )

    def test_by_hand(self, data: RerankDataset) -> None:
        base = evaluate_reranker(None, data)
        tuned = evaluate_reranker(by_length, data)
        assert base.name == "retrieval"
        assert tuned.name == "by_length"
        assert base.scores["mrr@10"] == {"q1": 1 / 2, "q2": 1 / 2, "q3": 1}
        # Equal scores keep the retriever's order: `aa` before `cc`.
        assert tuned.scores["mrr@10"] == {"q1": 1, "q2": 1 / 3, "q3": 1}
        assert tuned.rankings["q2"] == ["z", "a", "b"]
        # What the retriever missed is neither found nor forgotten.
        assert base.scores["recall@10"]["q3"] == tuned.scores["recall@10"]["q3"] == 1 / 2
        assert base.dataset_hash == data.content_hash
        assert compare(base, tuned, "mrr@10").difference == pytest.approx(1 / 9)

    def test_the_base_is_what_the_retriever_scores(self, qa: EmbeddingQAFinetuneDataset) -> None:
        retriever = InOrder(("river", 0.9), ("fee", 0.8), ("copy", 0.7))
        found = retrieve_candidates(qa, retriever, top_k=3)
        base = evaluate_reranker(None, RerankDataset.from_embedding_qa(qa, found))
        with pytest.warns(UserWarning, match="at most 3 documents"):
            direct = evaluate_retriever(retriever, qa)
        assert base.scores == direct.scores
        assert base.rankings == direct.rankings

    def test_a_postprocessor(self, data: RerankDataset) -> None:
        before = data.content_hash
        assert evaluate_reranker(Best(), data).scores == evaluate_reranker(by_length, data).scores
        assert data.content_hash == before
        with pytest.warns(UserWarning, match="at most 1 of 3 documents .* set its top_n higher"):
            cut = evaluate_reranker(Best(top_n=1), data, name="cut")
        assert [len(ranking) for ranking in cut.rankings.values()] == [1, 1, 1]
        # One that drops everything is no error, and finds nothing.
        dropped = SimilarityPostprocessor(similarity_cutoff=0.5)
        with pytest.warns(UserWarning, match="at most 0"):
            assert evaluate_reranker(dropped, data).mean("hit_rate@10") == 0

    def test_a_report_and_the_command(
        self, data: RerankDataset, tmp_path: Path, capsys: Any
    ) -> None:
        runs = [evaluate_reranker(None, data), evaluate_reranker(by_length, data)]
        report = Report(runs, data, primary="mrr@10")
        assert report.size == 3
        assert [change.query for change in report.gained("by_length")] == ["q1"]
        data.save(tmp_path / "data.jsonl")
        for run in runs:
            run.save(tmp_path / f"{run.name}.json")
        files = [str(tmp_path / f"{run.name}.json") for run in runs]
        arguments = ["report", *files, "--dataset", str(tmp_path / "data.jsonl"), "--json"]
        assert cli.run(arguments) == 0
        assert json.loads(capsys.readouterr().out)["baseline"] == "retrieval"

    def test_queries_without_an_answer_are_left_out(self, data: RerankDataset, caplog: Any) -> None:
        more = of(*(e.content() for e in data), row("4?", {"text": "unjudged"}))
        with caplog.at_level(logging.WARNING):
            evaluation = evaluate_reranker(by_length, more)
        assert "1 of 4 queries have no relevant document" in caplog.text
        assert list(evaluation.rankings) == ["q1", "q2", "q3"]
        assert len(Report([evaluation], more).dataset.queries) == 3
        with pytest.raises(DatasetError, match="no query has a document"):
            evaluate_reranker(None, of(row("?", {"text": "a"})))

    @pytest.mark.parametrize(
        ("reranker", "message"),
        [
            (lambda q, texts: [1.0] * (len(texts) - 1), "returned 2 scores for the 3 texts of"),
            (lambda q, texts: [math.nan] * len(texts), "gave 'text-[0-9a-f]+' the score nan for"),
            (lambda q, texts: 1 / 0, "failed on query 'q1': ZeroDivisionError"),
            (lambda q, texts: [[1.0, 2.0]] * len(texts), "failed on query 'q1': TypeError"),
            (Odd(), "returned 'new' for '1\\?', which it was not given"),
            (Odd(twice=True), "returned .* for '1\\?', twice"),
            ("a model", "reranker: str is none: pass a LlamaIndex postprocessor"),
        ],
    )
    def test_a_bad_reranker(self, data: RerankDataset, reranker: Any, message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            evaluate_reranker(reranker, data)

    def test_metrics_are_checked_before_a_model_runs(self, data: RerankDataset) -> None:
        with pytest.raises(ArgumentError, match="metrics: 'accuracy' is none"):
            evaluate_reranker(lambda q, texts: pytest.fail("ran"), data, metrics=["accuracy"])


class TestCommands:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return write(
            tmp_path / "data.jsonl",
            row("Why is the sky blue?"),
            row("why is the sky blue", ("air", 0)),
            row("Who wrote Faust?"),
            row("Who wrote Faust?"),
        )

    def run(self, capsys: Any, *arguments: object) -> dict[str, Any]:
        assert cli.run(["dataset", *map(str, arguments), "--json"]) == 0
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document

    def test_stats(self, source: Path, capsys: Any) -> None:
        assert self.run(capsys, "stats", source)["pairs"] == 7

    def test_check(self, source: Path, capsys: Any) -> None:
        found = self.run(capsys, "check", source)
        assert found["examples"] == 4
        assert found["repeated examples"] == 1
        assert found["examples without a relevant document"] == ["2"]
        assert found["examples of equal questions"] == [["1", "2"], ["3", "4"]]
        assert cli.run(["dataset", "check", str(source)]) == 0
        assert "every document is right" in capsys.readouterr().out

    def test_check_says_what_cannot_be_learnt(self, tmp_path: Path, capsys: Any) -> None:
        one_class = write(tmp_path / "one.jsonl", row("?", ("a", 1)))
        assert cli.run(["dataset", "check", str(one_class)]) == 0
        assert "Warning: no reranker can learn from this: every label" in capsys.readouterr().err
        scored = [{"text": text, "teacher_score": len(text)} for text in ("a", "bb")]
        taught = write(tmp_path / "taught.jsonl", row("?", *scored))
        assert cli.run(["dataset", "check", str(taught)]) == 0
        assert "Warning" not in capsys.readouterr().err

    def test_check_of_bad_content(self, tmp_path: Path, capsys: Any) -> None:
        bad = write(tmp_path / "bad.jsonl", row(), row("?", ("a", -1)))
        assert cli.run(["dataset", "check", str(bad)]) == 1
        assert f"{bad}: line 2, documents[0].label: is -1" in capsys.readouterr().err

    def test_a_journal_whose_first_line_is_torn(self, tmp_path: Path, capsys: Any) -> None:
        journal = write(tmp_path / "j.jsonl", '{"query": "to', row(metadata={"time": 1}))
        assert self.run(capsys, "stats", journal)["queries"] == 1

    def test_split(self, source: Path, tmp_path: Path, capsys: Any) -> None:
        options = ["--fractions", "a=1,b=1", "--output-dir", str(tmp_path / "parts")]
        parts = self.run(capsys, "split", source, *options)
        assert {name: part["examples"] for name, part in parts.items()} == {"a": 2, "b": 2}
        loaded = RerankDataset.load(tmp_path / "parts" / "a.jsonl")
        assert len({example.query.lower().strip("?") for example in loaded}) == 1
        assert (
            cli.run(["dataset", "split", str(source), *options[:3], str(tmp_path), "--by=document"])
            == 1
        )
        assert "queries with candidates split by query" in capsys.readouterr().err

    def test_convert_to_a_retrieval_dataset(
        self, source: Path, tmp_path: Path, capsys: Any
    ) -> None:
        self.run(capsys, "convert", source, tmp_path / "qa.json")
        assert list(EmbeddingQAFinetuneDataset.load(tmp_path / "qa.json").queries) == [
            *("1", "3", "4")
        ]
        assert cli.run(["dataset", "convert", str(source), str(tmp_path / "x.jsonl")]) == 1
        assert "x.jsonl will not do" in capsys.readouterr().err
