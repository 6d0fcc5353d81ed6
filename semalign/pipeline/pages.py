"""What staging adds to the pages: numbers and names in titles, what was found, tables for every reader, downloads."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
import yaml

from semalign.pipeline.notebooks import NOTEBOOKS, ORDER, ROOT, chapters_of
from semalign.profiles import Profile

Numbers = Mapping[str, Mapping[str, Any]]
"""Metrics by chapter."""

MARKS = ("short", "data", "findings", "downloads")
"""What a prose page can ask for by a line ``% generated: NAME``, which reads as a comment where nothing is staged."""

DECIDING = {
    "01_semantics": "Are the paper's bases semantic?",
    "04b_gates": "Can the instrument see a transfer?",
    "12b_students": "Does SemAlign transfer, and by its states?",
    "13b_regimes": "When do states help?",
    "14_search": "Does any configuration with states win?",
    "15_paper_against_ours": "Which of the paper's claims hold here?",
}
"""The chapters whose findings are the front page's, each with its question."""

COMPARED = {
    "04b_gates": ("gains", "gain of labels in all layers on"),
    "12b_students": ("differences", "SemAlign tuned, on / minus"),
    "13b_regimes": ("overall", "what is added, and to whom"),
    **{name: ("gains/none", "minus the untouched student") for name, chapter in ORDER.items() if chapter.of_task},
}
"""The chapters whose main table both runs have: where its differences are among the numbers, and what its rows are."""

API = {
    "paper": ("The paper", ("semantics", "attribution", "contributions", "pairing", "supervision", "alignment")),
    "models": ("Models, profiles and reports", ("models", "vocabularies", "profiles", "report", "packaged")),
}
"""The first pages of the reference: what each is called, and whose modules it holds. Then each folder has its own."""

WINGS = ("lm", "training", "methods", "benchmarks", "classroom", "planning", "study", "pipeline")
"""The order of the folders in the reference; one that is not among them comes last."""

PROGRAMS = ("__main__", "driver")
"""Modules that are run and not imported, and that the reference leaves out."""


def heading(name: str) -> str:
    """A chapter's title as its notebook has it."""
    first: str = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells[0].source
    return first.splitlines()[0].lstrip("# ")


def number(name: str) -> str:
    """A chapter's number, that of its file: ``"05_mmlu"`` is 5, ``"04b_gates"`` is 4b."""
    return name.partition("_")[0].removeprefix("0")


def data_names(p: Profile) -> dict[str, str]:
    """What the data of each task are called in a profile: those of the classroom have a name and a sibling."""
    if p.data != "classroom":
        return {}
    rows = yaml.safe_load((ROOT / "book" / "data_names.yaml").read_text(encoding="utf-8"))
    return {task: f"{rows[task]['name']} ({rows[task]['sibling']}'s sibling)" for task in p.tasks}


def findings_of(name: str, p: Profile, kept: Numbers, run: Numbers) -> tuple[str, str]:
    """A chapter's finding in the kept run, which is one on the classroom's data, and in this one."""
    from semalign.report import called
    from semalign.study.findings import finding

    full = finding(name, kept.get(name, {}), called("classroom"))
    return full, finding(name, run.get(name, {}), called(p.data))


def title(name: str, p: Profile) -> str:
    """A chapter's title on its page: numbered, and with its data named."""
    named, whole = data_names(p).get(ORDER[name].of_task, ""), heading(name)
    if named:
        _, colon, rest = whole.partition(": ")
        whole = f"{named}{colon}{rest}"
    return f"{number(name)}. {whole}"


def short_title(name: str, p: Profile) -> str:
    """The same for the table of contents, which has no room for a question."""
    return title(name, p).partition(": ")[0]


def with_title(source: str, new: str) -> str:
    """The markdown of a chapter's first cell under another title."""
    first, newline, rest = source.partition("\n")
    if not first.startswith("# "):
        raise ValueError(
            f"a chapter begins with its title, and this one with {first!r}: give it a line '# Title' first"
        )
    return f"# {new}{newline}{rest}"


def kept_run() -> tuple[dict[str, dict[str, Any]], str]:
    """The kept numbers by chapter and their profile; none where another version of the code has made them."""
    from semalign.report import load_metrics
    from semalign.study.kept import is_current

    folder = ROOT / "book" / "full_run"
    if not (folder / "version.json").exists():
        return {}, ""
    version, made = load_metrics(folder / "version.json")
    if not is_current(version):
        return {}, made["profile"]
    return {path.stem: load_metrics(path)[0] for path in folder.glob("*.json") if path.stem in ORDER}, made["profile"]


