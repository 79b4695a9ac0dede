"""Read the questions out of what a language model answered.

Models number, bullet, quote and embolden questions, put headings and remarks around them,
add answers and multiple-choice options, answer in JSON, wrap lines, refuse, or chat.
`parse_questions` keeps the questions and drops the rest, in any script.
"""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from ft_core.generation import wording

# Question marks: Latin, full-width, Arabic, Greek (U+037E), Armenian, Ethiopic, and doubled ones.
_MARKS = "?\uff1f\u061f\u037e\u055e\u1367\u2047\u2048\u203d"
_CLOSERS = "\"'\u201d\u2019\u00bb\u300d\u300f\u201c)]*_`"
_QUOTES = (
    *(('"', '"'), ("'", "'"), ("\u201c", "\u201d"), ("\u2018", "\u2019"), ("\u00ab", "\u00bb")),
    *(("\u300c", "\u300d"), ("\u300e", "\u300f"), ("(", ")")),
)
_COLON = "[:\uff1a]"
_DIGITS = "[\\d\u0660-\u0669\u06f0-\u06f9]{1,3}"
_MAX_LENGTH = 600  # characters; what is longer is no question but a model that ran away


def _any(words: Iterable[str]) -> str:
    """Return a pattern for any of the words, the longest first."""
    return "(?:" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


_THINKING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.S | re.I)
_FENCE = re.compile(r"^\s*(?:```|~~~)\w*\s*$", re.M)
# "1.", "2)", "(3)", "[4]", "5:", "6 -", circled and keycap digits; not "1.5 m" or "2019 was".
_NUMBER = re.compile(
    rf"(?:\(\s*{_DIGITS}\s*\)|\[\s*{_DIGITS}\s*\]"
    rf"|{_DIGITS}\s*[.):\u3001\uff0e\uff09\uff1a](?!\d)|{_DIGITS}\s*[-\u2013\u2014]\s"
    r"|[\u2460-\u2473]|\d\ufe0f?\u20e3)\s*"
)
# "Q:", "Q1.", "Question 2 -", "**Question 3**", and a bare "Question 4" on its own line.
_LABEL = re.compile(
    rf"{_any(wording.QUESTION_LABELS)}\s*"
    rf"(?:(?:#\s*)?{_DIGITS}\s*(?:\([^)]{{1,30}}\)\s*)?(?:[.:)\-\u2013\u2014\uff1a\u3001]|(?=\*\*)|$)"
    rf"|{_COLON}|$)\s*",
    re.I,
)
_BULLET = re.compile(
    r"(?:[-*+\u2013\u2014\u27a4\u2192\u00b7]+\s+|[\u2022\u2023\u25aa\u25b8\u25ba\u25cf\u25e6]\s*)"
)
# "A)", "(b)", "c.", "ii)" and the first letters of Cyrillic and Arabic.
_OPTION = re.compile(
    r"\(?(?:[A-Ha-h\u0410-\u0413\u0430-\u0433\u0623\u0628\u062c\u062f]\s*[.):\uff0e\uff09\u3001]"
    r"|(?:i{1,3}|iv)[.)])\s*(?=\S)"
)
_ANSWER = re.compile(
    rf"(?:{_any(wording.ANSWER_ADJECTIVES)}\s+)*{_any(wording.ANSWER_LABELS)}\s*\d{{0,3}}\s*{_COLON}",
    re.I,
)
_HEADING = re.compile(r"#{1,6}\s+")
_EMPHASIS = re.compile(r"\*\*|__|(?<!\w)[*_](?=\S)|(?<=\S)[*_](?!\w)|`")
# "**Leak detection:**", "(Easy)", "[Factual]" before a question.
_TOPIC = re.compile(r"^\*\*[^*?]{1,60}(?::\s*\*\*|\*\*\s*[:\u2013\u2014-])\s*(?=\S)")
_TAG = re.compile(r"^(?:\([^()?]{1,30}\)|\[[^\[\]?]{1,30}\])\s*[:.\-]?\s*(?=\S)")
_PREFACE = re.compile(rf"^(?:(?:{'|'.join(wording.PREFACES)})\s*)+(?=\S)", re.I)
# "(2 points)", "[5 marks]", "(Page 3)" after a question.
_NOTE = re.compile(rf"(?<=[{_MARKS}])[\s*_\"'\u201d]*(?:\([^()]*\)|\[[^\[\]]*\])[\s.*_]*$")
# Two questions on one line: "1. What is X? 2. What is Y?"
_SEAM = re.compile(
    rf"(?<=[{_MARKS}])([\"'\u201d*_]*)[ \t]*(?=\(?\d{{1,2}}[.)\u3001\uff0e\uff09]\s*[^\d\s]"
    r"|(?:Q|Question)\s*\d{1,2}\s*[:.)]|[\u2460-\u2473])"
)
_IMPERATIVE = re.compile(rf"{_any(wording.IMPERATIVES)}\b", re.I)
_CJK_PROMPT = re.compile(rf"^{_any(wording.CJK_OPENINGS)}|{_any(wording.CJK_ENDINGS)}[.\u3002]?$")
_CHATTER = re.compile("|".join(wording.CHATTER), re.I)
_JSON_KEYS = ("question", "query", "q", "text", "questions", "queries", "items", "data")


