"""Loading questions: formats, bad files, draws, splits, contamination."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from semalign.benchmarks import files
from semalign.benchmarks.data import DataError, examples, load_items, read_jsonl, sample, task_data
from semalign.benchmarks.mmlu import user
from semalign.benchmarks.overlap import compared_text, contamination, overlap
from semalign.benchmarks.registry import wrap
from semalign.lm.examples import Example

HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]


def write_csv(path: Path, rows: list[list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def mbpp_rows(first: int, last: int) -> list[dict[str, Any]]:
    return [
        {"task_id": i, "text": f"Write a function number {i}.", "code": f"def f{i}(x):\n    return {i}",
         "test_list": [f"assert f{i}(0) == {i}"]}
        for i in range(first, last)
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, n in (("test", 6), ("dev", 5), ("validation", 8)):
        for subject in ("high_school_physics", "law"):
            rows = [
                [f'{subject} {split} {i},\n"quoted"?', "a", "b", "c", "d", i % 4 if i % 2 else "ABCD"[i % 4]]
                for i in range(n)
            ]
            write_csv(tmp_path / "mmlu" / split / f"{subject}_{split}.csv", [HEADER, *rows])
    for split, n in (("test", 7), ("train", 1300)):
        write_jsonl(tmp_path / "gsm8k" / f"{split}.jsonl", [
            {"question": f"{split}: {i} plus 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\nDone.\n#### {i + 1:,}"}
            for i in range(n)
        ])  # fmt: skip
    write_jsonl(tmp_path / "mbpp" / "mbpp.jsonl", mbpp_rows(1, 975))
    return tmp_path


def test_every_format_is_read(folder: Path) -> None:
    mmlu = load_items("mmlu", folder)
    assert (
        len(mmlu) == 12 and mmlu[0]["subject"] == "high_school_physics" and mmlu[0]["choices"] == ["a", "b", "c", "d"]
    )
    assert [i["answer"] for i in mmlu[:6]] == [0, 1, 2, 3, 0, 1] and '"quoted"' in mmlu[0]["question"]
    assert len({i["id"] for i in mmlu}) == 12
    assert len(load_items("gsm8k", folder)) == 7 and len(load_items("gsm8k", folder, "train")) == 1300
    sizes = {
        s: [i["task_id"] for i in load_items("mbpp", folder, s)] for s in ("test", "prompt", "validation", "train")
    }
    assert {s: (ids[0], ids[-1], len(ids)) for s, ids in sizes.items()} == {
        "test": (11, 510, 500), "prompt": (1, 10, 10), "validation": (511, 600, 90), "train": (601, 974, 374)
    }  # fmt: skip
    assert load_items("humaneval", folder)[0]["id"] == "HumanEval/0" and len(load_items("humaneval")) == 164


def test_files_of_single_splits_come_first(folder: Path) -> None:
    write_jsonl(folder / "mbpp" / "test.jsonl", mbpp_rows(0, 3))
    own = {"task_id": "Own/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(c): pass"}
    write_jsonl(folder / "humaneval" / "test.jsonl", [own])
    assert len(load_items("mbpp", folder)) == 3
    assert [i["id"] for i in load_items("humaneval", folder)] == ["Own/0"]


def test_the_environment_names_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMALIGN_DATA", str(folder))
    assert len(load_items("gsm8k")) == 7


def test_the_hub_failing_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*args: Any, **options: Any) -> None:
        assert args[0] == "openai/gsm8k" and options["split"] == "test" and len(options["revision"]) == 40
        raise ConnectionError("no route")

    monkeypatch.delenv("SEMALIGN_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"no route.*SEMALIGN_DATA"):
        load_items("gsm8k")


def test_bad_files_are_named_with_their_line(folder: Path) -> None:
    write_csv(folder / "mmlu" / "test" / "law_test.csv", [HEADER[:5], ["q", "a", "b", "c", "d"]])
    with pytest.raises(DataError, match=r"law_test.csv has no column 'answer'"):
        load_items("mmlu", folder)
    write_csv(folder / "mmlu" / "test" / "law_test.csv", [HEADER, ["q", "a", "b", "c", "d", "E"]])
    with pytest.raises(DataError, match=r"law_test.csv:2 .*'E'"):
        load_items("mmlu", folder)
    write_csv(folder / "mmlu" / "test" / "law_test.csv", [HEADER, ["q", "a", "b"]])
    with pytest.raises(DataError, match=r"law_test.csv:2"):
        load_items("mmlu", folder)
    path = folder / "gsm8k" / "test.jsonl"
    path.write_text(path.read_text() + '\n{"question": "half\n')
    with pytest.raises(DataError, match=r"test.jsonl:9 is not JSON"):
        load_items("gsm8k", folder)
    path.write_text("[1]\n")
    with pytest.raises(DataError, match=r"test.jsonl:1 is not a JSON object"):
        load_items("gsm8k", folder)
    path.write_text('{"question": "q"}\n')
    with pytest.raises(DataError, match="question 1 has no 'answer'"):
        load_items("gsm8k", folder)
    path.write_text('{"question": "q", "answer": "three"}\n')
    with pytest.raises(DataError, match="#### NUMBER"):
        load_items("gsm8k", folder)
    path.write_text("\n")
    with pytest.raises(DataError, match="empty"):
        load_items("gsm8k", folder)
    with pytest.raises(DataError, match="cannot be read"):
        read_jsonl(folder / "absent.jsonl")
    with pytest.raises(DataError, match="no csv"):
        load_items("mmlu", folder, "train")
    with pytest.raises(DataError, match="no split 'train'"):
        load_items("humaneval", folder, "train")
    with pytest.raises(ValueError, match="unknown task"):
        load_items("arc", folder)
    with pytest.raises(DataError, match="needs 4 choices"):
        load_items("mmlu", [{"question": "q", "choices": ["a"], "answer": 0}])


def test_draws_are_seeded_and_keep_the_subjects_shares() -> None:
    items = [{"id": str(i), "subject": "big" if i < 80 else "small"} for i in range(100)]
    drawn = sample(items, 20, 3)
    assert drawn == sample(items, 20, 3) != sample(items, 20, 4)
    assert Counter(i["subject"] for i in drawn) == {"big": 16, "small": 4}
    assert [int(i["id"]) for i in drawn] == sorted(int(i["id"]) for i in drawn) and len({i["id"] for i in drawn}) == 20
    assert sample(items, None, 0) == items == sample(items, 100, 0)
    first = Counter(i["id"] for seed in range(400) for i in sample(items, 10, seed))
    assert len(first) == 100 and max(first.values()) < 75  # every item is drawn, none much more often than 40 times


def test_splits_have_the_papers_sizes_and_are_disjoint(folder: Path) -> None:
    for task, sizes in (("gsm8k", (1000, 80, 20)), ("mbpp", (300, 40, 32))):
        data = task_data(task, folder, seed=1)
        assert (len(data.train), len(data.align), len(data.extract)) == sizes
        parts = [*data.train, *data.align, *data.extract, *data.validation]
        assert len({e.prompt for e in parts}) == len(parts) == {"gsm8k": 1300, "mbpp": 464}[task]
        assert data == task_data(task, folder, seed=1) != task_data(task, folder, seed=2)
        assert overlap(data, load_items(task, folder)) == []
    code = task_data("humaneval", folder)
    assert (len(code.train), len(code.align), len(code.extract), len(code.validation)) == (318, 80, 20, 46)
    assert {len(p) for p in (task_data("mmlu", folder).align, task_data("mmlu", folder).extract)} == {6}
    with pytest.raises(DataError, match="too few"):
        write_jsonl(folder / "gsm8k" / "train.jsonl", [{"question": "q", "answer": "#### 1"}])
        task_data("gsm8k", folder)


def test_examples_are_written_as_laten_writes_them(folder: Path) -> None:
    example = task_data("gsm8k", folder).train[0]
    n = int(example.prompt.split("train: ")[1].split(" ")[0])
    assert example == Example(
        f"<|user|>\nAnswer the following question.\n\nQuestion: train: {n} plus 1?\n\n<|assistant|>\n",
        f"Answer: It is {n + 1}. Done. So the answer is {n + 1}.",
    )
    example = task_data("mmlu", folder).train[0]
    about = "<|user|>\nThe following are multiple choice questions (with answers) about "
    assert example.prompt.startswith((f"{about}high school physics.\n\n", f"{about}law.\n\n"))
    assert example.response in {f"The answer is: {letter}" for letter in "ABCD"}
    example = task_data("mbpp", folder).train[0]
    assert (
        example.response.startswith("Here is the completed function:\n\n\n```python\ndef f")
        and "return" not in example.prompt
    )


def test_reference_answers_of_a_test_split_are_the_benchmarks_own(folder: Path) -> None:
    asked = load_items("mmlu", folder)
    assert [e.response for e in examples("mmlu", folder)] == [f"The answer is: {'ABCD'[i['answer']]}" for i in asked]
    whole = examples("humaneval", folder)
    assert len(whole) == 164 and all("def " in e.response for e in whole)
    compile(whole[0].response.split("```python\n")[1], "its own solution", "exec")
    own = {"task_id": "Own/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(c): pass"}
    write_jsonl(folder / "humaneval" / "test.jsonl", [own])
    with pytest.raises(DataError, match="Own/0 has no canonical_solution"):
        examples("humaneval", folder)


def test_latens_files_are_read_as_they_are(folder: Path) -> None:
    turn = {"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]}
    for name, n in (("train", 3), ("align", 2), ("extract", 1)):
        write_jsonl(folder / "laten" / "gsm" / f"gsm_{name}_split.jsonl", [turn] * n)
    data = task_data("gsm8k", folder)
    example = Example(wrap("U"), "A")
    assert (data.align, data.extract) == ((example,) * 2, (example,))
    assert (data.train, data.validation) == ((example,) * 2, (example,))  # it has no validation split of its own
    write_jsonl(folder / "laten" / "gsm" / "gsm_align_split.jsonl", [turn, {"messages": []}])
    with pytest.raises(DataError, match="example 2 needs messages"):
        task_data("gsm8k", folder)


def test_contamination_finds_copies_and_not_boilerplate() -> None:
    story = "Janet has sixteen ducks that lay eggs and she sells all of them at the market for two dollars every day"
    boilerplate = "For which of these two scenarios does the main character do something wrong by ordinary standards "
    test = [story, "What is 2 + 2?", *(f"{boilerplate} {i}" for i in range(20))]
    train = [
        "Completely different words that nobody has ever written in quite this order before today, as far as we know",
        story.upper().replace(" ", ",  "),
        "what is 2 2",
        f"{boilerplate} 99",
        f"{story} and then a long new story follows about something else entirely that has nothing to do with ducks",
    ]
    assert contamination(train, test) == [(1, 0, 1.0), (2, 1, 1.0), (4, 0, 1.0)]
    assert contamination([], test) == contamination(train, []) == []


def test_what_is_compared_is_the_question() -> None:
    doc = {"subject": "law", "question": "Who?", "choices": ["a", "b", "c", "d"]}
    assert compared_text(wrap(user(doc))) == "Who?"


def test_a_benchmark_without_a_validation_split_still_validates(folder: Path) -> None:
    for n in (6, 9, 30):
        write_jsonl(folder / "gsm8k" / "train.jsonl", [{"question": f"q{i}", "answer": "#### 1"} for i in range(n)])
        data = task_data("gsm8k", folder)
        parts = [data.train, data.align, data.extract, data.validation]
        assert all(parts) and len({e.prompt for part in parts for e in part}) == n
    turn = {"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]}
    for name in ("train", "align", "extract"):
        write_jsonl(folder / "laten" / "mbpp" / f"mbpp_{name}_split.jsonl", [turn] * 40)
    assert len(task_data("mbpp", folder).validation) == 4
    write_jsonl(folder / "laten" / "mbpp" / "mbpp_validation_split.jsonl", [turn] * 3)
    assert (len(task_data("mbpp", folder).train), len(task_data("mbpp", folder).validation)) == (40, 3)
    (folder / "laten" / "mbpp" / "mbpp_validation_split.jsonl").unlink()
    write_jsonl(folder / "laten" / "mbpp" / "mbpp_train_split.jsonl", [turn])
    with pytest.raises(DataError, match="too few"):
        task_data("mbpp", folder)
    write_jsonl(folder / "laten" / "mbpp" / "mbpp_extract_split.jsonl", [])
    with pytest.raises(DataError, match="no example"):
        task_data("mbpp", folder)


@pytest.mark.parametrize(
    "line",
    [
        "Degree of Q(sqrt(2), sqrt(3)) over Q?,0,4,2,3,1",
        "Q,a,b,c,d,e,B",
        "Q,a,b,c,d,1,B",
        "Q,a,b,c,d,1,",
        "Q,a,b,c,1",
        "Q,a,b,c,d,AB",
        "Q,a,b,c,d,",
        "Q,a,b,c,d,4",
        "Q,a,b,c,d,-1",
        "Q,a,b,c,d,1.0",
    ],
)
@pytest.mark.parametrize("header", [",".join(HEADER) + "\n", "Q0?,a,b,c,d,B\n"])
def test_shifted_fields_are_refused_with_their_line(tmp_path: Path, header: str, line: str) -> None:
    path = tmp_path / "mmlu" / "test" / "algebra_test.csv"
    path.parent.mkdir(parents=True)
    path.write_text(header + line + "\n")
    with pytest.raises(DataError, match=r"algebra_test.csv:2 "):
        load_items("mmlu", tmp_path)


def test_csv_files_of_other_systems_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mmlu" / "test" / "law_test.csv"
    path.parent.mkdir(parents=True)
    rows = 'Q1?,f,t,"u, and v",r,B\r\n\r\n"Q2\u2028\x0b?",f,t,u,r,D\r\n'
    (path.parent / "._law_test.csv").write_bytes(b"\0\5\x16\7\xb0\0")
    wanted = [("Q1?", 1), ("Q2\u2028\x0b?", 3)]
    for text in (rows, ",".join(HEADER) + "\r\n" + rows):  # the original has no header
        for mark in ("", "\ufeff"):
            path.write_bytes((mark + text).encode())
            assert [(i["question"], i["answer"]) for i in load_items("mmlu", tmp_path)] == wanted
            assert {i["subject"] for i in load_items("mmlu", tmp_path)} == {"law"}
    (tmp_path / "mmlu" / "val").mkdir()
    (tmp_path / "mmlu" / "val" / "law_val.csv").write_text("Q?,f,t,u,r,A\n")
    assert [i["subject"] for i in load_items("mmlu", tmp_path, "validation")] == ["law"]
    path.write_bytes("Q1?,caf\u00e9,t,u,r,B\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"law_test.csv:1 is not UTF-8"):
        load_items("mmlu", tmp_path)
    path.write_bytes("question".encode("utf-16"))
    with pytest.raises(DataError, match="is not UTF-8"):
        load_items("mmlu", tmp_path)
    path.write_text('Q1?,"open,t,u,r,B\nQ2?,f,t,u,r,B\n')
    with pytest.raises(DataError, match=r"law_test.csv:\d is not csv"):
        load_items("mmlu", tmp_path)


def test_jsonl_files_of_other_systems_are_read(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k" / "test.jsonl"
    path.parent.mkdir()
    row = '{"question": "Caf\u00e9?", "answer": "#### 7"}'
    path.write_bytes(f"\ufeff{row}\r\n{row}\r\n".encode())
    assert [i["question"] for i in load_items("gsm8k", tmp_path)] == ["Caf\u00e9?"] * 2
    path.write_bytes(b"\n" + row.encode("latin-1"))
    with pytest.raises(DataError, match=r"test.jsonl:2 is not UTF-8"):
        load_items("gsm8k", tmp_path)
    path.unlink()
    packed = tmp_path / "gsm8k" / "test.jsonl.gz"
    packed.write_bytes(gzip.compress(row.encode()))
    assert len(load_items("gsm8k", tmp_path)) == 1
    for damaged in (packed.read_bytes()[:-9], b"no archive", gzip.compress(row.encode())[:12] + b"\xff" * 40):
        packed.write_bytes(damaged)
        with pytest.raises(DataError, match=r"test.jsonl.gz cannot be read"):
            load_items("gsm8k", tmp_path)


GOOD: dict[str, dict[str, Any]] = {
    "mmlu": {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 0},
    "gsm8k": {"question": "q", "answer": "#### 1"},
    "humaneval": {"task_id": "T/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(c): pass"},
    "mbpp": {"task_id": 11, "text": "t", "code": "def f(): pass", "test_list": ["assert f() is None"]},
}
BAD: list[tuple[str, dict[str, Any]]] = [
    ("mmlu", {"choices": "wxyz"}), ("mmlu", {"choices": {"a": 1, "b": 2, "c": 3, "d": 4}}), ("mmlu", {"answer": True}),
    ("mmlu", {"choices": ["a", "b", "c", 4]}), ("mmlu", {"choices": ["a", "b", "c", None]}), ("mmlu", {"answer": "B"}),
    ("mmlu", {"answer": 1.0}), ("mmlu", {"answer": -1}), ("mmlu", {"answer": None}), ("mmlu", {"question": None}),
    ("mmlu", {"choices": None}), ("mmlu", {"choices": ["a"] * 5}), ("mmlu", {"subject": 3}),
    ("mmlu", {"question": "\ud800"}), ("mmlu", {"choices": ["a", "b", "c", "\ud800"]}),
    ("gsm8k", {"answer": 7}), ("gsm8k", {"answer": None}), ("gsm8k", {"answer": ["#### 7"]}),
    ("gsm8k", {"question": 3}),
    ("gsm8k", {"answer": "7"}), ("gsm8k", {"answer": "#### seven"}), ("gsm8k", {"question": {"text": "q"}}),
    ("humaneval", {"entry_point": "f()"}), ("humaneval", {"entry_point": ""}), ("humaneval", {"test": ["assert f()"]}),
    ("humaneval", {"prompt": None}), ("humaneval", {"canonical_solution": 3}), ("humaneval", {"task_id": None}),
    ("mbpp", {"test_list": "assert f()"}), ("mbpp", {"test_list": [1]}), ("mbpp", {"code": None}),
    ("mbpp", {"text": 1}),
    ("mbpp", {"task_id": [1]}), ("mbpp", {"test_setup_code": 1}), ("mbpp", {"task_id": 1.5}),
    ("mbpp", {"test_list": None}),
]  # fmt: skip


@pytest.mark.parametrize(("task", "change"), BAD)
def test_rows_of_another_shape_are_refused(task: str, change: dict[str, Any]) -> None:
    assert len(load_items(task, [GOOD[task]])) == 1
    with pytest.raises(DataError, match="the given rows: question 2 "):
        load_items(task, [GOOD[task], {**GOOD[task], **change}])


@pytest.mark.parametrize("row", [None, 3, "question", ["question"]])
def test_what_is_no_row_is_refused(row: Any) -> None:
    with pytest.raises(DataError, match=r"question 1 is .* not a row"):
        load_items("gsm8k", [row])


def test_the_callers_rows_stay_as_they_are() -> None:
    row = dict(GOOD["mmlu"])
    load_items("mmlu", [row])
    assert row == GOOD["mmlu"]


def test_humanevals_own_file_name_is_known_and_others_are_not_passed_over(tmp_path: Path) -> None:
    row = {**GOOD["humaneval"], "task_id": "Mine/0"}
    place = tmp_path / "humaneval"
    write_jsonl(place / "HumanEval.jsonl", [row])
    assert [i["id"] for i in load_items("humaneval", tmp_path)] == ["Mine/0"]
    (place / "HumanEval.jsonl").unlink()
    (place / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    assert [i["id"] for i in load_items("humaneval", tmp_path)] == ["Mine/0"]
    (place / "HumanEval.jsonl.gz").rename(place / "mine.jsonl.gz")
    with pytest.raises(DataError, match=r"has mine.jsonl.gz and neither"):
        load_items("humaneval", tmp_path)


def test_a_relative_folder_is_found_or_its_absolute_path_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("SEMALIGN_DATA", folder.name)
    assert len(load_items("gsm8k")) == 7 and len(task_data("gsm8k").train) == 1000
    below = folder / "notebooks"
    below.mkdir()
    monkeypatch.chdir(below)
    with pytest.raises(DataError, match=f"{below / folder.name} is no folder"):
        load_items("gsm8k")
    with pytest.raises(DataError, match=f"{below / folder.name} is no folder"):
        task_data("mbpp")
    monkeypatch.setattr(files, "_ROOT", folder.parent)  # the repository's
    assert len(load_items("gsm8k")) == 7
    (folder / "gsm8k" / "test.jsonl").unlink()
    with pytest.raises(DataError, match=str(folder / "gsm8k" / "test.jsonl")):
        load_items("gsm8k")