def run_numbers(p: Profile, results: Path) -> dict[str, dict[str, Any]]:
    """The numbers of a run by chapter."""
    from semalign.report import load_metrics

    return {name: load_metrics(results / "metrics" / f"{name}.json")[0] for name in chapters_of(p)}


def finding_box(name: str, p: Profile, kept: Numbers, run: Numbers) -> str:
    """The box under a chapter's title: the kept run's finding first, then this run's; empty where neither has one."""
    full, own = findings_of(name, p, kept, run)
    lines = [f"**[The full run](93_full_run.ipynb).** {full}"] if full else []
    if own and own != full:
        lines.append(f"**This run** (profile `{p.name}`). {own}")
    if not lines:
        return ""
    return ":::{admonition} The finding\n:class: tip finding\n\n" + "\n\n".join(lines) + "\n:::"


def two_runs(name: str, p: Profile, kept: Numbers, run: Numbers) -> str:
    """Under the finding, its table of both runs in tabs, the kept one first; empty where one has no such numbers.

    The rows are those that both runs have, so that a reader compares like with like; in points, with 95 % intervals.
    """
    from semalign.report import called, row_called

    if name not in COMPARED:
        return ""
    path, rows = COMPARED[name]
    full, own = (_differences(numbers.get(name, {}), path) for numbers in (kept, run))
    both = [row for row in full if row in own]
    if not both or full == own:
        return ""
    tabs = []
    for label, table, data in (("The full run", full, "classroom"), (f"This run ({p.name})", own, p.data)):
        names = called(data)
        shown = {row_called(row, names): table[row] for row in both}
        lines = [f"| {row} | {' | '.join(f'{100 * e[n]:+.1f}' for n in range(3))} |" for row, e in shown.items()]
        head = f"| {rows} | points | 95 % from | to |\n|---|--:|--:|--:|"
        more = len(table) - len(both)
        note = f"\n\nNot shown: {more} of its rows that the other run has not." if more else ""
        tabs.append(f":::{{tab-item}} {label}\n{head}\n" + "\n".join(lines) + f"{note}\n:::")
    return "::::{tab-set}\n\n" + "\n\n".join(tabs) + "\n\n::::"


def _differences(metrics: Mapping[str, Any], path: str) -> dict[str, tuple[float, float, float]]:
    """Differences by row, each a mean and the ends of its interval; a row that has none of them is left out."""
    from semalign.report import entry

    table, ends = entry(metrics, path.split("/")) or {}, ("mean", "low", "high")
    return {
        row: (e["mean"], e["low"], e["high"])
        for row, e in table.items()
        if all(isinstance(e.get(n), int | float) for n in ends)
    }


def readable_tables(html: str) -> str:
    """Tables of a notebook's output as the book's style knows them: a ``dataframe``, whoever wrote it."""
    html = re.sub(r"<table([^>]*)>", lambda found: f"<table{_with_class(found[1])}>", html)
    return html.replace('<tr style="text-align: right;">', "<tr>")


def _with_class(attributes: str) -> str:
    attributes = re.sub(r'\s*border="\d+"', "", attributes)
    if "class=" not in attributes:
        return f'{attributes} class="dataframe"'
    if re.search(r'class="[^"]*\bdataframe\b', attributes):
        return attributes
    return re.sub(r'class="', 'class="dataframe ', attributes)


def filled(text: str, parts: Mapping[str, str]) -> str:
    """A prose page with what it asks for, see :data:`MARKS`."""
    return re.sub(r"^% generated: (\w+)$", lambda mark: parts[mark[1]].rstrip("\n"), text, flags=re.MULTILINE)


def data_table(p: Profile) -> str:
    """The front page's table of data, for profiles that have names for them."""
    rows = yaml.safe_load((ROOT / "book" / "data_names.yaml").read_text(encoding="utf-8"))
    chapter = {c.of_task: name for name, c in ORDER.items() if c.of_task}
    lines = [
        f"| {rows[task]['name']} | {rows[task]['sibling']} | [](../notebooks/{chapter[task]}.ipynb) |"
        for task in chapter
        if task in data_names(p)
    ]
    if not lines:
        return f"This run's data are those of the profile `{p.name}`, under their own names."
    return "\n".join(["| data | small sibling of | chapter |", "|---|---|---|", *lines])


