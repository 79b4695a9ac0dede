"""Train an adapter; `test_packaging.py` runs this where only ft-adapter is installed.

The argument is the folder tools/, for the embedding model of `model_assets`.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode

from ft_adapter import EmbeddingAdapterFinetuneEngine, EmbeddingQAFinetuneDataset

GOODS = ["amber", "barley", "copper", "dates", "ebony", "flax", "ginger", "honey", "indigo", "jade"]
CARGOES = list(itertools.combinations(GOODS, 3))  # 120


def dataset(cargoes: list[tuple[str, ...]]) -> EmbeddingQAFinetuneDataset:
    """Questions that name two of three goods by words of another language."""
    corpus = {"-".join(cargo): " ".join(cargo) for cargo in CARGOES}
    return EmbeddingQAFinetuneDataset(
        queries={
            f"q-{'-'.join(cargo)}": " ".join([cargo[0], *(f"{good}ska" for good in cargo[1:])])
            for cargo in cargoes
        },
        corpus=corpus,
        relevant_docs={f"q-{'-'.join(cargo)}": ["-".join(cargo)] for cargo in cargoes},
    )


def main(tools: str) -> None:
    train, heldout = dataset(CARGOES[::2]), dataset(CARGOES[1::4])
    sys.path.append(tools)
    from model_assets import HashingEmbedding

    nodes = [TextNode(id_=key, text=text) for key, text in train.corpus.items()]
    index = VectorStoreIndex(nodes, embed_model=HashingEmbedding())
    model = HashingEmbedding()
    engine = EmbeddingAdapterFinetuneEngine.from_index(
        index,
        train,
        model,
        val_dataset=heldout,
        epochs=15,
        learning_rate=0.01,
        identity_pull=0.0,
        device="cpu",
        model_output_path="adapter",
        cache_dir="cache",
    )
    report = engine.finetune()
    assert model.text_calls == 0, model.texts
    report.save_html("report.html")  # this pack needs the extra, so it brings it
    page = Path("report.html").read_text(encoding="utf-8")
    assert "the adapter is kept" in page, page
    base, adapted = (run.mean("ndcg@10") for run in report.runs)
    assert adapted > base + 0.1, (base, adapted)

    question = next(iter(heldout.queries.values()))
    vector = engine.get_finetuned_model().get_query_embedding(question)
    again = EmbeddingAdapterFinetuneEngine.load("adapter", HashingEmbedding(), device="cpu")
    same = again.get_finetuned_model().get_query_embedding(question)
    np.testing.assert_allclose(vector, same, rtol=1e-5, atol=1e-6)
    assert not np.allclose(vector, model.get_query_embedding(question))

    retriever = engine.get_finetuned_retriever(index, similarity_top_k=3)
    assert len(retriever.retrieve(question)) == 3

    ft = Path(sys.executable).with_name("ft")
    help_page = subprocess.run([ft, "--help"], check=True, capture_output=True, text=True).stdout
    assert "adapter" in help_page, help_page
    assert "cannot be loaded" not in help_page, help_page
    result = subprocess.run(
        [ft, "adapter", "eval", "no.json", "--embed-model", "some/model", "--adapter", "adapter"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result
    # The extra is not installed here.
    assert "pip install 'ft-adapter[huggingface]'" in result.stderr, result


if __name__ == "__main__":
    main(sys.argv[1])
