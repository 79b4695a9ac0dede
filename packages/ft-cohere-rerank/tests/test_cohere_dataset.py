from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from ft_cohere_rerank import dataset
from ft_cohere_rerank.dataset import (
    CohereRerankerFile,
    CohereRerankerFinetuneDataset,
    estimate_tokens,
    generate_cohere_reranker_finetuning_dataset,
)
from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.datasets.rerank import RerankDataset
from ft_core.errors import ArgumentError, DatasetError

FRUIT = ["apple", "banana", "cherry", "damson", "elderberry", "fig"]


class Letters(BaseEmbedding):
    """A vector of how often each letter occurs."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return [float(text.lower().count(chr(97 + letter))) for letter in range(26)]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


class Fixed(BaseRetriever):
    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        ids = ["d5", "d0", "d1"]
        return [NodeWithScore(node=TextNode(id_=key, text=key)) for key in ids]


def qa(**given: Any) -> EmbeddingQAFinetuneDataset:
    content: dict[str, Any] = {
        "queries": {f"q{n}": f"what is a {name}?" for n, name in enumerate(FRUIT)},
        "corpus": {f"d{n}": f"The {name} is a fruit." for n, name in enumerate(FRUIT)},
        "relevant_docs": {f"q{n}": [f"d{n}"] for n in range(len(FRUIT))},
    }
    return EmbeddingQAFinetuneDataset(**content | given)


def entry(number: int = 0, **given: Any) -> CohereRerankerFinetuneDataset:
    content: dict[str, Any] = {"query": f"q{number}", "relevant_passages": ["yes"]}
    return CohereRerankerFinetuneDataset(**content | given)


def many(count: int) -> CohereRerankerFile:
    return CohereRerankerFile(examples=[entry(number) for number in range(count)])


class TestEntry:
    def test_all_three_fields_are_written(self) -> None:
        line = entry(query="wie süß?").to_jsonl()
        assert line == '{"query": "wie süß?", "relevant_passages": ["yes"], "hard_negatives": []}\n'

    def test_repeated_negatives_are_kept_once(self) -> None:
        assert entry(hard_negatives=["b", "a", "b"]).hard_negatives == ["b", "a"]

    @pytest.mark.parametrize(
        ("given", "place"),
        [
            ({"query": " \n"}, "query: is empty"),
            ({"relevant_passages": []}, "relevant_passages: is empty"),
            ({"relevant_passages": ["a", ""]}, r"relevant_passages\[1\]: is empty"),
            ({"hard_negatives": ["", "a"]}, r"hard_negatives\[0\]: is empty"),
            ({"hard_negatives": ["no", "yes"]}, r"hard_negatives\[1\]: is one of the relevant"),
            ({"query": "\ud800"}, "query"),
        ],
    )
    def test_bad_entries_name_the_place(self, given: dict[str, Any], place: str) -> None:
        with pytest.raises(DatasetError, match=place):
            entry(**given)


class TestFile:
    def test_one_broken_line_in_ten_thousand(self, tmp_path: Path) -> None:
        path = tmp_path / "train.jsonl"
        lines = [entry(number).to_jsonl() for number in range(10_000)]
        path.write_text("".join(lines))
        assert len(CohereRerankerFile.load(path)) == 10_000
        for broken in (
            '{"query": "a", ',
            '{"query": "a"}',
            '{"query": "a", "relevant_passages": 3}',
        ):
            path.write_text("".join([*lines[:7776], broken + "\n", *lines[7777:]]))
            with pytest.raises(DatasetError, match=r"train\.jsonl.*line 7777"):
                CohereRerankerFile.load(path)

    def test_round_trip(self, tmp_path: Path) -> None:
        file = CohereRerankerFile(
            examples=[entry(1, hard_negatives=["a\u2028b", "\x07"]), entry(2, query='"ü"\n')]
        )
        file.save(tmp_path / "a.jsonl")
        assert CohereRerankerFile.load(tmp_path / "a.jsonl") == file
        written = (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")
        assert json.loads(written[1])["hard_negatives"] == []

    @pytest.mark.parametrize(("validation", "least"), [(False, 256), (True, 64)])
    def test_limits(self, validation: bool, least: int) -> None:
        assert many(least).check_limits(validation=validation) == []
        repeated = CohereRerankerFile(examples=[*many(least - 1), entry(0)])
        with pytest.raises(DatasetError, match=rf"t\.jsonl.*has {least - 1} different.*add 1"):
            repeated.check_limits(validation=validation, path="t.jsonl")

    def test_too_large_a_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        size = sum(len(each.to_jsonl()) for each in many(256))
        monkeypatch.setattr(dataset, "MAX_FILE_BYTES", size)
        assert many(256).check_limits() == []
        monkeypatch.setattr(dataset, "MAX_FILE_BYTES", size - 1)
        with pytest.raises(DatasetError, match=f"has {size} bytes; Cohere takes {size - 1}"):
            many(256).check_limits()

    def test_long_pairs_are_told(self, caplog: pytest.LogCaptureFixture) -> None:
        file = many(256)
        file.examples[4] = entry(4, hard_negatives=["word " * 510])
        with caplog.at_level(logging.WARNING):
            assert file.check_limits() == [5]
        assert "the first is number 5" in caplog.text
        assert file.check_limits(count_tokens=lambda text: 1) == []
        assert estimate_tokens("A word, internationalization.") == 1 + 1 + 1 + 4 + 1

    def test_scripts_without_spaces_are_a_token_a_character(self) -> None:
        for text in ("漢字", "ひらカナ", "한국어", "ภาษาไทย", "ｶﾅ", "𠀀𠀁"):
            assert estimate_tokens(text * 100) == len(text) * 100
        assert estimate_tokens("the 漢字 word, 漢字s") == 1 + 2 + 1 + 1 + 2 + 1
        file = many(256)
        file.examples[4] = entry(4, hard_negatives=["漢字" * 300])
        assert file.check_limits() == [5]

    def test_another_dataset_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "other"
        qa().save(path)
        with pytest.raises(DatasetError, match=r"is an embedding QA dataset.*`ft cohere export`"):
            CohereRerankerFile.load(path)
        many(2).to_rerank().save(path)
        with pytest.raises(DatasetError, match="is a rerank dataset, not Cohere's training file"):
            CohereRerankerFile.load(path)

    def test_from_rerank_takes_what_is_judged(self, caplog: pytest.LogCaptureFixture) -> None:
        def example(query: str, **labels: float | None) -> dict[str, Any]:
            documents = [{"text": text, "label": label} for text, label in labels.items()]
            return {"query": query, "documents": documents}

        dataset = RerankDataset.coerce(
            [
                example("q", a=1, b=0, c=None, d=0),
                example("q", b=1, e=0),
                example("nothing", a=0),
            ]
        )
        file = CohereRerankerFile.from_rerank(dataset)
        assert [e.content() for e in file] == [
            {"query": "q", "relevant_passages": ["a", "b"], "hard_negatives": ["d", "e"]}
        ]
        assert "left out 1 query without a relevant document" in caplog.text
        assert CohereRerankerFile.from_rerank(dataset, max_negatives=1).examples[
            0
        ].hard_negatives == ["d"]
        with pytest.raises(DatasetError, match="no query has a document"):
            CohereRerankerFile.from_rerank([example("q", a=0)])
        with pytest.raises(ArgumentError, match="max_negatives"):
            CohereRerankerFile.from_rerank(dataset, max_negatives=-1)

    def test_to_rerank_and_back(self) -> None:
        file = CohereRerankerFile(examples=[entry(1, hard_negatives=["a", "b"]), entry(2)])
        assert [d.label for d in file.to_rerank().examples[0].documents] == [1, 0, 0]
        assert CohereRerankerFile.from_rerank(file.to_rerank()) == file


class TestGenerate:
    def generate(self, tmp_path: Path, *given: Any, **named: Any) -> CohereRerankerFile:
        path = tmp_path / "train.jsonl"
        named = {"finetune_dataset_file_name": path, "show_progress": False} | named
        file = generate_cohere_reranker_finetuning_dataset(*given, **named)
        assert CohereRerankerFile.load(path) == file
        return file

    def test_no_negatives_by_default(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        file = generate_cohere_reranker_finetuning_dataset(qa())
        assert CohereRerankerFile.load("train.jsonl") == file
        assert file.examples[0].relevant_passages == ["The apple is a fruit."]
        assert not any(e.hard_negatives for e in file)

    def test_no_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        file = generate_cohere_reranker_finetuning_dataset(qa(), finetune_dataset_file_name=None)
        assert len(file) == len(FRUIT)
        assert list(tmp_path.iterdir()) == []

    def test_random(self, tmp_path: Path) -> None:
        first = self.generate(tmp_path, qa(), 3)
        assert all(len(e.hard_negatives) == 3 for e in first)
        assert first == self.generate(tmp_path, qa(), 3)
        assert first != self.generate(tmp_path, qa(), 3, seed=1)
        assert len(self.generate(tmp_path, qa(), 99).examples[0].hard_negatives) == 5

    def test_a_relevant_text_is_never_a_negative(self, tmp_path: Path) -> None:
        corpus = {f"d{n}": "The apple is a fruit." for n in range(5)} | {"d5": "A fig."}
        for method in ("random", "bm25"):
            file = self.generate(tmp_path, qa(corpus=corpus), 5, 100, method)
            for e in file:
                assert not set(e.relevant_passages) & set(e.hard_negatives)
            if method == "random":
                assert file.examples[0].hard_negatives == ["A fig."]

    def test_mined(self, tmp_path: Path) -> None:
        given: dict[str, Any] = {"num_negatives": 2, "relative_margin": None}
        cosine = {"hard_negatives_gen_method": "cosine_similarity", "embed_model": Letters()}
        near = self.generate(tmp_path, qa(), **given, **cosine)
        vectors = {text: Letters().get_text_embedding(text) for text in qa().corpus.values()}
        for e in near:
            asked = Letters().get_query_embedding(e.query)
            ranked = sorted(
                (text for text in vectors if text not in e.relevant_passages),
                key=lambda text: -Letters().similarity(asked, vectors[text]),
            )
            assert e.hard_negatives == ranked[:2]
        bm25 = self.generate(tmp_path, qa(), **given, hard_negatives_gen_method="bm25")
        assert all(len(e.hard_negatives) == 2 for e in bm25)
        own = {"hard_negatives_gen_method": "retriever", "retriever": Fixed()}
        found = self.generate(tmp_path, qa(), **given, **own)
        assert found.examples[0].hard_negatives == ["The fig is a fruit.", "The banana is a fruit."]

    def test_one_query_under_two_ids(self, tmp_path: Path) -> None:
        queries = {f"q{n}": "which fruit?" for n in range(2)}
        relevant = {"q0": ["d0", "d1"], "q1": ["d2"]}
        file = self.generate(tmp_path, qa(queries=queries, relevant_docs=relevant), 5)
        assert len(file) == 1
        assert len(file.examples[0].relevant_passages) == 3
        assert len(file.examples[0].hard_negatives) == 3

    @pytest.mark.parametrize(
        ("given", "text"),
        [
            ({"num_negatives": -1}, "num_negatives"),
            ({"hard_negatives_gen_method": "cosine"}, "known are 'random'"),
            ({"hard_negatives_gen_method": "cosine_similarity"}, "embed_model: is needed"),
            ({"hard_negatives_gen_method": "retriever"}, "retriever: is needed"),
        ],
    )
    def test_bad_arguments(self, tmp_path: Path, given: dict[str, Any], text: str) -> None:
        with pytest.raises(ArgumentError, match=text):
            self.generate(tmp_path, qa(), **{"num_negatives": 1} | given)
        assert not (tmp_path / "train.jsonl").exists()
