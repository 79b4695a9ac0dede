"""An LLM for tests that answers by a rule: it reads the prompt that is really sent."""

from __future__ import annotations

from typing import Any

from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata
from llama_index.core.llms.callbacks import llm_completion_callback


class RuleLLM(CustomLLM):
    """Answers what its rule makes of the prompt."""

    rule: Any
    name: str = "rule-1"

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name=self.name)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return CompletionResponse(text=self.rule(prompt))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        text = self.rule(prompt)

        def pieces() -> Any:
            yield CompletionResponse(text=text, delta=text)

        return pieces()
