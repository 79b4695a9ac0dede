"""The words by which models mark questions, answers and small talk, in many languages.

Data for `ft_core.generation.parsing`. What a language lacks here costs little: a line that
ends in a question mark is a question whatever stands before it.
"""

from __future__ import annotations

QUESTION_LABELS = (
    *("question", "query", "q", "pregunta", "frage", "domanda", "pergunta", "questão", "vraag"),
    *("fråga", "spørgsmål", "pytanie", "otázka", "soru", "вопрос", "питання", "سؤال", "السؤال"),
    *("प्रश्न", "问题", "問題", "質問", "问", "問", "질문"),
)
"""Before a colon or a number: "Question 1:", "Q2."."""

ANSWER_LABELS = (
    *("answer", "answers", "answer key", "ans", "a", "explanation", "rationale", "reasoning"),
    *("justification", "option", "options", "hint", "note", "source", "reference", "topic"),
    *("difficulty", "respuesta", "respuestas", "explicación", "réponse", "réponses", "antwort"),
    *("antworten", "risposta", "resposta", "antwoord", "svar", "odpowiedź", "ответ", "الإجابة"),
    *(
        "إجابة",
        "الجواب",
        "جواب",
        "उत्तर",
        "答案",
        "答",
        "回答",
        "解析",
        "解答",
        "정답",
        "답변",
        "답",
    ),
)
"""Before a colon: what follows is no question."""

ANSWER_ADJECTIVES = ("correct", "expected", "sample", "suggested", "short", "model", "the")

IMPERATIVES = (
    *("describe", "explain", "discuss", "list", "name", "identify", "compare", "contrast"),
    *("calculate", "compute", "define", "summarize", "summarise", "outline", "state", "analyze"),
    *("analyse", "evaluate", "assess", "give", "provide", "illustrate", "justify", "distinguish"),
    *("differentiate", "determine", "estimate", "interpret", "what", "which", "who", "whose"),
    *("when", "where", "why", "how", "décrivez", "décris", "expliquez", "explique", "nommez"),
    *("citez", "comparez", "définissez", "beschreiben", "beschreibe", "erklären", "erkläre"),
    *("erläutern", "erläutere", "nennen", "nenne", "vergleichen", "vergleiche", "defina"),
    *("describa", "describe", "defina", "menciona", "mencione", "enumere", "enumera", "analiza"),
    *("analice", "indique", "descrivi", "spiega", "descreva", "cite", "beschrijf", "noem"),
)
"""First words of an examination's prompts that end in no question mark."""

CJK_OPENINGS = ("请", "請", "简述", "簡述", "说明", "說明", "解释", "描述", "列出", "比较", "分析")
CJK_ENDINGS = (
    *("吗", "呢", "什么", "什麼", "ですか", "ますか", "でしょうか", "なぜか", "何か", "ください"),
    *("까", "십시오", "세요", "인가"),
)
"""First and last words of questions in scripts where the mark is often left out."""

PREFACES = (
    r"(?:sure|certainly|of course|okay|ok|absolutely|great)\s*[!,.:]",
    r"here (?:are|is|'s)\b[^:?]{0,80}:",
    r"(?:hier (?:sind|ist)|voici|aquí (?:están|tienes)|ecco)\b[^:?]{0,80}:",
)
"""Patterns of a remark before a question on the same line."""

CHATTER = (
    r"\bwould you (?:like|prefer|care)",
    r"\bdo you (?:want|need|have any)",
    r"\b(?:shall|should) i\b",
    r"\b(?:how|what) (?:can|may|could|else can) i (?:help|assist|do)",
    r"\bwhat would you like",
    r"\b(?:can|may|could) i (?:help|assist)",
    r"\b(?:could|can|would) you (?:please )?(?:provide|share|clarify|paste|specify)",
    r"\b(?:could|can|would) you (?:please )?(?:tell|give) me",
    r"\banything else\b",
    r"\b(?:is that|are these) (?:ok|okay|correct|what)\b",
    r"\bdoes (?:that|this) help\b",
    r"en qué puedo",
    r"puedo ayudar",
    r"te gustaría",
    r"möchten sie",
    r"kann ich (?:ihnen|dir)",
    r"puis-je vous",
    r"(?:souhaitez|voulez)-vous que",
    *("还有什么", "需要我", "我可以帮", "お手伝い"),
)
"""Patterns of what an assistant asks its user, which is no question about the text."""