def parse_questions(answer: str, limit: int | None = None) -> list[str]:
    """Return the questions in a model's answer, in order, at most `limit` of them.

    Questions that are equal but for case, spacing and punctuation count once. An answer
    that holds none (a refusal, prose, nothing at all) gives an empty list.
    """
    answer = _FENCE.sub("", _THINKING.sub("", answer)).strip()
    found = _from_json(answer)
    if found is None:
        candidates = _from_lines(answer)
    else:
        candidates = (question for text in found for question in _finish(text, is_item=True))
    questions: dict[str, str] = {}
    for question in candidates:
        if _plausible(question):
            questions.setdefault(question_key(question), question)
    return list(questions.values())[:limit]


def question_key(question: str) -> str:
    """Return what two spellings of one question have in common: neither case nor punctuation."""
    folded = unicodedata.normalize("NFKC", question).casefold()
    kept = (
        char if char in "#%&@*/" or unicodedata.category(char)[0] in "LNMS" else " "
        for char in folded
    )
    return " ".join("".join(kept).split())


def ends_as_question(text: str) -> bool:
    """Say whether a text ends in a question mark of any script, closing quotes aside."""
    text = text.rstrip(_CLOSERS + "! \t")
    return bool(text) and text[-1] in _MARKS


def _from_json(answer: str) -> list[str] | None:
    """Return the strings of a JSON or Python list, of an object with questions, or None."""
    start = min((i for i in (answer.find("["), answer.find("{")) if i >= 0), default=-1)
    end = max(answer.rfind("]"), answer.rfind("}"))
    if start < 0 or end <= start:
        return None
    text = answer[start : end + 1]
    for read in (json.loads, ast.literal_eval):
        try:
            found = list(_strings(read(text)))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return found or None
    return None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        keys = {str(key).lower(): item for key, item in value.items()}
        named = [keys[key] for key in _JSON_KEYS if key in keys]
        if named:
            yield from _strings(named[0])
        else:  # {"question_1": ..., "question_2": ...}, {"1": ..., "2": ...}
            for key, item in keys.items():
                if not _ANSWER.match(key + ":"):
                    yield from _strings(item)


def _from_lines(answer: str) -> Iterator[str]:
    """Yield the questions of an answer in lines, joining those that were wrapped."""
    open_item = ""  # the text of an item whose end has not come yet
    is_item = False  # whether it began with a number, a label or a bullet
    in_answer = False
    for line in [*_lines(answer), ""]:
        text, marked = _unmark(line)
        if marked or not text:
            # A bare "Question 1:" waits for its text, over blank lines too.
            if not marked and is_item and not open_item:
                continue
            yield from _finish(open_item, is_item)
            open_item, is_item = text, marked
            in_answer = False
        elif _ANSWER.match(text):
            yield from _finish(open_item, is_item)
            open_item, is_item, in_answer = "", False, True
        elif _OPTION.match(text) and not ends_as_question(text):
            yield from _finish(open_item, is_item)
            open_item, is_item = "", False
        elif in_answer:
            continue
        elif open_item and not _closed(open_item):
            open_item = f"{open_item} {text}"
        elif is_item and not open_item:
            open_item = text
        else:
            yield from _finish(open_item, is_item)
            open_item, is_item = _OPTION.sub("", text) if ends_as_question(text) else text, False
        if marked and _ANSWER.match(open_item):
            open_item, is_item, in_answer = "", False, True
    yield from _finish(open_item, is_item)


