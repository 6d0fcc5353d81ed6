"""What each benchmark asks. Every prompt is zero-shot.

``paper``: LaTen's chat wrapper and the user turns of its training data, which are Open-Instruct's (arXiv 2306.04751),
and the beginning of the answer. For HumanEval this opens a code block and leaves the whole function to the model; with
Open-Instruct's bare opening and Codex's stop strings a chat model is stopped at its first ``def``.
``chat``: the same turns in the tokenizer's own chat template. ``harness``: lm-evaluation-harness's prompts.
"""

from __future__ import annotations

from typing import Any

LETTERS = "ABCD"
MMLU = "The answer is:"
GSM8K = "Answer:"
CODE = "Here is the completed function:\n\n\n```python\n"
PREFIX = {"mmlu": MMLU, "gsm8k": GSM8K, "humaneval": CODE, "mbpp": CODE}


def wrap(user: str) -> str:
    """The prompt that puts ``user`` into LaTen's chat wrapper; the answer follows it."""
    return f"<|user|>\n{user}\n\n<|assistant|>\n"


def mmlu_user(doc: dict[str, Any]) -> str:
    """Topic, question and lettered choices."""
    lines = [doc["question"].strip(), *(f"{a}. {c}" for a, c in zip(LETTERS, doc["choices"], strict=True)), "Answer:"]
    return _about(doc) + "\n".join(lines)


def mmlu_cloze_user(doc: dict[str, Any]) -> str:
    """Topic and question without the choices."""
    return f"{_about(doc)}{doc['question'].strip()}\nAnswer:"


def _about(doc: dict[str, Any]) -> str:
    return f"The following are multiple choice questions (with answers) about {doc['subject'].replace('_', ' ')}.\n\n"


def gsm8k_user(doc: dict[str, Any]) -> str:
    """The word problem."""
    return f"Answer the following question.\n\nQuestion: {doc['question'].strip()}"


def humaneval_user(doc: dict[str, Any]) -> str:
    """Signature and docstring."""
    return f"Complete the following python function.\n\n\n{doc['prompt']}"


def mbpp_user(doc: dict[str, Any]) -> str:
    """The sentence, and the reference solution up to its first colon."""
    return f"Complete the following python function.\n\n\n{doc['text']}\n{doc['code'].split(':')[0]}"


USER = {"mmlu": mmlu_user, "gsm8k": gsm8k_user, "humaneval": humaneval_user, "mbpp": mbpp_user}


def mmlu_paper(doc: dict[str, Any]) -> str:
    """MMLU by letters."""
    return wrap(mmlu_user(doc)) + MMLU


def mmlu_paper_cloze(doc: dict[str, Any]) -> str:
    """MMLU by the likelihood of each choice's text."""
    return wrap(mmlu_cloze_user(doc)) + MMLU


def gsm8k_paper(doc: dict[str, Any]) -> str:
    """GSM8K."""
    return wrap(gsm8k_user(doc)) + GSM8K


def humaneval_paper(doc: dict[str, Any]) -> str:
    """HumanEval."""
    return wrap(humaneval_user(doc)) + CODE


def mbpp_paper(doc: dict[str, Any]) -> str:
    """MBPP."""
    return wrap(mbpp_user(doc)) + CODE


def mbpp_harness(doc: dict[str, Any]) -> str:
    """MBPP with its first three tests in view."""
    tests = "\n".join(doc["test_list"][:3])
    return (
        f"You are an expert Python programmer, and here is your task: {doc['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )
