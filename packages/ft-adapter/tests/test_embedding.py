from __future__ import annotations

import asyncio
import copy
import json
import logging
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_index.core import (
    Document,
    Settings,
    StorageContext,
    VectorStoreIndex,
    load_index_from_storage,
)
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent
from llama_index.core.storage.kvstore import SimpleKVStore
from model_assets import HashingEmbedding
from torch import nn

from ft_adapter.adapters import BaseAdapter, LinearLayer, TwoLayerNN
from ft_adapter.embedding import AdapterEmbeddingModel
from ft_adapter.saved import base_of, save_adapter
from ft_core.errors import ArgumentError, ArtifactError, FTError

DIM = 32


def mixing(*, scale: float = 1.0, dim: int = DIM) -> LinearLayer:
    """An adapter that changes every vector: a fixed rotation, times `scale`."""
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((dim, dim)))[0]
    adapter = LinearLayer(dim, dim)
    adapter.linear.weight.data = torch.tensor(scale * rotation, dtype=torch.float32)
    return adapter


def expected(adapter: LinearLayer, vector: list[float]) -> np.ndarray:
    return adapter.linear.weight.detach().numpy() @ np.array(vector)


class Fails(nn.Module):
    """Goes wrong in the given way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, embed: torch.Tensor) -> Any:
        match self.how:
            case "raises":
                raise RuntimeError("no kernel")
            case "nan":
                return embed * float("nan")
            case "zero":
                return embed * 0
            case "narrow":
                return embed[:, :2]
            case "sum":
                return embed.sum(dim=0)
            case "list":
                return embed.tolist()
        raise AssertionError(self.how)


class Doubling(nn.Module):
    """A module without a configuration, and without weights of its own choice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width, bias=False)

    def forward(self, embed: torch.Tensor) -> torch.Tensor:
        return embed + self.map(embed)


def save(folder: Path, adapter: nn.Module, **kwargs: Any) -> Path:
    probe = HashingEmbedding()
    from ft_adapter.saved import PROBE_TEXT

    save_adapter(folder, adapter, base=base_of(probe, probe.vector(PROBE_TEXT)), **kwargs)
    return folder


# --- What is adapted -------------------------------------------------------------------------


def test_queries_are_adapted_and_texts_are_not() -> None:
    base, adapter = HashingEmbedding(), mixing()
    model = AdapterEmbeddingModel(base, adapter, device="cpu")
    wanted = expected(adapter, base.vector("late fee"))

    async def asynchronous() -> list[list[float]]:
        return [
            await model.aget_query_embedding("late fee"),
            await model._aget_query_embedding("late fee"),
            await model.aget_agg_embedding_from_queries(["late fee"]),
        ]

    found = [
        model.get_query_embedding("late fee"),
        model._get_query_embedding("late fee"),
        model.get_agg_embedding_from_queries(["late fee"]),
        *asyncio.run(asynchronous()),
    ]
    assert base.query_calls == 6
    for vector in found:
        assert isinstance(vector, list)
        assert all(type(number) is float for number in vector)
        np.testing.assert_allclose(vector, wanted, atol=1e-6)
    assert not np.allclose(wanted, base.vector("late fee"), atol=0.1)

    async def texts() -> list[Any]:
        return [
            await model.aget_text_embedding("b"),
            (await model.aget_text_embedding_batch(["b"]))[0],
            await model._aget_text_embedding("b"),
            (await model._aget_text_embeddings(["b"]))[0],
        ]

    for vector in [
        model.get_text_embedding("b"),
        model.get_text_embedding_batch(["b"])[0],
        model._get_text_embedding("b"),
        model._get_text_embeddings(["b"])[0],
        *asyncio.run(texts()),
    ]:
        assert vector == base.vector("b")
    assert base.text_calls == 8


