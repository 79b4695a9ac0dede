"""How to ask a model for questions: one prompt for capable models, another for small ones.

A style turns a text into prompts and the answers into questions:

- `InstructStyle` asks for all questions of a text in one instruction, and reads whatever
  layout the answer has.
- `SmallStyle` is for models of up to a billion parameters or so, which answer an
  instruction with small talk. It shows a few sentences each with its question, asks for one
  question about one sentence a call, and keeps only what can be a question about the text.
"""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias

from ft_core.errors import ArgumentError
from ft_core.generation.parsing import ends_as_question, parse_questions, question_key
from ft_core.generation.sentences import split_sentences

DEFAULT_QA_GENERATE_PROMPT_TMPL = """\
You write search queries that test a document search engine. Below is one passage of a larger
collection.

<passage>
{context_str}
</passage>

Write {num_questions_per_chunk} questions that somebody who has not seen this passage might ask
and that this passage alone answers. Each question must
- be about a different fact of the passage;
- name what it is about (the subject, product, place, time), so that it makes sense without the
  passage, and never say "the passage", "the text" or "the document";
- use your own words rather than repeat a sentence;
- be in the language of the passage.

Answer with exactly {num_questions_per_chunk} questions, one a line, numbered, and nothing else."""
"""The default instruction; a replacement needs the same two placeholders."""


Prompt: TypeAlias = str | list[tuple[str, str]]
"""A text to complete, or a conversation: (role, content) pairs."""


class Style(Protocol):
    """How texts become prompts, and answers become questions."""

    name: str
    """Its name in the settings; a part of what identifies an answer in the journal."""

    def prompts(self, text: str, count: int) -> Iterator[Prompt]:
        """Yield the prompts to send, in order, until `count` questions have been read."""
        ...

    def read(self, answer: str, text: str) -> list[str]:
        """Return the usable questions of one answer about the text."""
        ...


class InstructStyle:
    """One instruction a text.

    Args:
        template: a prompt with the placeholders `{context_str}` and
            `{num_questions_per_chunk}`; any object whose `format` fills them will do.

    Raises:
        ArgumentError: the template lacks `{context_str}`, or has a placeholder of its own.
    """

    name = "instruct"

    def __init__(self, template: Any = DEFAULT_QA_GENERATE_PROMPT_TMPL) -> None:
        self._template = template
        probe = "\x02the text\x03"
        try:
            filled = self._fill(probe, 2)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ArgumentError(
                "qa_generate_prompt_tmpl",
                f"cannot be filled ({type(error).__name__}: {error}); it takes the placeholders "
                "{context_str} and {num_questions_per_chunk}, and other braces must be doubled",
            ) from None
        if probe not in filled:
            raise ArgumentError(
                "qa_generate_prompt_tmpl", "has no {context_str}, the place of the node's text"
            )
        self._instruction = question_key(self._fill("", 2))

    def prompts(self, text: str, count: int) -> Iterator[Prompt]:
        """Yield the one prompt."""
        yield self._fill(text, count)

    def read(self, answer: str, text: str) -> list[str]:
        """Return the questions that the answer holds, without any that the instruction holds."""
        questions = parse_questions(answer)
        return [q for q in questions if question_key(q) not in self._instruction]

    def _fill(self, text: str, count: int) -> str:
        return str(self._template.format(context_str=text, num_questions_per_chunk=count))


EXAMPLES = (
    ("Adults pay eight euros to enter the museum.", "How much do adults pay to enter the museum?"),
    (
        "The angle of the waggle dance tells other honey bees the direction of the flowers.",
        "What does the angle of the waggle dance tell other honey bees?",
    ),
    (
        "The customer sends the receipt and a photograph to the service desk.",
        "Where does the customer send the receipt and the photograph?",
    ),
    (
        "In winter the night train to Lisbon does not run because snow blocks the pass.",
        "Why does the night train to Lisbon not run in winter?",
    ),
    ("Only a certified welder may repair the boiler.", "Who may repair the boiler?"),
    (
        "The library keeps returned books for two days before they go back to the shelves.",
        "How long does the library keep returned books before they go back to the shelves?",
    ),
)
"""Sentences with a question each, which `SmallStyle` shows as earlier turns of the talk."""

