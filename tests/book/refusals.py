"""What the package says where it refuses: every sentence, read from its source.

``python tests/book/refusals.py`` writes them into ``book/refusals.md``.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, PAGE = ROOT / "semalign", ROOT / "book" / "refusals.md"
ERRORS = {
    "ProfileError", "DataError", "SandboxError", "ModelUnavailable", "VocabularyMismatch", "NotebookFailed",
    "DivergedError", "ValueError", "RuntimeError", "OSError",
}  # fmt: skip
HOLE = "…"
"""Stands for what a sentence says of the case at hand."""
INSIDE = ("benchmarks/sandbox/plain.py", "benchmarks/sandbox/driver.py", "benchmarks/sandbox/tester.py")
"""What runs in a box, and speaks to the judge alone."""
CAUGHT = {"lm/files.py": ("its checksum differs",)}
"""Reasons that are caught where they are raised, and become a part of a sentence."""
PARTS = {
    "A profile": ("profiles.py",),
    "Before a run, and during it": (
        "planning/preflight.py", "planning/plan.py", "pipeline/__main__.py", "pipeline/forks.py", "pipeline/address.py",
        "pipeline/notebooks.py",
    ),
    "The book": ("pipeline/book.py", "pipeline/pages.py", "pipeline/printing.py", "pipeline/slides.py"),
    "Models": ("models.py", "packaged.py", "classroom/family.py", "lm/parts.py", "lm/hooks.py"),
    "Questions and examples": (
        "benchmarks/files.py", "benchmarks/data.py", "benchmarks/mmlu.py", "benchmarks/gsm8k.py",
        "benchmarks/humaneval.py", "benchmarks/mbpp.py", "benchmarks/registry.py", "benchmarks/__init__.py",
        "benchmarks/engine.py", "lm/examples.py", "lm/positions.py",
    ),
    "Programs of models": ("benchmarks/sandbox/__init__.py", "benchmarks/sandbox/judging.py"),
    "Training": (
        "attribution.py", "semantics.py", "pairing.py", "supervision.py", "alignment.py", "training/config.py",
        "training/loop.py", "methods/registry.py", "methods/laten.py", "methods/seeking.py", "methods/seq_kd.py",
        "methods/ted.py", "methods/fdd.py", "methods/on_policy.py", "methods/warm_up.py", "methods/across.py",
        "contributions.py", "methods/heads.py",
        "methods/interchange.py", "methods/version_two.py",
    ),
    "Results": (
        "report.py", "lm/files.py", "study/trials.py", "study/tuning.py", "study/kept.py", "study/search.py",
        "study/lenses.py",
    ),
}  # fmt: skip
"""The headings of the page, and whose sentences stand below each."""


def _combined(parts: list[list[str]]) -> list[str]:
    """The texts that parts make; where these are many, each wording of a part once, beside the first of the others."""
    whole = ["".join(some) for some in itertools.product(*parts)]
    if len(whole) <= 4:
        return whole
    first = [part[0] for part in parts]
    varied = ["".join([*first[:i], other, *first[i + 1 :]]) for i, part in enumerate(parts) for other in part]
    return list(dict.fromkeys(varied))


@dataclass(frozen=True)
class Refusal:
    """One sentence: where it is raised (below ``semalign``), by which error, and its text with holes."""

    file: str
    line: int
    error: str
    text: str


class _Reader:
    """The texts that an expression can have, as far as they stand in one file."""

    def __init__(self, tree: ast.Module) -> None:
        self.functions = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        self.constants = self._assigned(tree.body)

    @staticmethod
    def _assigned(body: list[ast.stmt]) -> dict[str, list[ast.expr]]:
        found: dict[str, list[ast.expr]] = {}
        for node in itertools.chain.from_iterable(ast.walk(statement) for statement in body):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found.setdefault(node.targets[0].id, []).append(node.value)
        return found

    def texts(self, node: ast.expr, inside: ast.FunctionDef | None, depth: int = 0) -> list[str]:
        """All texts of ``node``; what only a run knows is a hole."""
        local = {**self.constants, **(self._assigned(inside.body) if inside else {})}
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [node.value]
        if depth > 4:
            return [HOLE]
        if isinstance(node, ast.JoinedStr):
            parts = [self._part(value, inside, depth) for value in node.values]
            return _combined(parts)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            both = itertools.product(*(self.texts(n, inside, depth + 1) for n in (node.left, node.right)))
            return ["".join(some) for some in both]
        if isinstance(node, ast.IfExp):
            return [t for n in (node.body, node.orelse) for t in self.texts(n, inside, depth + 1)]
        if isinstance(node, ast.Name) and node.id in local:
            return list(dict.fromkeys(t for n in local[node.id] for t in self.texts(n, inside, depth + 1)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.functions:
            function = self.functions[node.func.id]
            given = [n.value for n in ast.walk(function) if isinstance(n, ast.Return) and n.value is not None]
            return list(dict.fromkeys(t for n in given for t in self.texts(n, function, depth + 1)))
        return [HOLE]

    def _part(self, node: ast.expr, inside: ast.FunctionDef | None, depth: int) -> list[str]:
        if not isinstance(node, ast.FormattedValue):
            return self.texts(node, inside, depth)
        found = [text for text in self.texts(node.value, inside, depth + 1) if text.strip(HOLE + " ")]
        return found if any(" " in text for text in found) else [HOLE]  # a name alone is one of the case's


def read(path: Path) -> list[Refusal]:
    """The sentences of one file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    reader, name = _Reader(tree), path.relative_to(PACKAGE).as_posix()
    found = []
    for function, node in _raises(tree, None):
        call = node.exc
        if not isinstance(call, ast.Call) or not call.args:
            continue
        error = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if error in ERRORS:
            texts = reader.texts(call.args[0], function)
            said = (re.sub(f"{HOLE}+", HOLE, " ".join(t.split())) for t in texts)
            found += [Refusal(name, node.lineno, error, text) for text in dict.fromkeys(said)]
    return [r for r in found if r.text not in CAUGHT.get(name, ())]


def _raises(node: ast.AST, inside: ast.FunctionDef | None) -> Iterator[tuple[ast.FunctionDef | None, ast.Raise]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise):
            yield inside, child
        yield from _raises(child, child if isinstance(child, ast.FunctionDef) else inside)


def everything() -> list[Refusal]:
    """The sentences of the whole package, but for what runs in a box."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return [r for p in paths if p.relative_to(PACKAGE).as_posix() not in INSIDE for r in read(p)]


def page() -> str:
    """The list of the page: under each heading its sentences, each once."""
    by_file: dict[str, list[Refusal]] = {}
    for refusal in everything():
        by_file.setdefault(refusal.file, []).append(refusal)
    text = ""
    for title, files in PARTS.items():
        said = dict.fromkeys(r.text for name in files for r in by_file.get(name, []) if re.search(r"\w+ \w+", r.text))
        lines = (f"* {sentence}".replace("<", "\\<").replace("`", "'").replace("$", "\\$") for sentence in said)
        text += (
            f"## {title}\n\n" + "\n".join(line.replace("*", "\\*").replace("\\* ", "* ", 1) for line in lines) + "\n\n"
        )
    return text


BEGIN, END = "<!-- every sentence, by tests/book/refusals.py -->\n", "<!-- end of the sentences -->\n"


def with_list(before: str) -> str:
    """The page with today's sentences in their place."""
    head, _, rest = before.partition(BEGIN)
    return f"{head}{BEGIN}\n{page()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(with_list(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
