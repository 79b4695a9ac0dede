"""Questions from nodes, with any LlamaIndex LLM: concurrent, retried, journalled, resumable."""

from ft_core.generation.embedding_qa import (
    GenerationResult,
    GenerationSettings,
    agenerate_qa_embedding_pairs,
    generate,
    generate_qa_embedding_pairs,
)
from ft_core.generation.parsing import parse_questions
from ft_core.generation.prompts import DEFAULT_QA_GENERATE_PROMPT_TMPL

__all__ = [
    "DEFAULT_QA_GENERATE_PROMPT_TMPL",
    "GenerationResult",
    "GenerationSettings",
    "agenerate_qa_embedding_pairs",
    "generate",
    "generate_qa_embedding_pairs",
    "parse_questions",
]