def test_texts_are_adapted_when_asked_for() -> None:
    base, adapter = HashingEmbedding(), mixing()
    model = AdapterEmbeddingModel(base, adapter, transform_text=True, device="cpu")
    words = ["a", "b", "c"]
    wanted = [expected(adapter, base.vector(word)) for word in words]

    np.testing.assert_allclose(model.get_text_embedding_batch(words), wanted, atol=1e-6)
    found = asyncio.run(model.aget_text_embedding_batch(words))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_allclose(model.get_text_embedding("a"), wanted[0], atol=1e-6)
    found = asyncio.run(model.aget_text_embedding("a"))
    np.testing.assert_allclose(found, wanted[0], atol=1e-6)
    assert model.get_text_embedding_batch([]) == []
    assert asyncio.run(model.aget_text_embedding_batch([])) == []


def test_a_batch_is_one_forward() -> None:
    calls = []
    adapter = mixing()

    class Counting(BaseAdapter):
        def forward(self, embed: torch.Tensor) -> torch.Tensor:
            calls.append(tuple(embed.shape))
            return adapter(embed)

        def get_config_dict(self) -> dict[str, Any]:
            return {}

    model = AdapterEmbeddingModel(
        HashingEmbedding(embed_batch_size=2), Counting(), transform_text=True, device="cpu"
    )
    model.get_text_embedding_batch(["a", "b", "c", "d", "e"])
    assert calls == [(5, DIM)]


def test_the_aggregate_of_several_wordings_is_adapted() -> None:
    base, adapter = HashingEmbedding(), mixing()
    model = AdapterEmbeddingModel(base, adapter, device="cpu")
    mean = np.mean([base.vector("a"), base.vector("b")], axis=0)
    found = model.get_agg_embedding_from_queries(["a", "b"])
    np.testing.assert_allclose(found, expected(adapter, mean), atol=1e-6)
    found = model.get_agg_embedding_from_queries(["a", "b"], agg_fn=lambda vectors: vectors[1])
    np.testing.assert_allclose(found, expected(adapter, base.vector("b")), atol=1e-6)


def test_queries_are_left_when_asked_for() -> None:
    base = HashingEmbedding()
    model = AdapterEmbeddingModel(base, mixing(), transform_query=False, device="cpu")
    assert model.get_query_embedding("a") == base.vector("a")


def test_a_vector_keeps_the_norm_of_the_base_model() -> None:
    model = AdapterEmbeddingModel(HashingEmbedding(), mixing(scale=5.0), device="cpu")
    rows = np.random.default_rng(1).standard_normal((4, DIM)) * [[1], [7], [0.01], [0]]
    found = np.linalg.norm(model.adapt(rows.tolist()), axis=1)
    np.testing.assert_allclose(found, np.linalg.norm(rows, axis=1), rtol=1e-5)


def test_half_precision_goes_in_and_comes_out() -> None:
    adapter = mixing()
    half = AdapterEmbeddingModel(HashingEmbedding(), copy.deepcopy(adapter).half(), device="cpu")
    vector = np.random.default_rng(1).standard_normal(DIM).astype(np.float16)
    found = half.adapt_query(vector)
    np.testing.assert_allclose(found, expected(adapter, vector), atol=0.02)


def test_switching_off_gives_exactly_the_base_vectors() -> None:
    base = HashingEmbedding()
    model = AdapterEmbeddingModel(base, mixing(), transform_text=True, enabled=False, device="cpu")
    assert model.get_query_embedding("a") == base.vector("a")
    assert model.get_text_embedding_batch(["a"]) == [base.vector("a")]
    model.enabled = True
    assert model.get_query_embedding("a") != base.vector("a")
    assert model.get_text_embedding("a") != base.vector("a")
    model.enabled = False
    assert model.get_query_embedding("a") == base.vector("a")


# --- Folders ---------------------------------------------------------------------------------


def test_a_folder_says_which_sides_are_adapted(tmp_path: Path) -> None:
    base = HashingEmbedding()
    one = AdapterEmbeddingModel(base, save(tmp_path / "one", mixing()), device="cpu")
    both = AdapterEmbeddingModel(base, str(save(tmp_path / "both", mixing(), sides="both")))
    assert (one.transform_text, both.transform_text) == (False, True)
    assert both.get_text_embedding("a") != base.vector("a")
    override = AdapterEmbeddingModel(base, tmp_path / "both", transform_text=False)
    assert override.get_text_embedding("a") == base.vector("a")


