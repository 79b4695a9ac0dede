"""The vectors that an index has come out as they went in, and bad ones are named."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.schema import BaseNode, Document, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import BasePydanticVectorStore
from model_assets import HashingEmbedding

from ft_adapter.index_vectors import index_vectors
from ft_core.errors import ArgumentError


def node(name: str, vector: Any = None, document: str | None = None) -> TextNode:
    made = TextNode(id_=name, text=f"the text of {name}", embedding=vector)
    if document is not None:
        made.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=document)
    return made


def index_of(vectors: dict[str, Any]) -> VectorStoreIndex:
    """Return an index whose store holds just these."""
    index = VectorStoreIndex([], embed_model=HashingEmbedding())
    index.vector_store.data.embedding_dict.update(vectors)
    return index


class Listing(BasePydanticVectorStore):
    """A store that this package has no reader for, as small as LlamaIndex allows."""

    stores_text: bool = True
    nodes: list[BaseNode] = []  # noqa: RUF012  # pydantic copies it
    lists: bool = True

    @property
    def client(self) -> Any:
        return None

    def add(self, nodes: Any, **_: Any) -> list[str]:
        self.nodes.extend(nodes)
        return [added.node_id for added in nodes]

    def delete(self, ref_doc_id: str, **_: Any) -> None: ...

    def query(self, query: Any, **_: Any) -> Any: ...

    def get_nodes(self, node_ids: Any = None, filters: Any = None) -> list[BaseNode]:
        if not self.lists:
            raise NotImplementedError
        return self.nodes


def index_in(store: BasePydanticVectorStore, nodes: list[TextNode]) -> VectorStoreIndex:
    context = StorageContext.from_defaults(vector_store=store)
    return VectorStoreIndex(nodes, storage_context=context, embed_model=HashingEmbedding())


def test_every_node_comes_with_its_vector_and_document_and_nothing_is_embedded() -> None:
    model = HashingEmbedding()
    documents = [Document(id_=f"doc{number}", text=f"text {number}. " * 9) for number in range(5)]
    index = VectorStoreIndex.from_documents(documents, embed_model=model)
    index.insert_nodes([node("alone")])
    calls = model.text_calls

    found = index_vectors(index)
    assert model.text_calls == calls
    assert found.vectors.dtype == np.float32
    by_id = dict(zip(found.ids, found.vectors, strict=True))
    stored = index.vector_store.data.embedding_dict
    assert by_id.keys() == stored.keys()
    for name, vector in by_id.items():
        np.testing.assert_allclose(vector, stored[name], rtol=1e-6)
    assert sorted(map(str, found.ref_doc_ids)) == ["None", "doc0", "doc1", "doc2", "doc3", "doc4"]
    assert found.ref_doc_ids[found.ids.index("alone")] is None


def test_an_index_that_was_loaded_has_the_same_vectors(tmp_path: Path) -> None:
    index = index_in(SimpleVectorStore(), [node(f"n{number}") for number in range(7)])
    index.storage_context.persist(str(tmp_path))
    context = StorageContext.from_defaults(persist_dir=str(tmp_path))
    loaded = load_index_from_storage(context, embed_model=HashingEmbedding())
    one, two = index_vectors(index), index_vectors(loaded)
    assert one.ids == two.ids
    np.testing.assert_array_equal(one.vectors, two.vectors)


def test_a_deleted_node_is_not_there() -> None:
    index = index_in(SimpleVectorStore(), [node("kept"), node("gone", document="doc")])
    index.delete_ref_doc("doc")
    assert index_vectors(index).ids == ["kept"]


def test_fifty_thousand_vectors_take_little_more_than_their_own_memory() -> None:
    dimensions, count = 64, 50_000
    row = np.random.default_rng(0).standard_normal(dimensions).tolist()
    index = index_of({f"n{number}": row for number in range(count)})
    tracemalloc.start()
    found = index_vectors(index)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.vectors.shape == (count, dimensions)
    # The matrix, and for each node an entry in a dictionary and in two lists; as Python floats
    # the vectors alone would take 77 MB.
    assert peak < 4 * count * dimensions + 20e6
    np.testing.assert_allclose(found.vectors[-1], row, rtol=1e-6)


@pytest.mark.parametrize(
    ("vector", "what"),
    [
        ([1.0, float("nan")], "a NaN or an infinity"),
        ([1.0, 1e300], "a NaN or an infinity"),
        ([1.0, 2.0, 3.0], r"length 3, the nodes before it 2.*one embedding model"),
        ([], r"length 0, the nodes before it 2"),
        (None, r"no vector .*document_vectors=\{node id: vector\}"),
        ([[1.0, 2.0], [3.0, 4.0]], r"several vectors.*document_vectors"),
        ([[1.0, 2.0], [3.0]], r"several vectors"),
    ],
)
def test_a_bad_vector_is_an_error_that_names_the_node(vector: Any, what: str) -> None:
    with pytest.raises(ArgumentError, match=rf"node 'bad' .*{what}") as caught:
        index_vectors(index_of({"good": [1.0, 2.0], "bad": vector}))
    assert caught.value.argument == "index"


def test_the_first_vector_may_be_bad_too() -> None:
    with pytest.raises(ArgumentError, match=r"node 'bad' .*length 0"):
        index_vectors(index_of({"bad": []}))


def test_an_empty_index_is_an_error() -> None:
    with pytest.raises(ArgumentError, match=r"index: its SimpleVectorStore is empty: add"):
        index_vectors(index_of({}))


def test_what_is_no_index_is_refused() -> None:
    with pytest.raises(ArgumentError, match="SimpleVectorStore, not a VectorStoreIndex"):
        index_vectors(SimpleVectorStore())  # type: ignore[arg-type]


def test_a_store_of_a_subclass_is_read_like_its_parent() -> None:
    class Mine(SimpleVectorStore):
        pass

    assert index_vectors(index_in(Mine(), [node("a"), node("b")])).ids == ["a", "b"]


def test_a_store_that_lists_its_nodes_with_vectors_is_read() -> None:
    nodes = [node("a", [1.0, 2.0], "doc"), node("b", [3.0, 4.0])]
    found = index_vectors(index_in(Listing(nodes=[]), nodes))
    assert (found.ids, found.ref_doc_ids) == (["a", "b"], ["doc", None])
    assert found.vectors.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_a_node_that_is_there_twice_counts_once_as_it_was_added_last(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nodes = [node("a", [1.0, 2.0], "old"), node("b", [3.0, 4.0]), node("a", [5.0, 6.0], "new")]
    found = index_vectors(index_in(Listing(nodes=[]), nodes))
    assert (found.ids, found.ref_doc_ids) == (["a", "b"], ["new", None])
    assert found.vectors.tolist() == [[5.0, 6.0], [3.0, 4.0]]
    assert "1 nodes more than once" in caplog.text


def test_a_store_that_lists_no_vectors_or_nothing_says_what_to_pass() -> None:
    index = index_in(Listing(nodes=[]), [node("a", [1.0, 2.0])])
    index.vector_store.nodes[0].embedding = None
    with pytest.raises(ArgumentError, match=r"node 'a' has no vector in its Listing; .*document_v"):
        index_vectors(index)
    index.vector_store.lists = False
    with pytest.raises(ArgumentError, match=r"Listing cannot be read \(NotImpl.*document_vectors"):
        index_vectors(index)


def test_a_store_that_grows_while_it_is_read_is_read_to_the_end() -> None:
    class Growing(Listing):
        def get_nodes(self, node_ids: Any = None, filters: Any = None) -> Any:
            return Pages(self.nodes)

    class Pages(list[BaseNode]):
        def __len__(self) -> int:
            return 2  # when it was counted

    nodes = [node(f"n{number}", [float(number), 1.0]) for number in range(9)]
    found = index_vectors(index_in(Growing(nodes=[]), nodes))
    assert found.vectors[:, 0].tolist() == list(range(9))
    assert len(found.ids) == 9
