"""Questions about a harbour with a good and a bad answer each, and a teacher that knows which."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ft_core.datasets import JudgeDataset

ANSWERS = {
    "When does the harbour office open?": ("At seven, every day but Sunday.", "Offices open."),
    "Where is fuel sold?": ("At the north quay, beside the crane.", "Fuel is sold where it is."),
    "What does a night at the pier cost?": ("Twelve crowns for each metre.", "It costs money."),
    "Who lifts boats out of the water?": ("The yard, with its crane, on Mondays.", "Strong men."),
    "How deep is the inner basin?": ("Three metres at low water.", "The basin holds water."),
    "May dogs come to the beach?": ("On a lead, and not from May to August.", "Dogs like it."),
    "Which channel does the lock listen to?": ("Channel 11, on VHF.", "It listens well."),
    "Where are the showers?": ("Behind the sail loft; take a token.", "Showers are wet."),
    "When is the last ferry?": ("At ten past eleven, from pier two.", "The last one is last."),
    "How is waste oil handed in?": ("In closed cans, at the yard.", "Oil should not be wasted."),
    "What is the speed limit inside?": ("Three knots, past the red buoy.", "Not too fast."),
    "Who has the key to the slipway?": ("The harbour master, for a deposit.", "Whoever has it."),
    "Can a mast be stored in winter?": (
        "Yes, in the long shed, until April.",
        "In winter it snows.",
    ),
    "Where does the bus to town stop?": ("At the church, twice an hour.", "Buses stop often."),
    "How are guests to moor?": ("Bow first, with a line to the buoy.", "With their boats."),
    "What light marks the mole?": ("A green one, two flashes in six seconds.", "A bright one."),
}
HELD_OUT = {
    "When does the chandlery close?": ("At six, on Saturdays at two.", "When it is closed."),
    "Where is drinking water?": ("At each tap that is painted blue.", "Water is everywhere."),
    "How many berths are for guests?": ("Fourteen, along the outer pier.", "Some are."),
    "Who tows a boat that broke down?": ("The pilot boat; call channel 16.", "Somebody will."),
}
GOOD = {good for good, _ in (ANSWERS | HELD_OUT).values()}

_SHOWN = re.compile(r"Start of Assistant [AB].s Answer\]\n(.*?)\n\[The End", re.DOTALL)


def write_answers(folder: Path) -> None:
    """Write what the README of ft-judge reads.

    `pairs.jsonl` has pairs that nobody has judged, `held-out.jsonl` pairs with a person's
    verdict, `arena.jsonl` verdicts in a form of their own, and `grades.jsonl` scored answers.
    """
    _save(folder / "pairs.jsonl", map(_pair, range(len(ANSWERS)), ANSWERS.items()))
    judged = (
        _pair(number, item) | {"human": float(number % 2 == 0)}
        for number, item in enumerate(HELD_OUT.items())
    )
    _save(folder / "held-out.jsonl", judged)
    rows = [
        {
            "question": question,
            "answers": [{"text": good}, {"text": bad}],
            "winner": "model_a",
            "winner_swapped": "tie" if number == 3 else "model_a",
        }
        for number, (question, (good, bad)) in enumerate(ANSWERS.items())
    ]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "arena.jsonl").write_text(text, encoding="utf-8")
    grades = (
        {"task": "correctness", "query": question, "answer": answer, "score": score}
        for question, answers in ANSWERS.items()
        for answer, score in zip(answers, (5.0, 2.0), strict=True)
    )
    _save(folder / "grades.jsonl", grades)


def harbour_teacher(messages: list[dict[str, Any]], body: dict[str, Any]) -> dict[str, Any]:
    """Compare two answers as LlamaIndex's evaluator asks; a platform's `teacher`."""
    content = messages[-1]["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    first, second = _SHOWN.findall(text)
    mark = "[[C]]" if (first in GOOD) == (second in GOOD) else f"[[{'AB'[second in GOOD]}]]"
    return {"content": f"One answer says what was asked. {mark}"}


def _pair(number: int, item: tuple[str, tuple[str, str]]) -> dict[str, Any]:
    question, (good, bad) = item
    answers = (good, bad) if number % 2 == 0 else (bad, good)
    content = dict(zip(("answer", "second_answer"), answers, strict=True))
    return {"task": "pairwise", "query": question, **content}


def _save(path: Path, examples: Any) -> None:
    JudgeDataset.coerce(list(examples)).save(path)
