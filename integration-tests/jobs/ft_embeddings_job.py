"""Fine-tune a tiny model; `test_packaging.py` runs this where only ft-embeddings is installed.

The argument is the folder tools/, for the model that `model_assets` builds.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode

from ft_embeddings import EmbeddingQAFinetuneDataset, SentenceTransformersFinetuneEngine

TOWNS = ["Arlow", "Brennick", "Cawdry", "Dunmere", "Esk", "Farleigh", "Gorse", "Hexwood"]


def main(tools: str) -> None:
    dataset = EmbeddingQAFinetuneDataset(
        queries={f"q-{town}": f"When does the {town} ferry leave?" for town in TOWNS},
        corpus={town: f"Boats sail from {town} pier at dawn." for town in TOWNS},
        relevant_docs={f"q-{town}": [town] for town in TOWNS},
    )
    sys.path.append(tools)
    import model_assets

    texts = [*dataset.queries.values(), *dataset.corpus.values()]
    tiny = model_assets.tiny_sentence_transformer(Path("tiny"), texts)
    engine = SentenceTransformersFinetuneEngine(
        dataset,
        model_id=tiny,
        model_output_path="tuned",
        val_dataset=dataset,
        epochs=2,
        batch_size=4,
        device="cpu",
    )
    report = engine.finetune()
    assert report is not None
    report.save_html("report.html")  # this pack needs the extra, so it brings it
    page = Path("report.html").read_text(encoding="utf-8")
    assert "tuned" in page, page

    model = engine.get_finetuned_model()
    vector = np.asarray(model.get_text_embedding("Boats sail from Esk pier at dawn."))
    assert np.isfinite(vector).all(), vector
    again = SentenceTransformersFinetuneEngine.load("tuned", device="cpu").get_finetuned_model()
    same = np.asarray(again.get_text_embedding("Boats sail from Esk pier at dawn."))
    np.testing.assert_allclose(vector, same, rtol=1e-5, atol=1e-6)

    nodes = [TextNode(id_=key, text=text) for key, text in dataset.corpus.items()]
    retriever = VectorStoreIndex(nodes, embed_model=model).as_retriever(similarity_top_k=3)
    assert len(retriever.retrieve("When does the Esk ferry leave?")) == 3

    ft = Path(sys.executable).with_name("ft")
    help_page = subprocess.run([ft, "--help"], check=True, capture_output=True, text=True).stdout
    assert "demo" in help_page, help_page
    assert "embeddings" in help_page, help_page
    assert "cannot be loaded" not in help_page, help_page


if __name__ == "__main__":
    main(sys.argv[1])
