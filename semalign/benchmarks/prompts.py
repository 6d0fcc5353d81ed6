"""What each benchmark asks. Every prompt is zero-shot.

``paper``: LaTen's chat wrapper and the user turns of its training data, which are Open-Instruct's (arXiv 2306.04751),
and the beginning of the answer. For HumanEval this opens a code block and leaves the whole function to the model; with
Open-Instruct's bare opening and Codex's stop strings a chat model is stopped at its first ``def``.
``chat``: the same turns in the tokenizer's own chat template. ``harness``: lm-evaluation-harness's prompts, which are
written out in ``tasks/``, as are all stop strings.
"""

from __future__ import annotations

from typing import Any

LETTERS = "ABCD"
CODE = "Here is the completed function:\n\n\n```python\n"
PREFIX = {"mmlu": "The answer is:", "gsm8k": "Answer:", "humaneval": CODE, "mbpp": CODE}
"""How the answer begins: the model goes on from here."""


def wrap(user: str) -> str:
    """The prompt that puts ``user`` into LaTen's chat wrapper; the answer follows it."""
    return f"<|user|>\n{user}\n\n<|assistant|>\n"


def user_turn(task: str, row: dict[str, Any], *, cloze: bool = False) -> str:
    """The question as the user asks it; ``cloze`` leaves MMLU's choices out."""
    if task == "mmlu":
        about = f"The following are multiple choice questions (with answers) about {row['subject'].replace('_', ' ')}."
        choices = "" if cloze else "".join(f"\n{a}. {c}" for a, c in zip(LETTERS, row["choices"], strict=True))
        return f"{about}\n\n{row['question'].strip()}{choices}\nAnswer:"
    if task == "gsm8k":
        return f"Answer the following question.\n\nQuestion: {row['question'].strip()}"
    # MBPP shows the reference solution up to its first colon, which is the signature
    shown = row["prompt"] if task == "humaneval" else f"{row['text']}\n{row['code'].split(':')[0]}"
    return f"Complete the following python function.\n\n\n{shown}"


def prompts(task: str, row: dict[str, Any]) -> dict[str, str]:
    """The columns that the task definitions name: ``user``, ``paper`` and ``paper_cloze``."""
    asked = {"user": user_turn(task, row)}
    for name, cloze in (("paper", False), ("paper_cloze", True)):
        asked[name] = wrap(user_turn(task, row, cloze=cloze)) + PREFIX[task]
    return asked