def test_a_saved_identity_gives_exactly_the_base_vectors(tmp_path: Path) -> None:
    base = HashingEmbedding()
    folder = save(tmp_path / "a", mixing(), identity=True, sides="both")
    model = AdapterEmbeddingModel(base, folder, device="cpu")
    assert model.get_query_embedding("a") == base.vector("a")
    assert model.get_text_embedding_batch(["a"]) == [base.vector("a")]
    assert model.adapt([base.vector("a")]) == [base.vector("a")]


def test_the_base_model_is_checked_once_and_can_be_left_unchecked(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", mixing())
    base = HashingEmbedding()
    AdapterEmbeddingModel(base, folder)
    assert (base.query_calls, base.text_calls) == (1, 0)
    AdapterEmbeddingModel(base, folder, check_base=False)
    assert (base.query_calls, base.text_calls) == (1, 0)

    class Backwards(HashingEmbedding):
        def vector(self, text: str) -> list[float]:
            return super().vector(text)[::-1]

    with pytest.raises(ArtifactError, match="hashing"):
        AdapterEmbeddingModel(Backwards(), folder)
    with pytest.raises(ArtifactError, match="dimension 32"):
        AdapterEmbeddingModel(HashingEmbedding(dim=16), folder)
    AdapterEmbeddingModel(Backwards(), folder, check_base=False)


def test_a_folder_of_the_predecessor_gives_what_the_predecessor_gave(tmp_path: Path) -> None:
    base, adapter = HashingEmbedding(), mixing(scale=3.0)
    (tmp_path / "config.json").write_text(json.dumps(adapter.get_config_dict()))
    torch.save(adapter.state_dict(), tmp_path / "pytorch_model.bin")
    model = AdapterEmbeddingModel(base, str(tmp_path), LinearLayer, True, "cpu", 5)
    found = model.get_query_embedding("late fee")
    np.testing.assert_allclose(found, expected(adapter, base.vector("late fee")), atol=1e-5)
    assert np.linalg.norm(found) == pytest.approx(3.0, rel=1e-5)
    assert model.embed_batch_size == 5


def test_a_module_that_cannot_say_its_arguments_is_given_as_an_instance(tmp_path: Path) -> None:
    trained = Doubling(DIM)
    save(tmp_path / "a", trained)
    model = AdapterEmbeddingModel(HashingEmbedding(), tmp_path / "a", Doubling(DIM), device="cpu")
    same = AdapterEmbeddingModel(HashingEmbedding(), trained, device="cpu")
    assert model.get_query_embedding("a") == same.get_query_embedding("a")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere"):
        AdapterEmbeddingModel(HashingEmbedding(), tmp_path / "nowhere")


# --- The base model does the embedding -------------------------------------------------------


class _Events(BaseEventHandler):
    chunks: list[list[str]] = []  # noqa: RUF012 - pydantic copies it

    @classmethod
    def class_name(cls) -> str:
        return "_Events"

    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, EmbeddingEndEvent):
            self.chunks.append(event.chunks)


def test_callbacks_and_events_fire_once() -> None:
    debug, events = LlamaDebugHandler(print_trace_on_end=False), _Events()
    base = HashingEmbedding(callback_manager=CallbackManager([debug]))
    model = AdapterEmbeddingModel(base, mixing(), transform_text=True, device="cpu")
    root = get_dispatcher()
    root.add_event_handler(events)
    try:
        model.get_query_embedding("a")
        asyncio.run(model.aget_query_embedding("b"))
        model.get_text_embedding("c")
        asyncio.run(model.aget_text_embedding("d"))
        model.get_text_embedding_batch(["e", "f"])
        asyncio.run(model.aget_text_embedding_batch(["g"]))
        model.get_agg_embedding_from_queries(["h"])
        model._get_query_embedding("i")
    finally:
        root.event_handlers.remove(events)
    wanted = [["a"], ["b"], ["c"], ["d"], ["e", "f"], ["g"], ["h"], ["i"]]
    assert events.chunks == wanted
    assert len(debug.get_event_pairs(CBEventType.EMBEDDING)) == len(wanted)