_TASK = "Turn each sentence into a question that it answers."
_POINTING = re.compile(r"(?:it|they|this|these|those|he|she|that|such|however|otherwise)\b", re.I)
_WORD = re.compile(r"\w[\w\-]*\w|\w")
# Words that questions are built of, whatever they are about.
_SCAFFOLDING_TEXT = """
    a about above after all also am amount an and any are as at be been before below best between
    by can could describe did difference do does done during each for from had has have having how
    if in include into is it its kind list long main many may maximum mean minimum more most much
    must name names not number of on one only or other over people person process purpose should
    than that the their them there these they thing things this those to two type under use used
    using was way were what when where which while who whom whose why will with would you your
"""
_SCAFFOLDING = frozenset(_SCAFFOLDING_TEXT.split())


class SmallStyle:
    """Few-shot, one question a call, about one sentence of the text.

    Sentences with the most to ask about come first, and each call shows another one, with
    the examples in another order, so that greedy decoding gives different questions too. At
    most `3 * count + 2` calls are made for a text.

    Args:
        seed: decides the order of the examples.
    """

    name = "small"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def prompts(self, text: str, count: int) -> Iterator[Prompt]:
        """Yield conversations in which the next turn is to be a question."""
        sentences = _focus(text)
        for call in range(3 * count + 2):
            sentence = sentences[call % len(sentences)]
            order = random.Random(f"{self._seed} {call} {sentence}")
            turns = [("system", _TASK)]
            for example, question in order.sample(EXAMPLES, len(EXAMPLES)):
                turns += [("user", example), ("assistant", question)]
            yield [*turns, ("user", sentence)]

    def read(self, answer: str, text: str) -> list[str]:
        """Return the first line of the answer if it is a usable question about the text."""
        line = next((line for line in answer.splitlines() if line.strip()), "")
        return [question for question in parse_questions(line, 1) if usable(question, text)]


def usable(question: str, text: str) -> bool:
    """Say whether a small model's question can be one about the text.

    - It is one question of 4 to 40 words that ends in a question mark.
    - At least half of its content words (all words but those that any question is built
      of), and at least one, stand in the text, and none comes from the examples.
    - It is no sentence of the text made a question by a word and a mark: more than seven
      words that follow each other in the text are at most half of it.
    """
    words = _WORD.findall(question.casefold())
    text_words = _WORD.findall(text.casefold())
    one = ends_as_question(question) and len(parse_questions(question.replace("?", "?\n"))) == 1
    if not one or not 4 <= len(question.split()) <= 40:
        return False
    stems = {_stem(word) for word in text_words}
    content = [_stem(word) for word in words if word not in _SCAFFOLDING]
    shared = [word for word in content if word in stems]
    if not shared or 2 * len(shared) < len(content):
        return False
    if any(word in _EXAMPLE_STEMS and word not in stems for word in content):
        return False
    run = _longest_run(words, text_words)
    return run <= 7 or 2 * run <= len(words)


def _longest_run(words: list[str], text_words: list[str]) -> int:
    """Return how many words that follow each other in the text do so in the question."""
    matcher = difflib.SequenceMatcher(None, text_words, words, autojunk=False)
    return matcher.find_longest_match().size


def _focus(text: str) -> list[str]:
    """Return the sentences of a text, those with the most to ask about first."""
    sentences = [" ".join(part.split()) for part in split_sentences(text)]
    sentences = [sentence for sentence in sentences if len(sentence.split()) >= 4]

    def worth(sentence: str) -> tuple[bool, int]:
        content = {w for w in _WORD.findall(sentence.casefold()) if w not in _SCAFFOLDING}
        return _POINTING.match(sentence) is None, min(len(content), 15)

    # Sorting is stable: equal sentences stay in the order of the text.
    return sorted(sentences, key=worth, reverse=True) or [" ".join(text.split())]


def _stem(word: str) -> str:
    """Cut the endings of English inflection, roughly: enough to match words to words."""
    for ending in ("ies", "ing", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


_EXAMPLE_STEMS = frozenset(
    _stem(word)
    for pair in EXAMPLES
    for word in _WORD.findall(" ".join(pair).casefold())
    if word not in _SCAFFOLDING
)
