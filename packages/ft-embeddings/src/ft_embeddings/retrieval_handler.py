"""Journal what a live app retrieves, and turn it with the app's feedback into training data."""

from __future__ import annotations

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import DatasetError
from ft_core.hooks import Call
from ft_core.traffic import Document, Traffic, TrafficHandler


class RetrievalHandler(TrafficHandler):
    """Records each retrieval of a live LlamaIndex app in a journal, and what users say of it.

    ```python
    handler = RetrievalHandler("traffic.jsonl")
    handler.attach(query_engine)  # or `with handler.attach(query_engine): ...`
    response = query_engine.query("What is the late fee?")
    handler.mark(handler.last_query_id, response.source_nodes[0].node_id, relevant=True)
    train = handler.to_dataset()
    ```

    Of a retriever that asks others (fusion, recursive, a router), the outermost one is
    recorded: what the app asked, and what it got. The nodes are recorded as retrieved, before
    any postprocessor. A retrieval that raises is not recorded.

    Safe with threads, asyncio and several processes on one file. Nothing that goes wrong while
    the app runs reaches it: see `ft_core.hooks.Hook`. A text is written once, not per query;
    a process that starts on a journal above 64 MiB, or several that start together, may write
    it once more.

    Args:
        path: the journal, JSON Lines; one that exists is continued.
        redact: applied to each query and node text before it is written. Where it raises,
            nothing is written. Node ids are written as they are.
        metadata_mode: which text of a node is written: `none` its text alone, `embed` with
            the metadata that its index embeds.

    Raises:
        ArgumentError: `path` is a folder, or `metadata_mode` is unknown.
        ArtifactError: `path` is a file that no `RetrievalHandler` wrote.
    """

    methods = ("retrieve", "aretrieve")
    record_type = "retrieval"

    def components(self) -> tuple[type, ...]:
        """Watch every retriever."""
        from llama_index.core.base.base_retriever import BaseRetriever

        return (BaseRetriever,)

    def observe(self, call: Call) -> None:
        """Append one retrieval to the journal."""
        if call.error is not None:
            return
        query = call.args[0] if call.args else next(iter(call.kwargs.values()))
        text = getattr(query, "query_str", query)
        self.write(text, self.nodes(call.result), call.seconds)

    def to_dataset(self, *, assume_top: float | None = None) -> EmbeddingQAFinetuneDataset:
        """Return the marked traffic as a dataset.

        Queries of the same text are one query, with the id of the first. The corpus is every
        node that was ever retrieved, as last seen; where a mark was given to an older text of
        a node, that text has the id `NODE#DIGEST`. Queries without a relevant node are left
        out; see `negatives` for the nodes marked irrelevant.

        Args:
            assume_top: take the best node of a query that has no mark at all for relevant when
                its score is at least this. Off by default, and weaker: it teaches the model
                what it already believes, its errors included.

        Raises:
            DatasetError: nothing can be exported; says what to do.
            ArtifactError: the file holds something that no `RetrievalHandler` wrote.
        """
        traffic = Traffic(self)
        positives = traffic.judged(relevant=True)
        if assume_top is not None:
            positives |= _assumed(traffic, assume_top)
        if not positives:
            raise DatasetError(_nothing(traffic, assume_top), source=self.path)
        corpus = traffic.corpus()
        for documents in positives.values():
            corpus.update({traffic.name(item): traffic.texts[item[1]] for item in documents})
        return EmbeddingQAFinetuneDataset(
            queries={traffic.queries[text].id: text for text in positives},
            corpus=corpus,
            relevant_docs={
                traffic.queries[text].id: [traffic.name(item) for item in documents]
                for text, documents in positives.items()
            },
        )

    def negatives(self) -> dict[str, list[str]]:
        """Return query id to the ids of the nodes marked irrelevant, as mining returns them.

        The ids are those of `to_dataset`; only queries that have a marked relevant node too.
        An older text of a node, which the corpus does not hold, is left out.
        """
        traffic = Traffic(self)
        positives = traffic.judged(relevant=True)
        held = traffic.corpus()
        result = {}
        for text, documents in traffic.judged(relevant=False).items():
            names = [traffic.name(item) for item in documents]
            names = [name for name in names if name in held]
            if text in positives and names:
                result[traffic.queries[text].id] = names
        return result


def _assumed(traffic: Traffic, min_score: float) -> dict[str, list[Document]]:
    """Return query text to its best document, of the queries without any mark."""
    result = {}
    for text, query in traffic.queries.items():
        scored = {
            item: score
            for item, score in query.scores.items()
            if score is not None and traffic.has_text(item[1])
        }
        if scored and not query.marks:
            best = max(scored, key=scored.__getitem__)
            if scored[best] >= min_score:
                result[text] = [best]
    return result


def _nothing(traffic: Traffic, assume_top: float | None) -> str:
    count = len(traffic.queries)
    if not count:
        return "no retrieval is recorded; attach the handler to the app and use it"
    if assume_top is not None:
        return (
            f"of {count} queries none has a node marked relevant, or without any mark one that "
            f"scores {assume_top} or more; lower assume_top or mark some with handler.mark()"
        )
    return (
        f"of {count} queries none has a node marked relevant; mark some with "
        "handler.mark(query_id, node_id), or pass assume_top=SCORE to take the best node of each"
    )