def test_the_cache_of_the_base_model_is_used_and_holds_its_vectors() -> None:
    base = HashingEmbedding(embeddings_cache=SimpleKVStore())
    model = AdapterEmbeddingModel(base, mixing(), device="cpu")
    first = model.get_query_embedding("a")
    assert model.get_query_embedding("a") == first
    assert base.query_calls == 1
    held = base.embeddings_cache.get("a", collection="embeddings")
    assert list(held.values()) == [base.vector("a")]


def test_a_cache_assigned_later_is_the_base_models() -> None:
    base = HashingEmbedding()
    model = AdapterEmbeddingModel(base, mixing(), device="cpu")
    model.embeddings_cache = SimpleKVStore()
    model.get_query_embedding("a")
    model.get_query_embedding("a")
    assert base.query_calls == 1


def test_batches_are_the_base_models() -> None:
    base = HashingEmbedding(embed_batch_size=3)
    model = AdapterEmbeddingModel(base, mixing(), device="cpu")
    assert model.embed_batch_size == 3
    texts = [str(number) for number in range(7)]
    model.get_text_embedding_batch(texts)
    asyncio.run(model.aget_text_embedding_batch(texts))
    assert base.batches == [3, 3, 1, 3, 3, 1]


@pytest.mark.parametrize("workers", [None, 2])
@pytest.mark.parametrize("progress", [True, False])
def test_smaller_batches_leave_the_base_model_as_it_is(workers: int | None, progress: bool) -> None:
    base = HashingEmbedding(embed_batch_size=10, num_workers=workers)
    model = AdapterEmbeddingModel(base, mixing(), embed_batch_size=2, device="cpu")
    texts = list("abcde")
    wanted = [base.vector(text) for text in texts]
    assert model.get_text_embedding_batch(texts, show_progress=progress) == wanted
    found = asyncio.run(model.aget_text_embedding_batch(texts, show_progress=progress))
    assert found == wanted
    assert base.batches[:3] == [2, 2, 1]
    assert sorted(base.batches[3:]) == [1, 2, 2]
    assert base.embed_batch_size == 10


def test_an_error_of_the_base_model_passes_through_untouched() -> None:
    class Offline(HashingEmbedding):
        def _get_query_embedding(self, query: str) -> list[float]:
            raise ConnectionError("offline")

    model = AdapterEmbeddingModel(Offline(), mixing(), device="cpu")
    with pytest.raises(ConnectionError, match="offline"):
        model.get_query_embedding("a")


