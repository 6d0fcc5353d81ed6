"""What staging adds to the pages, and the other forms of a finished run: titles, findings, tables, downloads, paper."""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from semalign.pipeline import book, notebooks, pages, printing, slides
from semalign.pipeline.extension import as_markup, description, for_screen_readers, without_icon_script
from semalign.profiles import declared, load_profile
from semalign.report import load_metrics, save_metrics

ROOT = notebooks.ROOT
COSINES = {"cosine_over_layers": {"output side": {"mean": 0.5}, "random": {"mean": 0.75}}}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the classroom that has finished, by its looks: no cell has run."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "artefacts").mkdir()
    (folder / "artefacts" / "main_figure.svg").write_text(SVG)
    for name in notebooks.chapters_of(load_profile("classroom")):
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        notebook.metadata["papermill"] = {"duration": 3.0}
        for cell in notebook.cells:
            if "mystnb" in cell.metadata:
                cell.outputs = [nbformat.v4.new_output("display_data", {"image/svg+xml": SVG})]
        (folder / "notebooks").mkdir(exist_ok=True)
        nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")
        numbers = COSINES if name == "01_semantics" else {"of": name}
        save_metrics(folder / "metrics" / f"{name}.json", numbers, seeds=[0], profile="classroom")
    return folder


@pytest.fixture(scope="module")
def stage(results: Path) -> Path:
    """The staged book of a run beside which no other is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "kept_run", lambda: ({}, ""))
        return book.stage_book(load_profile("classroom"), results)


def test_data_are_named_in_one_place_and_every_benchmark_is() -> None:
    rows = yaml.safe_load((ROOT / "book" / "data_names.yaml").read_text())
    assert set(rows) == set(declared("benchmarks"))
    p = load_profile("classroom")
    for name, chapter in notebooks.ORDER.items():
        if chapter.of_task:
            row = rows[chapter.of_task]
            assert f"{row['name']} ({row['sibling']}'s sibling): " in pages.title(name, p)
            assert pages.heading(name).startswith(row["sibling"])
            assert pages.title(name, load_profile("llama2")) == f"{pages.number(name)}. {pages.heading(name)}"


def test_chapters_have_the_numbers_of_their_files() -> None:
    assert [pages.number(n) for n in ("00_models_and_data", "04b_gates", "10_similarity")] == ["0", "4b", "10"]
    with pytest.raises(ValueError, match="begins with its title"):
        pages.with_title("no title", "new")


def test_a_staged_chapter_has_its_number_and_under_it_what_it_found(stage: Path) -> None:
    first, second = nbformat.read(stage / "notebooks/01_semantics.ipynb", 4).cells[:2]
    assert first.source.startswith("# 1. Vocabulary-defined semantics\n")
    assert second.source.startswith(":::{admonition} The finding")
    assert (
        "**This run** (profile `classroom`). Recomposed from random bases" in second.source and "0.750" in second.source
    )
    without = nbformat.read(stage / "notebooks/13_rivals.ipynb", 4).cells[1]
    assert "The finding" not in without.source
    toc = yaml.safe_load((stage / "_toc.yml").read_text())
    named = {c["file"]: c.get("title") for part in toc["parts"] for c in part["chapters"]}
    assert named["notebooks/05_mmlu"] == "5. Pico facts (MMLU's sibling)" and named["book/method"] is None


def test_the_full_run_comes_first_and_is_not_said_twice() -> None:
    p = load_profile("classroom")
    other = {"cosine_over_layers": {"output side": {"mean": 0.6}, "random": {"mean": 0.9}}}
    kept, run = {"01_semantics": other}, {"01_semantics": COSINES}
    box = pages.finding_box("01_semantics", p, kept, run)
    assert box.index("0.900") < box.index("This run") < box.index("0.750")
    assert "This run" not in pages.finding_box("01_semantics", p, run, run)
    assert pages.finding_box("01_semantics", p, {}, {}) == ""


def test_the_table_of_two_runs_stands_in_tabs_with_the_rows_that_both_have() -> None:
    p = load_profile("classroom")
    full = {"sft": {"mean": 0.25, "low": 0.2, "high": 0.3}, "gkd": {"mean": 0.1, "low": 0.0, "high": 0.2}}
    own = {"sft": {"mean": -0.125, "low": -0.2, "high": -0.05}, "twin": {"mean": 0.5, "low": 0.4, "high": 0.6}}
    kept, run = ({"05_mmlu": {"gains": {"none": found}}} for found in (full, own))
    told = pages.two_runs("05_mmlu", p, kept, run)
    assert told.startswith("::::{tab-set}") and told.index("The full run") < told.index("This run (classroom)")
    assert "| sft | +25.0 | +20.0 | +30.0 |" in told and "| sft | -12.5 | -20.0 | -5.0 |" in told
    assert "gkd" not in told and "twin" not in told and told.count("Not shown: 1 of its rows") == 2
    assert pages.two_runs("05_mmlu", p, run, run) == pages.two_runs("05_mmlu", p, {}, run) == ""
    assert pages.two_runs("01_semantics", p, kept, run) == ""
    own["sft"]["mean"] = None
    assert pages.two_runs("05_mmlu", p, kept, run) == ""
    named = ({"12b_students": {"differences": {"gsm8k / sft": full[m]}}} for m in ("sft", "gkd"))
    assert "| Pico word problems / sft | +25.0 |" in pages.two_runs("12b_students", p, *named)


def test_the_front_page_says_whose_findings_it_lists() -> None:
    p = load_profile("classroom")
    numbers, other = {"01_semantics": COSINES}, {"13_rivals": {"differing": {"laten": 5, "laten_released": 0}}}
    own, full = pages.findings_list(p, {}, numbers), pages.findings_list(p, numbers, other)
    assert own.startswith("Of this run, of the profile `classroom`:") and "(This run.)" not in own
    assert full.startswith("Of [the full run]") and full.count("(This run.)") == 1 and "one with 5. (This run.)" in full
    assert "no number" not in full and pages.findings_list(p, {}, {}).startswith("No chapter")


def test_the_front_page_answers_its_questions_by_what_the_deciding_chapters_found() -> None:
    p = load_profile("classroom")
    said = pages.in_short(
        p, {}, {"01_semantics": COSINES, "13_rivals": {"differing": {"laten": 5, "laten_released": 0}}}
    )
    assert "* **Are the paper's bases semantic?** ([chapter](../notebooks/01_semantics.ipynb)) Recomposed" in said
    assert "0.750" in said and "13_rivals" not in said and said.count("\n* ") == 1
    assert set(pages.DECIDING) <= set(pages.ORDER)
    front = (pages.ROOT / "book/index.md").read_text(encoding="utf-8")
    assert "% generated: short" in front and "0.750" in pages.filled(
        front, dict.fromkeys(pages.MARKS, "") | {"short": said}
    )


def test_numbers_of_another_version_of_the_code_are_no_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert pages.kept_run() == ({}, "")
    from semalign.study.kept import version_of

    folder = tmp_path / "book" / "full_run"
    save_metrics(folder / "01_semantics.json", COSINES, seeds=[0], profile="classroom-full")
    made = version_of(["none", "sft"], ["mmlu"])
    others = ({**made, "code": "another"}, {"code": made["code"]}, {**made, "methods": ["none", "gone"]})
    for version, expected in (*((other, {}) for other in others), (made, {"01_semantics": COSINES})):
        save_metrics(folder / "version.json", version, seeds=[0], profile="classroom-full")
        assert pages.kept_run() == (expected, "classroom-full")


def test_tables_have_one_class_and_no_header_without_a_name() -> None:
    styled = '<style></style><table id="T_1"><tr><th class="blank level0" >&nbsp;</th><th>a</th></tr></table>'
    plain = '<table border="1" class="dataframe"><tr style="text-align: right;"><th></th><th>a</th></tr></table>'
    one, two = pages.readable_tables(styled), pages.readable_tables(plain)
    assert '<table id="T_1" class="dataframe">' in one and two.startswith('<table class="dataframe"><tr><th>')
    assert '<table class="dataframe wide">' in pages.readable_tables('<table class="wide">')
    assert for_screen_readers(one).endswith('<td class="blank level0" ></td><th>a</th></tr></table>')
    empty, full = '<th class="head"><p></p></th>', "<th><p>b</p></th>"
    assert for_screen_readers(empty + full) == f'<td class="head"></td>{full}'
    assert for_screen_readers('<div role="doc-biblioentry">') == '<div role="listitem">'


def test_only_the_script_of_icons_goes() -> None:
    kept = '<link href="../_static/vendor/fontawesome/6.5.2/css/all.min.css">'
    kept += '<script src="../_static/doctools.js"></script>'
    script = '\n  <script src="../_static/vendor/fontawesome/6.5.2/js/all.min.js?digest=1"></script>'
    assert without_icon_script(kept + script) == kept


def test_a_description_is_short_and_ends_with_a_word() -> None:
    assert description("Few\n  words.") == "Few words."
    long = description("word " * 100)
    assert len(long) <= 202 and long.endswith("word …")


def test_what_a_page_asks_for_is_there_and_nothing_is_left_open(stage: Path) -> None:
    asked = {
        mark
        for path in (ROOT / "book").glob("*.md")
        for mark in re.findall(r"^% generated: (\w+)$", path.read_text(), re.MULTILINE)
    }
    assert asked == set(pages.MARKS)
    index = (stage / "book" / "index.md").read_text()
    assert "% generated" not in index and "| Pico facts | MMLU | [](../notebooks/05_mmlu.ipynb) |" in index
    assert "* [1. Vocabulary-defined semantics](../notebooks/01_semantics.ipynb). Recomposed" in index


def test_the_numbers_of_a_run_come_back_from_the_downloads(stage: Path, results: Path) -> None:
    page, folder = (stage / "book" / "numbers.md").read_text(), stage / "book" / "numbers_of"
    for name in re.findall(r"<numbers_of/([\w.]+)>`", page):
        assert (folder / name).exists()
    whole = json.loads((folder / "this_run.json").read_text())
    assert whole["01_semantics"] == load_metrics(results / "metrics/01_semantics.json")[0]
    rows = list(csv.DictReader(io.StringIO((folder / "this_run.csv").read_text())))
    of = {(r["chapter"], r["number"]): r["value"] for r in rows}
    assert of["01_semantics", "cosine_over_layers/random/mean"] == "0.75"
    assert [*pages.flat({"a": {"b": [1, {"c": None, "d": 2}]}})] == [("a", "b[0]", 1), ("a", "b[1]/d", 2)]


def test_the_reference_has_every_public_module_once() -> None:
    text = "".join(pages.api_pages().values())
    named = re.findall(r"automodule:: (\S+)", text)
    tree = {p.relative_to(ROOT).with_suffix("") for p in (ROOT / "semalign").rglob("*.py")}
    public = {".".join(p.parts).removesuffix(".__init__") for p in tree if p.name not in pages.PROGRAMS} - {"semalign"}
    assert sorted(named) == sorted(public)
    assert all(importlib.util.find_spec(module) for module in named)


def test_docstrings_are_prepared_for_markup() -> None:
    assert as_markup(["1 - |h| and ``|x|``"]) == [r"1 - \|h\| and ``|x|``"]
    assert as_markup(["Bytes: how many"], named=True)[-1] == "Bytes: how many"


def test_without_an_address_there_are_no_launch_buttons_and_with_one_there_are() -> None:
    text = (ROOT / "_config.yml").read_text()
    url = yaml.safe_load(text)["repository"]["url"]
    with_one = text.replace(f'url: "{url}"', "url: https://example.org/a/b")
    without = text.replace(f'url: "{url}"', 'url: ""')
    assert not {"launch_buttons", "repository"} & set(yaml.safe_load(book._config(without)))
    assert {"launch_buttons", "repository"} <= set(yaml.safe_load(book._config(with_one)))


def test_slides_are_ten_figures_of_the_notebooks_with_a_sentence_each(results: Path) -> None:
    text = slides.make_slides(load_profile("classroom"), results).read_text()
    assert len(slides.DECK) == 10 and text.count("<img ") == 10 and text.count('<p class="says">') == 11
    assert "Recomposed from random bases" in text and not re.search(r'(src|href)="(?!data:)', text)
    assert (
        slides.sentence("It is 4.5 long. Two. Three.", 0) == "It is 4.5 long." and slides.sentence("A. B.", -1) == "B."
    )
    with pytest.raises(RuntimeError, match="has no numbers of 00_models_and_data"):
        slides.make_slides(load_profile("classroom"), results / "nowhere")


PAGE = """<html><head><link rel="stylesheet" href="../_static/a.css"></head><body><article class="bd-article">
<h1>{title}<a class="headerlink" href="#x">#</a></h1><p id="x"><a href="{to}">go</a><img src="../_images/f.svg">
<a href="https://example.org/#x">out</a></p><script>1</script></article></body></html>"""


@pytest.fixture
def built(tmp_path: Path) -> Path:
    toc = {
        "root": "book/index",
        "parts": [{"caption": "First", "chapters": [{"file": "notebooks/a", "sections": [{"file": "book/b"}]}]}],
    }
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump(toc))
    html = tmp_path / "_build" / "html"
    for name, to in {
        "book/index": "../notebooks/a.html#x",
        "notebooks/a": "../book/b.html",
        "book/b": "elsewhere.html",
    }.items():
        (html / name).parent.mkdir(parents=True, exist_ok=True)
        (html / f"{name}.html").write_text(PAGE.format(title=f"Title of {name}", to=to))
    (html / "index.html").write_text("")
    return tmp_path


def test_the_whole_book_is_one_page_whose_links_stay_inside(built: Path) -> None:
    text = printing.whole_book(built, {"notebooks/a": 7})
    assert [(p.part, p.path, p.depth) for p in printing.pages_of(built)] == [
        ("", "book/index", 0), ("First", "notebooks/a", 0), ("", "book/b", 1),
    ]  # fmt: skip
    inside = set(re.findall(r'href="#([^"]+)"', text))
    names = re.findall(r'\bid="([^"]+)"', text)
    assert len(names) == len(set(names)) and inside <= {*names}
    assert (
        "notebooks-a--x" in inside and 'src="../html/_images/f.svg"' in text and 'href="https://example.org/#x"' in text
    )
    assert 'href="../html/book/elsewhere.html"' in text and "<script>1" not in text and "<span>7</span>" in text
    assert 'href="../html/_static/a.css"' in text


def test_page_numbers_are_read_from_what_chromium_writes() -> None:
    pdf = (
        b"%PDF-1.4\n2 0 obj\n<</Type /Page\n>>\nendobj\n8 0 obj\n<</Type /Page>>\nendobj\n"
        b"13 0 obj\n<</Type /Pages\n/Kids [2 0 R 8 0 R]>>\nendobj\n"
        b"14 0 obj\n<</a--x [8 0 R /XYZ 6 826 0]\n/b [2 0 R /XYZ 6 1 0]>>\nendobj\n"
        b"15 0 obj\n<</Type /Catalog\n/Pages 13 0 R\n/Dests 14 0 R>>\nendobj\n"
    )
    assert printing.page_numbers(pdf) == {"a--x": 2, "b": 1}


def test_a_book_that_is_not_built_is_not_printed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="call make book first"):
        printing.print_book(tmp_path)


@pytest.mark.skipif(not any(map(printing.shutil.which, printing.BROWSERS)), reason="no Chromium is installed")
def test_a_printed_book_has_contents_with_the_right_numbers(built: Path) -> None:
    pdf = printing.print_book(built)
    at = printing.page_numbers(pdf.read_bytes())
    assert at["book-index"] < at["notebooks-a"] < at["book-b"]
    assert f"<span>{at['book-b']}</span>" in pdf.with_name("book.html").read_text()
