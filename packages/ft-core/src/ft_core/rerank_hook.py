"""Journal what the reranker of a live app saw and kept, and turn it into training data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ft_core.datasets import RerankDataset, RerankDocument, RerankExample
from ft_core.datasets.rerank import is_visible, merge_repeats
from ft_core.errors import ArgumentError, DatasetError
from ft_core.hooks import Attachment, Call
from ft_core.traffic import Query, Traffic, TrafficHandler, finite


class RerankHandler(TrafficHandler):
    """Records each reranking of a live LlamaIndex app in a journal, and what users say of it.

    ```python
    handler = RerankHandler("reranked.jsonl")
    handler.attach(query_engine)  # or `with handler.attach(query_engine): ...`
    response = query_engine.query("What is the late fee?")
    handler.mark(handler.last_query_id, response.source_nodes[0].node_id, relevant=True)
    train = handler.to_dataset()
    ```

    A record holds the nodes that the reranker was given, in their order and with the
    retriever's scores, and which of them it kept, with its own, besides its class, its model
    and the seconds that it took. A reranking that raises is not recorded, nor is one without a
    query or nodes. Where an app reranks twice, each reranker's call is a record.

    Safe with threads, asyncio and several processes on one file. Nothing that goes wrong while
    the app runs reaches it: see `ft_core.hooks.Hook`. A text is written once, not per query.

    Args:
        path: the journal, JSON Lines; one that exists is continued.
        rerankers: the classes of postprocessor to watch. By default every one whose name, or
            that of a class it derives from, holds "rerank": LlamaIndex's own and its
            integrations all do. Other postprocessors filter, cut or rewrite nodes.
        redact: applied to each query and node text before it is written. Where it raises,
            nothing is written. Node ids are written as they are.
        metadata_mode: which text of a node is written; `embed`, with the metadata that its
            index embeds, is what rerankers read, `none` its text alone.

    Raises:
        ArgumentError: `path` is a folder, `metadata_mode` is unknown, or one of `rerankers` is
            no postprocessor.
        ArtifactError: `path` is a file that no `RerankHandler` wrote.
    """

    methods = ("postprocess_nodes", "apostprocess_nodes")
    record_type = "rerank"
    own_fields = MappingProxyType({"reranker": str, "kept": list})

    def __init__(
        self,
        path: Path | str,
        *,
        rerankers: tuple[type, ...] | None = None,
        redact: Callable[[str], str] | None = None,
        metadata_mode: str = "embed",
    ) -> None:
        super().__init__(path, redact=redact, metadata_mode=metadata_mode)
        self._rerankers = None if rerankers is None else _postprocessors(rerankers)

    def components(self) -> tuple[type, ...]:
        """Watch the rerankers."""
        return _named_rerankers() if self._rerankers is None else self._rerankers

    def attach(self, target: Any) -> Attachment:
        """Record what every reranker inside `target` does; see `Hook.attach`.

        Raises:
            ArgumentError: there is none inside, so nothing would be recorded.
        """
        try:
            return super().attach(target)
        except ArgumentError:
            if self._rerankers is not None:
                raise
            raise ArgumentError(
                "target",
                "found no postprocessor whose class is named a reranker inside a "
                f"{type(target).__name__}; attach to the query or chat engine, and name the "
                "class of a reranker of your own with rerankers=(Class,)",
            ) from None

    # --- While the app runs ------------------------------------------------------------------

    def started(self, call: Call) -> None:
        """Keep what the reranker is given: many write their score into the very nodes."""
        super().started(call)
        call.state = self.nodes(_arguments(call).get("nodes") or ())

    def observe(self, call: Call) -> None:
        """Append one reranking to the journal."""
        query = _query(call)
        if call.error is not None or not call.state or not query or not query.strip():
            return
        given = {node for node, _, _ in call.state}
        kept = [[n.node.node_id, finite(n.score)] for n in call.result if n.node.node_id in given]
        self.write(query, call.state, call.seconds, kept=kept, **_named(call.target))

    # --- From the file -----------------------------------------------------------------------

    def to_dataset(self, *, unmarked: bool = False, reranker_scores: bool = False) -> RerankDataset:
        """Return the traffic as a dataset, with the marks as labels 1 and 0.

        Queries of the same text are one, with the id of the first and the candidates of the
        last. A marked node that is none of these, or had another text, stands behind them as
        not `retrieved`. `metadata` tells of the last call the time, the seconds, the reranker,
        its model and the nodes that it kept.

        Args:
            unmarked: take the queries without any mark too, for a teacher to score, say.
            reranker_scores: write the scores that the reranker gave to the nodes it kept as
                `teacher_score`: a small model learns from the large one that the app runs. It
                takes the queries that have any, marked or not.

        Raises:
            DatasetError: nothing can be exported; says what to do.
            ArtifactError: the file holds something that no `RerankHandler` wrote.
        """
        traffic = Traffic(self)
        examples = []
        for text, query in traffic.queries.items():
            documents = merge_repeats(_documents(traffic, query, scores=reranker_scores))
            wanted = unmarked or any(_is_judged(document) for document in documents)
            if documents and wanted and is_visible(text):
                examples.append(_example(text, query, documents))
        if not examples:
            raise DatasetError(_nothing(len(traffic.queries), unmarked), source=self.path)
        return RerankDataset(examples=examples)


def _is_judged(document: RerankDocument) -> bool:
    return document.label is not None or document.teacher_score is not None


def _example(text: str, query: Query, documents: list[RerankDocument]) -> RerankExample:
    last = query.last
    told = {name: last.get(name) for name in ("time", "seconds", "reranker", "model")}
    kept = [node for node, _ in last["kept"]]
    return RerankExample(
        id=query.id, query=text, documents=documents, metadata={**told, "kept": kept}
    )


def _documents(traffic: Traffic, query: Query, *, scores: bool) -> Iterator[RerankDocument]:
    """Yield the candidates of the last call, then what else is marked."""
    given: dict[str, float | None] = dict(query.last["kept"]) if scores else {}
    candidates = {(node, digest): score for node, digest, score in query.last["nodes"]}
    for document in [*candidates, *(mark for mark in query.marks if mark not in candidates)]:
        node, digest = document
        if not is_visible(traffic.texts.get(digest, "")):
            continue  # an empty one teaches nothing
        mark = query.marks.get(document)
        is_candidate = document in candidates
        yield RerankDocument(
            id=traffic.name(document),
            text=traffic.texts[digest],
            label=None if mark is None else float(mark),
            # What an earlier call of the same query found had a score then.
            retrieval_score=candidates.get(document, query.scores.get(document)),
            teacher_score=given.get(node) if is_candidate else None,
            retrieved=is_candidate,
        )


def _named(reranker: Any) -> dict[str, str | None]:
    """Return the class of a reranker, and its model where it names one."""
    model = getattr(reranker, "model", None)
    return {
        "reranker": type(reranker).__name__,
        "model": model if isinstance(model, str) else None,
    }


def _arguments(call: Call) -> dict[str, Any]:
    """Return the arguments of `postprocess_nodes` by name."""
    names = ("nodes", "query_bundle", "query_str")
    return {**dict(zip(names, call.args, strict=False)), **call.kwargs}


def _query(call: Call) -> str | None:
    """Return the text of the query, or None where the caller gave none."""
    given = _arguments(call)
    text = given.get("query_str")
    return text if text is not None else getattr(given.get("query_bundle"), "query_str", None)


def _named_rerankers() -> tuple[type, ...]:
    """Return the loaded classes of postprocessor whose name says that they rerank."""
    from llama_index.core.postprocessor.types import BaseNodePostprocessor

    found: dict[type, None] = {}
    waiting: list[type] = [BaseNodePostprocessor]
    while waiting:
        kind = waiting.pop()
        if "rerank" in kind.__name__.lower():
            found[kind] = None  # stands for what derives from it
        else:
            waiting.extend(type.__subclasses__(kind))
    return tuple(found)


def _postprocessors(kinds: tuple[type, ...]) -> tuple[type, ...]:
    from llama_index.core.postprocessor.types import BaseNodePostprocessor

    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    for kind in kinds:
        if not isinstance(kind, type) or not issubclass(kind, BaseNodePostprocessor):
            raise ArgumentError("rerankers", f"{kind!r} is no class of LlamaIndex postprocessor")
    if not kinds:
        raise ArgumentError("rerankers", "names no class; None is the default")
    return kinds


def _nothing(count: int, unmarked: bool) -> str:
    if not count or unmarked:
        return "no reranking is recorded; attach the handler to the app and use it"
    return (
        f"of {count} queries none has a marked node; mark some with handler.mark(query_id, "
        "node_id), or pass reranker_scores=True to learn from the reranker, or unmarked=True"
    )
