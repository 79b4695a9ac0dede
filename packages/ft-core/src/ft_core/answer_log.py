"""What models answer under evaluation, kept on disk as it comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from ft_core import files
from ft_core.errors import ArtifactError
from ft_core.files import Journal

AnswerT = TypeVar("AnswerT")


class AnswerLog(Generic[AnswerT]):
    """The answers of an evaluation, so that it can go on after a kill.

    Args:
        path: the file, or None to keep none.
        kind: of the answers: a dataclass with the field `error`, None where the answer came.

    Raises:
        ArtifactError: the file holds something else.
    """

    def __init__(self, path: Path | str | None, kind: type[AnswerT]) -> None:
        self._journal = None if path is None else Journal(path)
        self._answers: dict[str, AnswerT] = {}
        adapter = TypeAdapter(kind)
        for record in self._journal.records() if self._journal else ():
            try:
                self._answers[record["key"]] = adapter.validate_python(record["answer"])
            except (KeyError, TypeError, ValidationError):
                raise ArtifactError(
                    f"{path}: is not the journal of an evaluation; name another file"
                ) from None

    def ask(self, key: Any, ask: Callable[[], AnswerT]) -> AnswerT:
        """Return an answer, that of an earlier run if there is one.

        Args:
            key: who is asked what, of JSON's types.
            ask: gets the answer; one with an error is not kept.
        """
        key = files.content_hash(key)
        answer = self._answers.get(key)
        if answer is None:
            answer = ask()
            kept: dict[str, Any] = asdict(answer)  # type: ignore[call-overload]
            if self._journal is not None and kept["error"] is None:
                self._journal.append({"key": key, "answer": kept})
        return answer