def _lines(answer: str) -> Iterator[str]:
    """Yield the lines of an answer, those of JSON and of tables as list items."""
    for line in _SEAM.sub(r"\1\n", answer).splitlines():
        line = " ".join(line.split())
        if line[:1] in ("{", "[") and '"' in line:  # JSON lines, or an array that was cut short
            found = _from_json(line[line.find("{") :] if "{" in line else line + "]")
            if found is not None:
                yield from (f"- {question}" for question in found)
                continue
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            yield from (f"- {cell}" for cell in cells if ends_as_question(cell))
        elif line.startswith('"') and line.endswith('",'):
            yield f"- {line[1:-2]}"
        elif line not in ("[", "]", "{", "}"):
            yield line


def _unmark(line: str) -> tuple[str, bool]:
    """Return a line without numbering, label, bullet and heading, and whether it had one."""
    text, marked = line.lstrip("> ").strip(), False
    while True:
        heading = _HEADING.match(text)
        if heading:
            text = text[heading.end() :]
        bare = text.lstrip("*_\"'\u201c\u00ab ")  # "**1. What is it?**"
        bullet = _BULLET.match(text)
        label = bullet or _NUMBER.match(bare) or _LABEL.match(bare)
        if not label:
            break
        text, marked = (text if bullet else bare)[label.end() :].strip(), True
        if text.count("**") % 2 and not bullet:  # what opened before the label closes after it
            text = re.sub(r"^\*\*[:.]?\s*", "", text)
    if marked:
        text = _TAG.sub("", _TOPIC.sub("", text))
    return text, marked


def _finish(text: str, is_item: bool) -> Iterator[str]:
    """Yield the question that a finished line holds, if it holds one."""
    if not text or _ANSWER.match(text):
        return
    question = _strip(_cut_rest(text, is_item))
    asks = is_item and (_IMPERATIVE.match(question) or _CJK_PROMPT.search(question))
    if asks or ends_as_question(question):
        yield question


def _cut_rest(text: str, is_item: bool) -> str:
    """Cut notes, options and answers that stand after the question mark on the same line."""
    text = _NOTE.sub("", text)
    if ends_as_question(text):
        return text
    last = max(text.rfind(mark) for mark in _MARKS)
    if last < 0:
        return text
    rest = text[last + 1 :].lstrip(_CLOSERS + " ([-\u2013\u2014:*_")
    if is_item or _ANSWER.match(rest) or _OPTION.match(rest):
        first = min(text.find(mark) for mark in _MARKS if mark in text)
        tail = text[first + 1 :].lstrip(_CLOSERS + " ([-\u2013\u2014:*_")
        return text[: (first if _ANSWER.match(tail) or _OPTION.match(tail) else last) + 1]
    return text


def _strip(text: str) -> str:
    """Return a question without emphasis, quotes, numbering left over, and odd spacing."""
    text = _EMPHASIS.sub("", text)
    text = " ".join(text.split()).strip(" ,;")
    text, _ = _unmark(text)
    for left, right in _QUOTES:
        if text.startswith(left) and text.endswith(right):
            text = text[1:-1].strip()
    return _PREFACE.sub("", text)


def _closed(text: str) -> bool:
    text = text.rstrip(_CLOSERS + " ")
    return bool(text) and text[-1] in _MARKS + ".!:\u3002\uff01\uff1a\u2026\u0964"


def _plausible(question: str) -> bool:
    if len(question) > _MAX_LENGTH or _CHATTER.search(question):
        return False
    letters = [char for char in question if char.isalpha()]
    if any(ord(char) > 0x2E7F for char in letters):  # scripts that put no space between words
        return len(letters) >= 4
    return len(question.split()) >= 3 or len(letters) >= 12