def findings_list(p: Profile, kept: Numbers, run: Numbers) -> str:
    """What every chapter found, a line each; of the kept run where it says something, else of this one."""
    from semalign.study.findings import FINDINGS

    titles = {name: title(name, p) for name in FINDINGS}
    ends = {name: "" if text.endswith("?") else "." for name, text in titles.items()}
    return _told(p, kept, run, {n: f"[{text}](../notebooks/{n}.ipynb){ends[n]}" for n, text in titles.items()})


def in_short(p: Profile, kept: Numbers, run: Numbers) -> str:
    """The front page's answers: the findings of the chapters that decide, each behind its question."""
    return _told(p, kept, run, {n: f"**{asked}** ([chapter](../notebooks/{n}.ipynb))" for n, asked in DECIDING.items()})


def _told(p: Profile, kept: Numbers, run: Numbers, chapters: Mapping[str, str]) -> str:
    """The findings of chapters, each behind its words; of the kept run where it says something, else of this one."""
    said = {}
    for name in (n for n in chapters if n in chapters_of(p)):
        full, own = findings_of(name, p, kept, run)
        if full or own:
            said[name] = full or f"{own}{' (This run.)' if kept else ''}"
    if not said:
        return "No chapter of this run has a number to tell."
    whose = "Of [the full run](../notebooks/93_full_run.ipynb):" if kept else f"Of this run, of the profile `{p.name}`:"
    return "\n".join([whose, "", *(f"* {chapters[name]} {text}" for name, text in said.items())])


def flat(numbers: Numbers) -> Iterator[tuple[str, str, float | int | str | bool]]:
    """Chapter, path and value of every number and word in metrics, lists included; None is left out."""

    def leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(tree, Mapping):
            for key, value in tree.items():
                yield from leaves(value, f"{path}/{key}" if path else str(key))
        elif isinstance(tree, list):
            for at, value in enumerate(tree):
                yield from leaves(value, f"{path}[{at}]")
        elif tree is not None:
            yield path, tree

    for chapter, metrics in sorted(numbers.items()):
        for path, value in leaves(metrics, ""):
            yield chapter, path, value


def as_csv(numbers: Numbers) -> str:
    """A row for each number: chapter, where it is among the chapter's metrics, and its value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["chapter", "number", "value"])
    writer.writerows(flat(numbers))
    return text.getvalue()


def downloads(folder: Path, p: Profile, run: Numbers) -> str:
    """Write the numbers of both runs to ``folder``, as csv and as json; returns the table that links to them."""
    from semalign.report import load_metrics

    folder.mkdir(parents=True, exist_ok=True)
    kept = sorted((ROOT / "book" / "full_run").glob("*.json"))
    made = [load_metrics(path) for path in kept]
    whole = {path.stem: found[0] for path, found in zip(kept, made, strict=True) if path.stem in ORDER}
    profile = made[0][1]["profile"] if made else ""
    lines = ["| numbers | profile | csv | json |", "|---|---|---|---|"]
    for name, label, of, numbers in (
        ("full_run", "the full run", profile, whole),
        ("this_run", "this run", p.name, run),
    ):
        if not numbers:
            continue
        (folder / f"{name}.csv").write_text(as_csv(numbers), encoding="utf-8")
        (folder / f"{name}.json").write_text(json.dumps(numbers, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        links = [f"{{download}}`{name}.{kind} <{folder.name}/{name}.{kind}>`" for kind in ("csv", "json")]
        lines.append(f"| {label} | `{of}` | {links[0]} | {links[1]} |")
    return "\n".join(lines)


def public_modules(wing: str) -> list[str]:
    """The modules of a part of ``semalign`` that are there to be imported: a file, or all of a folder."""
    base = ROOT / "semalign"
    if (base / f"{wing}.py").exists():
        return [f"semalign.{wing}"]
    found = []
    for path in sorted((base / wing).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if parts[-1] not in PROGRAMS and not any(part.startswith("_") for part in parts):
            found.append(".".join(parts))
    return sorted(found)


def api_pages() -> dict[str, str]:
    """The pages of the reference by file name, each a list of modules that autodoc fills."""
    folders = [path.parent.name for path in (ROOT / "semalign").glob("*/__init__.py")]
    order = sorted(folders, key=lambda name: (WINGS.index(name) if name in WINGS else len(WINGS), name))
    pages = {}
    for name, (label, wings) in {**API, **{name: (f"`semalign.{name}`", (name,)) for name in order}}.items():
        modules = [module for wing in wings for module in public_modules(wing)]
        parts = [
            f"## `{module}`\n\n```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n   :member-order: bysource\n```"
            for module in modules
        ]
        pages[name] = f"# {label}\n\n" + "\n\n".join(parts) + "\n"
    return pages
