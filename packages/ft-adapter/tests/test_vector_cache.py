"""Nothing is embedded twice, nothing wrong is stored, and a kill loses one batch at most."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import MockEmbedding
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr
from model_assets import HashingEmbedding

from ft_adapter import vector_cache
from ft_adapter.vector_cache import PROBE_TEXT, VectorCache
from ft_core.errors import ArgumentError, ArtifactError, FTError

TEXTS = {f"d{number}": f"text {number} " + "long " * (number % 5) for number in range(25)}


class Scripted(HashingEmbedding):
    """Gives, for the texts named in it, what a test says, or raises it."""

    _answers: dict[str, Any] = PrivateAttr(default_factory=dict)

    def __init__(self, answers: dict[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._answers = answers or {}

    def vector(self, text: str) -> Any:
        answer = self._answers.get(text, super().vector(text))
        if isinstance(answer, Exception):
            raise answer
        return answer


class Prefixed(HashingEmbedding):
    """Puts an instruction before each query, as many models do."""

    def _get_query_embedding(self, query: str) -> list[float]:
        return super()._get_query_embedding(f"query: {query}")


def expected(texts: dict[str, str], model: HashingEmbedding | None = None) -> np.ndarray:
    model = model or HashingEmbedding()
    return np.array([model.vector(text) for text in texts.values()], dtype=np.float32)


def test_vectors_come_in_the_order_of_the_texts_each_text_embedded_once(tmp_path: Path) -> None:
    model = HashingEmbedding(embed_batch_size=4)
    texts = {**TEXTS, "again": TEXTS["d3"], "and again": TEXTS["d3"]}
    vectors = VectorCache(tmp_path, model).embed(texts, "text", False)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, expected(texts))
    assert sorted(model.texts) == sorted(TEXTS.values())
    assert model.batches == [4, 4, 4, 4, 4, 4, 1]


def test_texts_are_embedded_longest_first(tmp_path: Path) -> None:
    model = HashingEmbedding(embed_batch_size=4)
    VectorCache(tmp_path, model).embed(TEXTS, "text", False)
    lengths = [len(text) for text in model.texts]
    assert lengths == sorted(lengths, reverse=True)


def test_a_second_run_embeds_only_what_is_new(tmp_path: Path) -> None:
    VectorCache(tmp_path, HashingEmbedding()).embed(TEXTS, "text", False)
    model = HashingEmbedding()
    more = {"new": "not seen before", **TEXTS}
    vectors = VectorCache(tmp_path, model).embed(more, "text", False)
    assert model.texts == ["not seen before"]
    np.testing.assert_array_equal(vectors, expected(more))


def test_a_query_is_not_taken_for_a_text(tmp_path: Path) -> None:
    model = Prefixed()
    cache = VectorCache(tmp_path, model)
    texts = cache.embed({"d": "the same words"}, "text", False)
    queries = cache.embed({"q": "the same words"}, "query", False)
    assert not np.allclose(texts, queries)
    again = VectorCache(tmp_path, model)
    np.testing.assert_array_equal(again.embed({"d": "the same words"}, "text", False), texts)
    np.testing.assert_array_equal(again.embed({"q": "the same words"}, "query", False), queries)
    assert (model.text_calls, model.query_calls) == (1, 1)


def test_queries_are_batched_where_the_model_treats_them_as_texts(tmp_path: Path) -> None:
    model = HashingEmbedding(embed_batch_size=10)
    vectors = VectorCache(tmp_path, model, batch_queries=True).embed(TEXTS, "query", False)
    np.testing.assert_array_equal(vectors, expected(TEXTS))
    assert (model.queries, model.batches) == ([PROBE_TEXT], [1, 10, 10, 5])
    # They are queries in the file, and no documents.
    again = HashingEmbedding()
    np.testing.assert_array_equal(
        VectorCache(tmp_path, again).embed(TEXTS, "query", False), vectors
    )
    assert (again.text_calls, again.query_calls) == (0, 0)
    VectorCache(tmp_path, again).embed(TEXTS, "text", False)
    assert again.text_calls == len(TEXTS)


@pytest.mark.parametrize("texts", [TEXTS, {"q": "alone"}])
def test_other_queries_are_asked_one_by_one(tmp_path: Path, texts: dict[str, str]) -> None:
    model = Prefixed()
    vectors = VectorCache(tmp_path, model, batch_queries=True).embed(texts, "query", False)
    asked = {name: f"query: {text}" for name, text in texts.items()}
    np.testing.assert_array_equal(vectors, expected(asked))
    assert set(model.texts) <= {PROBE_TEXT}
    assert set(asked.values()) <= set(model.queries)


def test_the_model_is_asked_for_no_text_unless_allowed(tmp_path: Path) -> None:
    model = HashingEmbedding()
    VectorCache(tmp_path, model).embed(TEXTS, "query", False)
    assert (model.text_calls, model.query_calls) == (0, len(TEXTS))


def test_no_texts_give_no_rows_and_no_file(tmp_path: Path) -> None:
    assert VectorCache(tmp_path, HashingEmbedding()).embed({}, "text", False).shape[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_the_constructor_touches_nothing(tmp_path: Path) -> None:
    VectorCache(tmp_path / "cache", HashingEmbedding())
    assert not (tmp_path / "cache").exists()


def test_the_default_folder_is_in_the_cache_of_llamaindex(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_INDEX_CACHE_DIR", str(tmp_path))
    cache = VectorCache(None, HashingEmbedding())
    cache.embed(TEXTS, "text", False)
    assert [path.name for path in (tmp_path / "ft-adapter").iterdir()] == [
        f"{cache.identity}.sqlite"
    ]


def test_half_precision_and_odd_texts_are_taken(tmp_path: Path) -> None:
    half = np.array([0.5, -2.0, 0.25], dtype=np.float16)
    texts = {"half": "half", "empty": "", "surrogate": "\ud83d"}
    model = Scripted({"half": half, "": [1, 2, 3], "\ud83d": (0.0, 0.0, 1.0)})
    VectorCache(tmp_path, model).embed(texts, "text", False)
    again = VectorCache(tmp_path, Scripted()).embed(texts, "text", False)
    assert again.tolist() == [[0.5, -2.0, 0.25], [1, 2, 3], [0, 0, 1]]


def test_queries_of_a_batch_are_asked_for_in_parallel(tmp_path: Path) -> None:
    barrier = threading.Barrier(4, timeout=30)

    class Meeting(HashingEmbedding):
        def _get_query_embedding(self, query: str) -> list[float]:
            barrier.wait()  # breaks unless four are here at once
            return self.vector(query)

    queries = {f"q{number}": f"question {number}" for number in range(8)}
    model = Meeting(num_workers=4, embed_batch_size=8)
    vectors = VectorCache(tmp_path, model).embed(queries, "query", False)
    np.testing.assert_array_equal(vectors, expected(queries))


def test_queries_are_asked_for_one_by_one_without_workers(tmp_path: Path) -> None:
    threads = []

    class Noting(HashingEmbedding):
        def _get_query_embedding(self, query: str) -> list[float]:
            threads.append(threading.current_thread())
            return self.vector(query)

    VectorCache(tmp_path, Noting()).embed(TEXTS, "query", False)
    assert set(threads) == {threading.current_thread()}


# What a model may do wrong


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        ([1.0, float("nan")] + [0.0] * 30, "a NaN or an infinity"),
        ([1e300] * 32, "a NaN or an infinity"),
        ([1.0] * 31, "a vector of length 31, not 32"),
        ([], "not a vector"),
    ],
)
@pytest.mark.parametrize(("kind", "place"), [("text", "corpus"), ("query", "queries")])
def test_a_bad_vector_is_an_error_that_names_the_text_and_is_not_stored(
    tmp_path: Path, kind: Any, place: str, answer: Any, what: str
) -> None:
    model = Scripted({"bad": answer}, embed_batch_size=5)
    texts = {**TEXTS, "the one": "bad"}  # the shortest, and the last query
    with pytest.raises(ArgumentError, match=r"run again") as caught:
        VectorCache(tmp_path, model).embed(texts, kind, False)
    assert caught.value.argument == "embed_model"
    assert f"{place}['the one']" in str(caught.value)
    assert what in str(caught.value)

    healthy = Scripted()
    vectors = VectorCache(tmp_path, healthy).embed(texts, kind, False)
    assert healthy.text_calls + healthy.query_calls == 1
    np.testing.assert_array_equal(vectors, expected(texts))


@pytest.mark.parametrize("answer", [None, "text", [[1.0] * 32]])
@pytest.mark.parametrize(("kind", "lost"), [("text", 6), ("query", 1)])
def test_what_is_no_vector_is_an_error_whoever_sees_it_first(
    tmp_path: Path, kind: Any, lost: int, answer: Any
) -> None:
    model = Scripted({"bad": answer}, embed_batch_size=10)  # LlamaIndex itself may refuse it
    texts = {**TEXTS, "the one": "bad"}
    with pytest.raises(ArgumentError, match=r"run again") as caught:
        VectorCache(tmp_path, model).embed(texts, kind, False)
    assert caught.value.argument == "embed_model"
    healthy = Scripted()
    VectorCache(tmp_path, healthy).embed(texts, kind, False)
    assert healthy.text_calls + healthy.query_calls == lost


def test_too_few_vectors_are_an_error(tmp_path: Path) -> None:
    class Forgetful(HashingEmbedding):
        def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            return super()._get_text_embeddings(texts)[1:]

    with pytest.raises(ArgumentError, match=r"9 vectors for a batch of 10 texts.*corpus\['d"):
        VectorCache(tmp_path, Forgetful()).embed(TEXTS, "text", False)


def test_a_failing_model_keeps_the_batches_before(tmp_path: Path) -> None:
    cause = ConnectionError("no route")
    model = Scripted({TEXTS["d0"]: cause}, embed_batch_size=10)  # one of the shortest
    with pytest.raises(ArgumentError, match=r"failed on a batch of 5 texts.*no route") as caught:
        VectorCache(tmp_path, model).embed(TEXTS, "text", False)
    assert caught.value.__cause__ is cause
    healthy = Scripted()
    VectorCache(tmp_path, healthy).embed(TEXTS, "text", False)
    assert healthy.text_calls == 5


@pytest.mark.parametrize("workers", [None, 3])
def test_a_failing_query_keeps_those_before_it_and_is_named(
    tmp_path: Path, workers: int | None
) -> None:
    cause = ConnectionError("no route")
    model = Scripted({TEXTS["d7"]: cause}, embed_batch_size=10, num_workers=workers)
    with pytest.raises(ArgumentError, match=r"failed on queries\['d7'\] .*no route") as caught:
        VectorCache(tmp_path, model).embed(TEXTS, "query", False)
    assert caught.value.__cause__ is cause
    healthy = Scripted()
    VectorCache(tmp_path, healthy).embed(TEXTS, "query", False)
    assert healthy.queries == list(TEXTS.values())[7:]


def test_a_model_that_gives_other_lengths_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    class Hidden(HashingEmbedding):
        def vector(self, text: str) -> list[float]:
            return [1.0] * lengths[0]

    lengths = [8]
    cache = VectorCache(tmp_path, Hidden())
    cache.embed({"a": "one"}, "text", False)
    lengths[0] = 9
    with pytest.raises(ArtifactError, match=r"length 8.* gives 9.*delete the file") as caught:
        cache.embed({"a": "one", "b": "two"}, "text", False)
    assert str(cache.path) in str(caught.value)


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="kind"):
        VectorCache(tmp_path, HashingEmbedding()).embed(TEXTS, "documents", False)  # type: ignore[arg-type]


# What tells models apart


class Service(BaseEmbedding):
    """The settings of an embedding service; it is never called."""

    api_key: str = ""
    azure_ad_token: str = ""
    dimensions: int = 8
    timeout: float = 60.0
    max_retries: int = 10
    max_tokens: int = 512
    instruction: str | None = None
    default_headers: dict[str, str] | None = None
    additional_kwargs: dict[str, Any] = {}  # noqa: RUF012  # pydantic copies it

    def _get_query_embedding(self, query: str) -> list[float]:
        return [float(len(query))] * self.dimensions

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_query_embedding(text)


def identity(model: BaseEmbedding) -> str:
    return VectorCache(None, model).identity


@pytest.mark.parametrize(
    "settings",
    [
        {"api_key": "sk-other"},
        {"azure_ad_token": "other"},
        {"timeout": 1.0},
        {"max_retries": 0},
        {"embed_batch_size": 1},
        {"num_workers": 4},
        {"default_headers": {"Authorization": "Bearer other"}},
        {"additional_kwargs": {"api_key": "other", "http_client": object(), "timeout": 3}},
    ],
)
def test_what_cannot_change_a_vector_is_no_other_model(settings: dict[str, Any]) -> None:
    assert identity(Service(**settings)) == identity(Service())


@pytest.mark.parametrize(
    "settings",
    [
        {"model_name": "other"},
        {"dimensions": 9},
        {"max_tokens": 256},
        {"instruction": "Represent: "},
        {"additional_kwargs": {"input_type": "passage"}},
        {"additional_kwargs": {"scale": np.arange(3)}},
    ],
)
def test_what_can_change_a_vector_is_another_model(settings: dict[str, Any]) -> None:
    assert identity(Service(**settings)) != identity(Service())


def test_models_of_two_classes_are_two() -> None:
    class Sub(Service):
        pass

    models = [Service(), Sub(), MockEmbedding(embed_dim=8), MockEmbedding(embed_dim=9)]
    assert len({identity(model) for model in models}) == 4


def test_a_model_around_another_is_told_apart_by_it() -> None:
    class Around(Service):
        _inner: Any = PrivateAttr()

        def __init__(self, inner: BaseEmbedding) -> None:
            super().__init__()
            self._inner = inner

    assert identity(Around(Service())) == identity(Around(Service(timeout=5)))
    assert identity(Around(Service())) != identity(Around(Service(dimensions=9)))


def test_the_identity_is_the_same_in_another_process(tmp_path: Path) -> None:
    script = "from llama_index.core import MockEmbedding as M\n" + (
        "from ft_adapter.vector_cache import VectorCache as C\n"
        "print(C(None, M(embed_dim=8)).identity)"
    )
    seeded = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run(
        [sys.executable, "-c", script], env=seeded, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == identity(MockEmbedding(embed_dim=8))


def test_a_model_trained_anew_in_its_folder_is_another(tmp_path: Path) -> None:
    weights = tmp_path / "model" / "0_Transformer" / "weights.bin"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"12345678")
    model = Service(model_name=str(tmp_path / "model"))
    before = identity(model)
    (tmp_path / "model" / ".git").mkdir()
    (tmp_path / "model" / ".git" / "index").write_text("changes without the model")
    assert identity(model) == before

    weights.write_bytes(b"87654321")  # as large as before
    os.utime(weights, ns=(1, 1))
    assert identity(model) != before


def test_two_folders_with_like_files_are_two_models(tmp_path: Path) -> None:
    for name in ("one", "two"):  # as unpacked from two archives that keep no times
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.bin").write_bytes(name.encode())
        os.utime(tmp_path / name / "weights.bin", ns=(0, 0))
    one, two = (Service(model_name=str(tmp_path / name)) for name in ("one", "two"))
    assert identity(one) != identity(two)


def test_the_file_holds_neither_texts_nor_secrets(tmp_path: Path) -> None:
    model = Service(api_key="sk-SECRETKEY", default_headers={"X": "SECRETHEADER"})
    VectorCache(tmp_path, model).embed({"a": "CONFIDENTIAL WORDS"}, "text", False)
    VectorCache(tmp_path, model).embed({"a": "CONFIDENTIAL WORDS"}, "query", False)
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert len(content) > 1000
    for secret in (b"SECRETKEY", b"SECRETHEADER", b"CONFIDENTIAL"):
        assert secret not in content


# What may happen to the file


def filled(folder: Path) -> VectorCache:
    cache = VectorCache(folder, HashingEmbedding())
    cache.embed(TEXTS, "text", False)
    return cache


def change(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"not a database at all" * 100),
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: change(path, "UPDATE vectors SET vector = x'00'"),
        lambda path: change(path, f"UPDATE vectors SET vector = x'{'0000c07f' * 32}'"),
        lambda path: change(path, "DROP TABLE vectors"),
        lambda path: change(path, "PRAGMA user_version = 99"),
    ],
    ids=["garbage", "cut", "short vectors", "nan", "no table", "other format"],
)
def test_a_damaged_file_is_an_error_that_says_to_delete_it(tmp_path: Path, damage: Any) -> None:
    cache = filled(tmp_path)
    damage(cache.path)
    with pytest.raises(ArtifactError, match=r"damaged.*delete it") as caught:
        cache.embed(TEXTS, "text", False)
    assert str(cache.path) in str(caught.value)

    cache.path.unlink()
    np.testing.assert_array_equal(cache.embed(TEXTS, "text", False), expected(TEXTS))


def test_a_file_locked_for_long_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = filled(tmp_path)
    monkeypatch.setattr(vector_cache, "_LOCK_SECONDS", 0.1)
    holder = sqlite3.connect(cache.path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(ArtifactError, match="another process"):
            cache.embed({"new": "one more"}, "text", False)
    finally:
        holder.close()
    assert len(cache.embed(TEXTS, "text", False)) == len(TEXTS)


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(FTError, match="taken"):
        VectorCache(tmp_path / "taken", HashingEmbedding()).embed(TEXTS, "text", False)


def test_a_file_deleted_without_its_log_starts_anew(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    reader = sqlite3.connect(cache.path)  # keeps the log from being folded in
    assert reader.execute("SELECT count(*) FROM vectors").fetchone() == (25,)
    cache.embed({"new": "one more"}, "text", False)
    log = cache.path.with_name(f"{cache.path.name}-wal")
    content = log.read_bytes()
    reader.close()
    assert content
    cache.path.unlink()
    log.write_bytes(content)
    model = HashingEmbedding()
    vectors = VectorCache(tmp_path, model).embed(TEXTS, "text", False)
    np.testing.assert_array_equal(vectors, expected(TEXTS))
    assert model.text_calls == 25


def test_fifty_thousand_vectors_are_read_at_once(tmp_path: Path) -> None:
    class Quick(HashingEmbedding):
        def vector(self, text: str) -> list[float]:
            return [float(text)] * 64

    texts = {f"d{number}": str(number) for number in range(50_000)}
    VectorCache(tmp_path, Quick(embed_batch_size=2048)).embed(texts, "text", False)
    model = Quick()
    start = time.perf_counter()
    vectors = VectorCache(tmp_path, model).embed(texts, "text", False)
    assert time.perf_counter() - start < 10  # about 0.5 s on two idle cores
    assert model.text_calls == 0
    np.testing.assert_array_equal(vectors[:, 0], np.arange(50_000, dtype=np.float32))


# Several processes

WORKER = """
import sys, time
from pathlib import Path
from model_assets import HashingEmbedding
from ft_adapter.vector_cache import PROBE_TEXT, VectorCache

