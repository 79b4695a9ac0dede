"""Journal what the reranker of a live app sees and keeps, and make a rerank dataset of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ft_core.datasets.rerank import (
    RerankDataset,
    RerankDocument,
    RerankExample,
    is_visible,
    merge_repeats,
)
from ft_core.errors import DatasetError
from ft_core.hooks import Call
from ft_core.traffic import Query, Traffic, TrafficHandler, finite


class RerankHandler(TrafficHandler):
    """Base of the hooks that record each call of a live app's rerankers, with feedback.

    A subclass names the rerankers in `components`. A record holds the candidates in the order
    of the retriever, with its scores, and what the reranker kept, with the reranker's. A call
    that raises is not recorded, nor is one without a query or candidates. For the arguments
    see `TrafficHandler`; texts are recorded as rerankers read them, with the metadata that the
    index embeds, unless `metadata_mode` says otherwise.
    """

    methods = ("postprocess_nodes", "apostprocess_nodes")
    record_type = "rerank"
    own_fields = MappingProxyType({"kept": list, "model": str})

    def __init__(
        self,
        path: Path | str,
        *,
        redact: Callable[[str], str] | None = None,
        metadata_mode: str = "embed",
    ) -> None:
        super().__init__(path, redact=redact, metadata_mode=metadata_mode)

    def started(self, call: Call) -> None:
        """Keep the candidates with their scores, which a reranker may overwrite."""
        super().started(call)
        call.state = self.nodes(_argument(call, 0, "nodes") or ())

    def observe(self, call: Call) -> None:
        """Append one call to the journal."""
        query = _query(call)
        if call.error is not None or not call.state or not query or not query.strip():
            return
        self.write(
            query,
            call.state,
            call.seconds,
            kept=[[item.node.node_id, finite(item.score)] for item in call.result],
            model=str(getattr(call.target, "model", type(call.target).__name__)),
        )

    def to_dataset(self) -> RerankDataset:
        """Return what was recorded as a rerank dataset.

        A query text is one example, with the candidates of its newest call; the marks of all
        its calls are its labels, 1 and 0, and the reranker's scores are the `teacher_score`
        of what it kept. A marked node that the newest call did not get stands behind the
        others, as not `retrieved`.

        Raises:
            DatasetError: nothing is recorded; says what to do.
            ArtifactError: the file holds something that no such handler wrote.
        """
        traffic = Traffic(self)
        examples = [
            RerankExample(
                id=query.id,
                query=text,
                documents=documents,
                metadata={key: query.last[key] for key in ("time", "seconds", "model")},
            )
            for text, query in traffic.queries.items()
            if is_visible(text) and (documents := merge_repeats(_documents(traffic, query)))
        ]
        if not examples:
            raise DatasetError(
                "nothing is recorded; attach the handler to the app and use it", source=self.path
            )
        return RerankDataset(examples=examples)


def _documents(traffic: Traffic, query: Query) -> Iterator[RerankDocument]:
    """Yield the candidates of the newest call, then what else is marked."""
    kept = dict(query.last["kept"])
    candidates = {(node, digest): score for node, digest, score in query.last["nodes"]}
    for document in [*candidates, *(mark for mark in query.marks if mark not in candidates)]:
        if not is_visible(traffic.texts.get(document[1], "")):
            continue  # an empty one teaches nothing
        is_candidate = document in candidates
        yield RerankDocument(
            id=traffic.name(document),
            text=traffic.texts[document[1]],
            label=query.marks.get(document),
            retrieval_score=candidates.get(document, query.scores.get(document)),
            teacher_score=kept.get(document[0]) if is_candidate else None,
            retrieved=is_candidate,
        )


def _argument(call: Call, place: int, name: str) -> Any:
    return call.args[place] if len(call.args) > place else call.kwargs.get(name)


def _query(call: Call) -> str | None:
    """Return the text of `query_bundle` or `query_str`, whichever the app passed."""
    bundle = _argument(call, 1, "query_bundle")
    text = _argument(call, 2, "query_str") if bundle is None else bundle.query_str
    return text if isinstance(text, str) else None
