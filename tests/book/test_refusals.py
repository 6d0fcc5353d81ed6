"""Every refusal names the input, the reason and the remedy in one sentence, and no option that does not exist."""

from __future__ import annotations

import ast
import re
from dataclasses import fields

import pages
import refusals

from semalign.profiles import Profile, Sizes
from semalign.training.config import TransferConfig

DO = (
    "choose|give|name|set|use|take|add|lower|raise|correct|check|delete|drop|run|load|make|keep|call|copy|quote|save|write"
    "|read|install|free|accept|export|wait|draw|retrain|rename|get|ask|store|convert|end|leave|mend|judge|look|pip|try|resize|remove|update"
)
STATE = (
    "must|needs?|choose|correct|did you mean|valid:|it has|there are:|is not one of|is one of|are numbered"
    "|takes at least|takes 1|names one|only test|is neither|(?:names|tasks|methods|families|subjects) are|in it to have"
)
REMEDY = re.compile(rf"[:;,] (?:\w+ )?(?:(?:or|and|so|at) )*(?:{DO})\b|\b(?:{STATE})")
"""A way out: what to do, or which values there are."""
LONGER = {"notebook … failed in cell …: …: … the cell: … the executed part, with the traceback: …"}
"""What shows a reader their own cell, on lines of its own."""
PASSED_ON = {"the model source …: …: …", "profile …: …: …", "of profile … this cannot be fetched: …"}
"""What puts its own beginning before another sentence of the list."""
ALL = refusals.everything()


def _names() -> set[str]:
    """Whatever a reader can set or call: keys of profiles, fields of configurations, arguments, functions, modules."""
    found = {f.name for f in fields(TransferConfig)} | set(Profile.model_fields) | set(Sizes.model_fields)
    for path in refusals.PACKAGE.rglob("*.py"):
        found.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                found.add(node.name)
                found |= {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                found.add(node.value)  # a field of a row, a kind of map
            elif isinstance(node, ast.Attribute):
                found.add(node.attr)
    return found | {path.stem for path in (refusals.ROOT / "notebooks").glob("*.ipynb")}


NAMES = _names()


SHORT = [r for r in ALL if r.text not in LONGER | PASSED_ON and re.search(r"\w+ \w+", r.text)]
"""All but what only passes another sentence on."""


def test_a_refusal_is_one_sentence() -> None:
    for refusal in SHORT:
        assert "\n" not in refusal.text and not refusal.text.endswith("."), refusal
        assert not re.search(r"[a-z)]\. [A-Z]", refusal.text), refusal
        assert len(refusal.text) < 330 and not refusal.text.startswith(("Error", "Please", "Sorry")), refusal


def test_a_refusal_names_the_way_out() -> None:
    assert [r.text for r in SHORT if not REMEDY.search(r.text)] == []


def test_a_refusal_names_the_input() -> None:
    for refusal in SHORT:
        words = set(re.findall(r"\w+", refusal.text))
        assert refusals.HOLE in refusal.text or words & NAMES, refusal


def test_what_is_longer_is_still_said() -> None:
    assert {r.text for r in ALL} >= LONGER | PASSED_ON


def test_a_refusal_mentions_no_option_that_does_not_exist() -> None:
    source = "".join(p.read_text(encoding="utf-8") for p in refusals.PACKAGE.rglob("*.py"))
    told = "".join(pages.text(name) for name in ("rerun", "teaching")) + (refusals.ROOT / "README.md").read_text()
    targets = (refusals.ROOT / "Makefile").read_text()
    for refusal in ALL:
        text = refusal.text.replace("source: folder", "")
        assigned = set(re.findall(r"\b([a-z_]+)=", text))
        keys = set(re.findall(r"\b([a-z_]+): (?:true|false|auto|classroom)\b", text))
        compound = set(re.findall(r"(?<![\w./-])([a-z]+(?:_[a-z]+)+)(?![\w./-])", text))
        assert not (assigned | keys | compound) - NAMES, refusal
        for variable in re.findall(r"\b(?:SEMALIGN|HF)_[A-Z_]+\b", text):
            of_the_hub = variable in ("HF_HOME", "HF_HUB_OFFLINE")
            assert of_the_hub or f'"{variable}"' in source or variable in told, refusal
        for target in re.findall(r"(?:`|call )make (\w+)", text):
            assert f"\n{target}:" in targets, refusal


def test_the_page_has_every_sentence_that_a_run_can_meet_once() -> None:
    page = pages.text("refusals")
    assert refusals.with_list(page) == page, "call python tests/book/refusals.py"
    lines = [line for line in page.splitlines() if line.startswith("* ")]
    assert len(lines) == len(set(lines)) > 100


def test_every_file_that_refuses_is_on_the_page_or_about_the_books_own_numbers() -> None:
    listed = {file for files in refusals.PARTS.values() for file in files}
    left = {r.file for r in ALL} - listed
    assert left == {
        "study/analysis.py", "study/claims.py", "benchmarks/answers.py", "classroom/corpora.py",
        "classroom/training.py", "classroom/make.py", "training/losses.py",
    }  # fmt: skip


def test_reading_finds_what_helpers_and_variables_say() -> None:
    texts = {r.text for r in ALL}
    assert "profile …: … is missing: add it" in texts  # built by a function
    assert any(t.startswith("the supervision cache needs … bytes") for t in texts)  # assigned before it is raised
    assert "the model folder … does not exist: give the folder that save_pretrained wrote" in texts