# --- Do no harm ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["raises", "nan", "zero", "narrow", "sum", "list"])
def test_a_failing_adapter_of_queries_gives_way_and_says_so_once(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = HashingEmbedding()
    model = AdapterEmbeddingModel(base, Fails(how), device="cpu")
    with caplog.at_level(logging.WARNING, logger="ft_adapter"):
        for word in "abc":
            assert model.get_query_embedding(word) == base.vector(word)
            assert asyncio.run(model.aget_query_embedding(word)) == base.vector(word)
    assert len(caplog.records) == 1
    assert caplog.records[0].exc_info is not None


@pytest.mark.parametrize("how", ["raises", "nan", "zero", "sum", "list"])
def test_a_failing_adapter_of_documents_too_raises(how: str) -> None:
    model = AdapterEmbeddingModel(HashingEmbedding(), Fails(how), transform_text=True, device="cpu")
    for embed in (model.get_query_embedding, model.get_text_embedding):
        with pytest.raises(FTError, match="adapter"):
            embed("a")


def test_a_vector_of_another_dimension_gives_way() -> None:
    base = HashingEmbedding(dim=16)
    model = AdapterEmbeddingModel(base, mixing(), device="cpu")
    assert model.get_query_embedding("a") == base.vector("a")
    with pytest.raises(FTError, match="hashing"):
        model.adapt([base.vector("a")])


def test_a_vector_that_is_not_finite_passes_as_it_came() -> None:
    model = AdapterEmbeddingModel(HashingEmbedding(), mixing(), device="cpu")
    vector = [float("nan")] * DIM
    assert model.adapt_query(vector) is vector


def test_an_adapter_that_is_trained_on_does_not_change_the_model() -> None:
    adapter = mixing().train()
    model = AdapterEmbeddingModel(HashingEmbedding(), adapter, device="cpu")
    before = model.get_query_embedding("a")
    adapter.linear.weight.data.zero_()
    assert model.get_query_embedding("a") == before
    assert adapter.training


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("local", mixing()), "base_embed_model"),
        ((HashingEmbedding(), 7), "adapter_path"),
        ((HashingEmbedding(), LinearLayer(DIM, 8)), "transform_text"),
        ((HashingEmbedding(), mixing(), None, True, "abacus"), "device"),
    ],
)
def test_arguments_of_another_kind_are_named(arguments: tuple[Any, ...], named: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        AdapterEmbeddingModel(*arguments)
    assert caught.value.argument == named


def test_an_adapter_to_another_dimension_works_on_both_sides() -> None:
    adapter = LinearLayer(DIM, 8)
    model = AdapterEmbeddingModel(HashingEmbedding(), adapter, transform_text=True, device="cpu")
    assert len(model.get_query_embedding("a")) == len(model.get_text_embedding("a")) == 8


# --- Inside LlamaIndex -----------------------------------------------------------------------


@pytest.fixture
def settings() -> Any:
    kept = (Settings._embed_model, Settings._callback_manager)
    yield Settings
    Settings._embed_model, Settings._callback_manager = kept


def test_it_survives_the_global_settings(settings: Any) -> None:
    base = HashingEmbedding()
    debug = LlamaDebugHandler(print_trace_on_end=False)
    settings.callback_manager = CallbackManager([debug])
    model = AdapterEmbeddingModel(base, mixing(), device="cpu")
    settings.embed_model = model
    assert settings.embed_model is model
    assert base.callback_manager is settings.callback_manager
    settings.embed_model.get_query_embedding("a")
    assert len(debug.get_event_pairs(CBEventType.EMBEDDING)) == 1


def test_construction_leaves_the_callbacks_of_the_base_model() -> None:
    manager = CallbackManager([LlamaDebugHandler(print_trace_on_end=False)])
    base = HashingEmbedding(callback_manager=manager)
    assert AdapterEmbeddingModel(base, mixing()).callback_manager is manager
    assert base.callback_manager is manager
    other = CallbackManager([])
    AdapterEmbeddingModel(base, mixing(), callback_manager=other)
    assert base.callback_manager is other


def test_an_index_is_built_persisted_and_loaded_with_it(tmp_path: Path) -> None:
    model = AdapterEmbeddingModel(HashingEmbedding(), mixing(), transform_text=True, device="cpu")
    documents = [Document(text=text) for text in ("late fee of a loan", "harbour at dawn")]
    index = VectorStoreIndex.from_documents(documents, embed_model=model)
    wanted = index.as_retriever(similarity_top_k=1).retrieve("what is the late fee")
    index.storage_context.persist(str(tmp_path))

    context = StorageContext.from_defaults(persist_dir=str(tmp_path))
    loaded = load_index_from_storage(context, embed_model=model)
    found = loaded.as_retriever(similarity_top_k=1).retrieve("what is the late fee")
    assert found[0].node.get_content() == "late fee of a loan"
    assert found[0].score == pytest.approx(wanted[0].score)
    # Both sides turned alike: the score is that of the base model, documents were adapted.
    plain = load_index_from_storage(
        StorageContext.from_defaults(persist_dir=str(tmp_path)), embed_model=HashingEmbedding()
    )
    unadapted = plain.as_retriever(similarity_top_k=1).retrieve("what is the late fee")
    assert unadapted[0].score != pytest.approx(wanted[0].score, abs=0.05)


def test_it_goes_to_a_spawned_process() -> None:
    model = AdapterEmbeddingModel(HashingEmbedding(), mixing(), device="cpu", embed_batch_size=4)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        found = pool.submit(methodcaller("get_query_embedding", "late fee"), model).result(
            timeout=120
        )
    assert found == model.get_query_embedding("late fee")


def test_pickling_keeps_all_settings_and_leaves_the_original_whole() -> None:
    class Unpicklable(LlamaDebugHandler):
        """A local class cannot be pickled."""

    manager = CallbackManager([Unpicklable(print_trace_on_end=False)])
    base = HashingEmbedding(callback_manager=manager)
    model = AdapterEmbeddingModel(base, mixing(), embed_batch_size=4, transform_text=True)
    model.enabled = False
    back = pickle.loads(pickle.dumps(model))
    assert back.get_query_embedding("a") == base.vector("a")
    back.enabled = True
    np.testing.assert_allclose(
        back.adapt([base.vector("a")]), model.adapt([base.vector("a")]), atol=1e-6
    )
    assert (back.embed_batch_size, back.transform_text) == (4, True)
    assert back.callback_manager is back.base_embed_model.callback_manager
    assert (model.callback_manager, base.callback_manager) == (manager, manager)
    assert back.base_embed_model.dim == DIM


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_copy_is_switched_by_itself(duplicate: Any) -> None:
    base = HashingEmbedding()
    model = AdapterEmbeddingModel(base, mixing(), device="cpu")
    other = duplicate(model)
    other.enabled = False
    assert other.get_query_embedding("a") == base.vector("a")
    assert model.get_query_embedding("a") != base.vector("a")


def test_around_another_base_model_leaves_the_first() -> None:
    first, second = HashingEmbedding(), HashingEmbedding(embed_batch_size=3)
    manager = second.callback_manager
    model = AdapterEmbeddingModel(first, mixing(), device="cpu")
    other = model.around(second)
    other.enabled = False
    other.get_query_embedding("a")
    assert (first.query_calls, second.query_calls) == (0, 1)
    assert (model.base_embed_model, other.base_embed_model) == (first, second)
    assert model.enabled
    assert other.embed_batch_size == 3
    assert second.callback_manager is manager
    assert first.callback_manager is not manager


def test_its_description_tells_adapters_apart() -> None:
    base = HashingEmbedding()

    def described(adapter: nn.Module, **kwargs: Any) -> str:
        return str(AdapterEmbeddingModel(base, adapter, device="cpu", **kwargs).to_dict())

    def network(activation: str) -> TwoLayerNN:
        torch.manual_seed(0)
        return TwoLayerNN(DIM, 8, DIM, activation_fn_str=activation)

    assert described(mixing()) == described(mixing())
    assert described(mixing()) != described(mixing(scale=2))
    assert described(mixing()) != described(mixing(), enabled=False)
    assert described(mixing()) != described(mixing(), transform_text=True)
    assert described(network("relu")) != described(network("tanh"))


def test_it_has_the_names_of_the_predecessor() -> None:
    model = AdapterEmbeddingModel(HashingEmbedding(), mixing())
    assert model.model_name == "Adapter for hashing"
    assert model.class_name() == "AdapterEmbeddingModel"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_a_gpu_is_pickled_for_any_machine() -> None:
    base, adapter = HashingEmbedding(), mixing()
    model = AdapterEmbeddingModel(base, adapter)
    assert model._device == "cuda"
    np.testing.assert_allclose(
        model.get_query_embedding("a"), expected(adapter, base.vector("a")), atol=1e-3
    )
    state = model.__getstate__()
    weights = state["__pydantic_private__"]["_adapter"].state_dict().values()
    assert {weight.device.type for weight in weights} == {"cpu"}
    assert next(model._adapter.parameters()).device.type == "cuda"
    back = pickle.loads(pickle.dumps(model))
    assert back.get_query_embedding("a") == model.get_query_embedding("a")
