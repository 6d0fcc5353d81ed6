"""Whether what a model learns from holds questions that it is tested on."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from semalign.benchmarks.files import Row
from semalign.benchmarks.registry import benchmark, wrap
from semalign.lm.examples import TaskData


def contamination(
    train: Sequence[str], test: Sequence[str], n: int = 13, share: float = 0.5
) -> list[tuple[int, int, float]]:
    """(train index, test index, share) where at least ``share`` of the shorter text's ``n``-grams are in both texts.

    Words are lower-case runs of letters and digits; a text of fewer than ``n`` words is one gram. Grams of more than
    ten test texts are boilerplate and do not count. Give questions, not prompts: a template is shared by all.
    """
    test_grams = [_grams(text, n) for text in test]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)  # a gram: the test texts that hold it
    for j, grams in enumerate(test_grams):
        for gram in grams:
            holders[gram].append(j)
    pairs = []
    for i, text in enumerate(train):
        grams = _grams(text, n)
        common = Counter(j for gram in grams for j in holders.get(gram, ()) if len(holders[gram]) <= 10)
        pairs += [(i, j, c / min(len(grams), len(test_grams[j]))) for j, c in common.items()]
    return sorted(pair for pair in pairs if pair[2] >= share)


def overlap(data: TaskData, items: Sequence[Row]) -> list[tuple[int, int, float]]:
    """:func:`contamination` of what ``data`` lets a model learn from (train, align, extract) with test ``items``."""
    learned = [compared_text(example.prompt) for example in (*data.train, *data.align, *data.extract)]
    user = benchmark(data.name).user
    return contamination(learned, [compared_text(wrap(user(row))) for row in items])


def compared_text(prompt: str) -> str:
    """What :func:`contamination` compares: a prompt without its wrapper, its template's first line and its choices."""
    inner = prompt.removeprefix("<|user|>\n").removesuffix("\n\n<|assistant|>\n")
    return inner.split("\n\n", 1)[-1].split("\nA. ", 1)[0]


def _grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))} if words else set()