class Slow(HashingEmbedding):
    def _get_text_embeddings(self, texts):
        time.sleep(float(sys.argv[3]))
        with open(sys.argv[2], "a") as log:
            log.writelines(text + "\\n" for text in texts)
        return super()._get_text_embeddings(texts)

Slow.__module__ = Slow.__qualname__ = "Slow"  # one identity here and in the test
texts = {f"d{number}": f"text {number}" for number in range(int(sys.argv[4]))}
vectors = VectorCache(sys.argv[1], Slow(embed_batch_size=4)).embed(texts, "text", False)
model = HashingEmbedding()
for text, vector in zip(texts.values(), vectors):
    assert abs(vector - model.vector(text)).max() < 1e-6
print("done")
"""


def start_worker(folder: Path, log: Path, seconds: float, texts: int) -> "subprocess.Popen[str]":
    tools = str(Path(sys.modules["model_assets"].__file__ or "").parent)
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), str(log), str(seconds), str(texts)],
        env={**os.environ, "PYTHONPATH": tools},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_run_killed_midway_loses_one_batch_at_most(tmp_path: Path) -> None:
    folder, log = tmp_path / "cache", tmp_path / "log"
    worker = start_worker(folder, log, 0.02, 400)
    deadline = time.monotonic() + 60
    while len(lines(log)) < 40 and worker.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    worker.kill()
    worker.communicate()
    before = len(lines(log))
    assert 40 <= before < 400

    second = tmp_path / "second"
    worker = start_worker(folder, second, 0, 400)
    output, errors = worker.communicate(timeout=60)
    assert output == "done\n", errors
    assert 400 - before <= len(lines(second)) <= 400 - before + 4


def test_two_processes_fill_one_file_together(tmp_path: Path) -> None:
    logs = [tmp_path / "one", tmp_path / "two"]
    workers = [start_worker(tmp_path / "cache", log, 0.001, 300) for log in logs]
    for worker in workers:
        output, errors = worker.communicate(timeout=120)
        assert output == "done\n", errors
    (path,) = (tmp_path / "cache").iterdir()
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT count(*) FROM vectors").fetchone() == (300,)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_importing_it_loads_no_torch() -> None:
    script = "import sys, ft_adapter.vector_cache, ft_adapter.index_vectors as i\n" + (
        "assert 'torch' not in sys.modules and 'qdrant_client' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
