"""The page to cite from says what CITATION.cff, the bibliography, the profiles and the benchmarks say."""

from __future__ import annotations

import re
import tomllib

import pages
import yaml

from semalign.benchmarks.registry import BENCHMARKS
from semalign.profiles import FOLDER, declared

PAGE = pages.text("citing")
CFF = yaml.safe_load((pages.ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def plain(bibtex: str) -> dict[str, str]:
    """The fields of one BibTeX entry, without the braces that only protect."""
    fields = re.findall(r"^  (\w+) = \{(.*)\},?$", bibtex, re.MULTILINE)
    return {name: re.sub(r"[{}]", "", value) for name, value in fields}


def test_the_companions_entry_is_that_of_the_citation_file() -> None:
    entry = plain(pages.code(PAGE, "bibtex")[1])
    (author,) = CFF["authors"]
    assert entry == {
        "title": CFF["title"],
        "author": author["name"],
        "version": str(CFF["version"]),
        "date": str(CFF["date-released"]),
        "license": CFF["license"],
    }
    project = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"]
    assert (CFF["version"], CFF["license"]) == (project["version"], project["license"])
    assert "under the MIT licence" in PAGE and CFF["license"] == "MIT"
    assert (pages.ROOT / "LICENSE").read_text().startswith("MIT License")


def test_the_papers_entry_is_that_of_the_bibliography() -> None:
    entry = pages.code(PAGE, "bibtex")[0]
    assert entry in (pages.BOOK / "references.bib").read_text(encoding="utf-8")
    (paper,) = CFF["references"]
    assert plain(entry)["title"] == paper["title"]
    assert plain(entry)["author"].split(" and ") == [
        f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]
    ]
    assert f"arxiv.org/abs/{paper['identifiers'][0]['value'].removeprefix('arXiv:')}" in PAGE


def hub_models(value: object) -> set[str]:
    """The ids of every model of the hub that a profile names, at whatever depth."""
    if isinstance(value, dict):
        own = {str(value["id"])} if value.get("source") == "hub" else set()
        return own.union(*map(hub_models, value.values()))
    return set()


def test_every_model_and_data_set_that_is_used_is_linked_and_no_other() -> None:
    profiles = [yaml.safe_load(path.read_text()) for path in FOLDER.glob("*.yaml")]
    links = set(re.findall(r"\]\(https://huggingface\.co/([^)]+)\)", PAGE))
    data = {f"datasets/{row.hub[0]}" for row in BENCHMARKS.values() if row.hub}
    assert links == set().union(*map(hub_models, profiles)) | data


def test_methods_are_named_as_in_the_table_of_methods() -> None:
    named = {
        n for row in pages.rows(pages.section(PAGE, "The paper and its rivals")) for n in re.findall(r"`(\w+)`", row[1])
    }
    assert named <= set(declared("methods")) and {"semalign", "seeking", "laten", "ted", "gkd", "oprd"} <= named


def test_addresses_agree_with_their_names() -> None:
    for said, linked in re.findall(r"\[arXiv ([\d.v]+)\]\(https://arxiv\.org/abs/([\d.v]+)\)", PAGE):
        assert said == linked
    for said, linked in re.findall(r"\[([^\]]+)\]\(https://huggingface\.co/(?:datasets/)?([^)]+)\)", PAGE):
        assert said == linked
