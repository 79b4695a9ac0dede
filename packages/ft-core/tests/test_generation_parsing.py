# ruff: noqa: RUF001 - the look-alikes of other scripts are what is tested
import pytest

from ft_core.generation.parsing import parse_questions, question_key

X, Y = "What is the correlator used for?", "How is the pressure measured?"

LAYOUTS = {
    "numbered": f"1. {X}\n2. {Y}",
    "parenthesis": f"1) {X}\n2) {Y}",
    "both parentheses": f"(1) {X}\n(2) {Y}",
    "colon": f"1: {X}\n2: {Y}",
    "keycaps": f"1\ufe0f\u20e3 {X}\n2\ufe0f\u20e3 {Y}",
    "circled": f"\u2460 {X}\n\u2461 {Y}",
    "plain lines": f"{X}\n{Y}",
    "blank lines": f"\n\n{X}\n\n\n{Y}\n\n",
    "windows line ends": f"1. {X}\r\n2. {Y}\r\n",
    "q labels": f"Q1: {X}\nQ2: {Y}",
    "question labels": f"Question 1: {X}\n\nQuestion 2: {Y}",
    "bold labels": f"**Question 1:** {X}\n**Question 2:** {Y}",
    "bold labels, colon outside": f"**Question 1**: {X}\n**Question 2**: {Y}",
    "headings": f"### Question 1\n{X}\n\n### Question 2\n\n{Y}",
    "heading and list": f"## Quiz questions\n\n1. {X}\n2. {Y}",
    "title underlined": f"Quiz on leaks\n=============\n1. {X}\n---\n2. {Y}",
    "dashes": f"- {X}\n- {Y}",
    "stars": f"* {X}\n* {Y}",
    "dots": f"\u2022 {X}\n\u2022 {Y}",
    "quoted block": f"> {X}\n> {Y}",
    "bold": f"**1. {X}**\n\n**2. {Y}**",
    "italics": f"1) **{X}**\n2) *{Y}*",
    "announced": f"Here are two questions:\n\n1. {X}\n2. {Y}",
    "announced on the line": f"Sure! Here are the questions: {X}\n{Y}",
    "small talk after": f"1. {X}\n2. {Y}\n\nLet me know if you would like more questions!",
    "question to the user after": f"1. {X}\n2. {Y}\n\nWould you like me to write more questions?",
    "double quotes": f'"{X}"\n"{Y}"',
    "typographic quotes": f"1. \u201c{X}\u201d\n2. \u201c{Y}\u201d",
    "json list": f'["{X}", "{Y}"]',
    "python list": f"['{X}', \"{Y}\"]",
    "json in a fence": f'```json\n[{{"question": "{X}", "answer": "Leaks?"}},\n'
    f'{{"question": "{Y}", "answer": "By a gauge."}}]\n```',
    "json object": f'{{"questions": ["{X}", "{Y}"]}}',
    "json keys": f'{{"question_1": "{X}", "question_2": "{Y}"}}',
    "json after prose": f'Here is the JSON you asked for:\n["{X}", "{Y}"]',
    "json lines": f'{{"question": "{X}", "answer": "a"}}\n{{"question": "{Y}", "answer": "b"}}',
    "json cut short": f'[\n  "{X}",\n  "{Y}",\n  "Why does the corr',
    "json objects cut short": f'[{{"question": "{X}", "answer": "a"}},\n'
    f'{{"question": "{Y}", "answer": "b"}},\n{{"question": "Why',
    "yaml": f"- question: {X}\n  answer: leaks\n- question: {Y}\n  answer: by a gauge",
    "table": f"| # | Question |\n|---|---|\n| 1 | {X} |\n| 2 | {Y} |",
    "wrapped": "1. What is the correlator\n   used for?\n2. How is the\npressure measured?",
    "wrapped, no numbers": "What is the correlator\nused for?\n\nHow is the pressure\nmeasured?",
    "one line": f"1. {X} 2. {Y}",
    "answers": f"1. {X}\nAnswer: For leaks.\n2. {Y}\n**Answer:** By a gauge. Is that clear now?",
    "q and a": f"Q: {X}\nA: For leaks.\n\nQ: {Y}\nA: By a gauge.",
    "numbered answers": f"Q1: {X}\nA1: For leaks.\nQ2: {Y}\nA2: By a gauge.",
    "answer on the line": f"1. {X} Answer: for leaks.\n2. {Y} It is measured by a gauge.",
    "answer in parentheses": f"1. {X} (Answer: leaks)\n2. {Y} (Answer: a gauge)",
    "options": f"1. {X}\n   A) leaks\n   B) tea\n   C) both\n2. {Y}\n a. a gauge\n b. by ear",
    "options on the line": f"1. {X} A) leaks B) tea C) both\n2. {Y} A. a gauge B. by ear",
    "marks": f"1. {X} (2 points)\n2. {Y} [5 marks]",
    "topics": f"1. **Leak detection:** {X}\n2. **Metrology** - {Y}",
    "difficulty": f"1. (Easy) {X}\n2. [Hard] {Y}",
    "letters": f"a) {X}\nb) {Y}",
    "repeated": f"1. {X}\n2. what is the correlator used for ?\n3. {Y}",
    "more than asked": f"1. {X}\n2. {Y}\n3. Who may use the correlator?\n4. When is it used?",
    "thinking": f"<think>What should I ask? Perhaps what it is used for?</think>\n{X}\n{Y}",
    "true or false between": f"1. {X}\n2. True or false: leaks are loud.\n3. {Y}",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_finds_both_questions_in_every_layout(layout):
    assert parse_questions(LAYOUTS[layout], 2) == [X, Y]


@pytest.mark.parametrize(
    ("answer", "questions"),
    [
        (
            "1. 该仪器的用途是什么？2. 如何测量管道的压力？",
            ["该仪器的用途是什么？", "如何测量管道的压力？"],
        ),
        ("问题1：该仪器的用途是什么？\n答案：检测泄漏。", ["该仪器的用途是什么？"]),
        ("1. この装置は何に使われますか。\n2. 圧力は？", ["この装置は何に使われますか。"]),
        ("1. 압력은 어떻게 측정됩니까?", ["압력은 어떻게 측정됩니까?"]),
        (
            "١. ما هو استخدام هذا الجهاز؟\n٢. كيف يقاس الضغط؟",
            ["ما هو استخدام هذا الجهاز؟", "كيف يقاس الضغط؟"],
        ),
        (
            "1. ¿Para qué se usa el correlador?\nRespuesta: para fugas.",
            ["¿Para qué se usa el correlador?"],
        ),
        ("Вопрос 1: Для чего нужен прибор?\nОтвет: для поиска.", ["Для чего нужен прибор?"]),
        (
            "Frage 1: Wozu dient der Korrelator?\nAntwort: Für Lecks.",
            ["Wozu dient der Korrelator?"],
        ),
        ("1. À quoi sert le corrélateur ?", ["À quoi sert le corrélateur ?"]),
        ("1. Σε τι χρησιμεύει η συσκευή\u037e", ["Σε τι χρησιμεύει η συσκευή\u037e"]),
    ],
)
def test_reads_other_languages_and_scripts(answer, questions):
    assert parse_questions(answer) == questions


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "   \n\n ",
        "I'm ready to assist you with your studies. What would you like to know?",
        "I'm sorry, but I can't help with that.",
        "As an AI language model I cannot write questions. Could you please provide the text?",
        "The correlator is used on iron mains. It compares two sensors.",
        "1. The company reported revenue.\n2. It grew by 10 %.",
        '["The company reported revenue.", "It grew by 10 %."]',
        "Here are two questions:",
        "Why?",
        "??? ?",
        "[1] [2] {3}",
        "{" * 5000,
        "[" * 5000,
        "<think>What could I ask about it? Something",
        "A) leaks\nB) tea",
        "该仪器用于检测泄漏。",
    ],
)
def test_finds_none_in_prose_refusals_and_nothing(answer):
    assert parse_questions(answer) == []


@pytest.mark.parametrize(
    "question",
    [
        "In 2019, what was the revenue of 1.5 million used for?",
        "How does the U.S. define a leak?",
        "What is the value of f(x) * g(y) and of 2 * 3?",
        'What is meant by "step test" (section 4)?',
        "What does snake_case_name stand for?",
        "A valve is stuck. Who may open it?",
    ],
)
def test_leaves_a_question_as_it_is(question):
    assert parse_questions(f"1. {question}") == [question]


def test_accepts_imperatives_only_as_items_of_a_list():
    assert parse_questions("1. Describe how a step test is done.\n2. Leaks are loud.") == [
        "Describe how a step test is done."
    ]
    assert parse_questions("Describe how a step test is done.") == []


def test_a_key_ignores_case_space_and_punctuation_and_no_more():
    assert question_key("What  is\u00a0X, really?") == question_key("what is x really ?")
    assert question_key("Is it above 1.5?") != question_key("Is it above 15?")
    assert question_key("What is C#?") != question_key("What is C?")
