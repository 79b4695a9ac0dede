"""The words that some models expect before a query or a document."""

from __future__ import annotations

from typing import NamedTuple


class Instructions(NamedTuple):
    """What stands before each query and each document; "" is nothing."""

    query: str
    text: str


def instructions_for(
    model_id: str, query: str | None = None, text: str | None = None
) -> Instructions:
    """Return the given instructions, or else the ones that the named model was trained with.

    Known are the BGE and Instructor models, as LlamaIndex knows them, and the E5 family
    (`query: ` and `passage: `, from its model cards). Training, evaluation and the returned
    model all use the same.
    """
    from llama_index.embeddings.huggingface.utils import (
        get_query_instruct_for_model_name,
        get_text_instruct_for_model_name,
    )

    known = Instructions(
        get_query_instruct_for_model_name(model_id), get_text_instruct_for_model_name(model_id)
    )
    name = model_id.rsplit("/", 1)[-1].lower()
    if name.startswith(("e5-small", "e5-base", "e5-large", "multilingual-e5-")):
        instruct = name.endswith("instruct")  # takes a task description instead
        known = Instructions("", "") if instruct else Instructions("query: ", "passage: ")
    return Instructions(
        known.query if query is None else query, known.text if text is None else text
    )
