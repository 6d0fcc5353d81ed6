"""The chapters: their order, what they need, what decides whether one runs again, and one run through papermill."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
from traitlets.config import Config

from semalign.pipeline import forks
from semalign.planning.plan import trials_shared
from semalign.planning.preflight import preflight
from semalign.planning.stamps import BUT_FOR, stamp, stamped, unstamp
from semalign.profiles import Profile, ProfileError, declared, load_profile

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = ROOT / "notebooks"
SOCKET = 100  # characters of the path of a socket, and few more, that every Unix takes

NEEDS: dict[str, tuple[Callable[[Profile], bool], str]] = {
    **{
        task: (lambda p, task=task: task in p.tasks, f"the task {task}, which this profile leaves out")  # type: ignore[misc]
        for task in declared("benchmarks")
    },
    "programs": (lambda p: bool(p.code_tasks), "a task whose answers are programs"),
    "kept run": (lambda p: (ROOT / "book" / "full_run" / "version.json").exists(), "the kept numbers of a full run"),
}
"""What a chapter can need: how a profile is asked for it, and what it is called where it is missing."""


@dataclass(frozen=True)
class Chapter:
    """The notebooks that a chapter reads from, where the profile has them, and its ``needs``, keys of ``NEEDS``.

    ``of_task``: it is about this one. Which trials it reads the plan knows, which gives their jobs time and memory.
    """

    reads: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    of_task: str = ""


ORDER: dict[str, Chapter] = {
    "00_models_and_data": Chapter(),
    "01_semantics": Chapter(),
    "02_importance": Chapter(reads=("00_models_and_data",)),
    "03_pairing": Chapter(reads=("02_importance",)),
    "04_alignment": Chapter(reads=("03_pairing",)),
    "04b_gates": Chapter(),
    "05_mmlu": Chapter(reads=("04b_gates",), needs=("mmlu",), of_task="mmlu"),
    "06_gsm8k": Chapter(reads=("04b_gates",), needs=("gsm8k",), of_task="gsm8k"),
    "07_humaneval": Chapter(reads=("04b_gates",), needs=("humaneval",), of_task="humaneval"),
    "08_mbpp": Chapter(reads=("04b_gates",), needs=("mbpp",), of_task="mbpp"),
    "09_fine_tuned_teachers": Chapter(needs=("programs",)),
    "10_similarity": Chapter(),
    "11_ablations": Chapter(),
    "12_controls": Chapter(),
    "12b_students": Chapter(reads=("05_mmlu", "06_gsm8k", "07_humaneval", "08_mbpp")),
    "13_rivals": Chapter(),
    "13b_regimes": Chapter(),
    "14_search": Chapter(),
    "16_below_the_layer": Chapter(),
    "17_causal": Chapter(),
    "18_pairing_from_outputs": Chapter(),
    "19_larger_gaps": Chapter(),
    "20_version_two": Chapter(),
    "21_second_family": Chapter(),
    "22_two_vocabularies": Chapter(),
    "15_paper_against_ours": Chapter(
        reads=(
            "01_semantics", "04_alignment", "04b_gates", "05_mmlu", "06_gsm8k", "07_humaneval", "08_mbpp",
            "09_fine_tuned_teachers", "10_similarity", "11_ablations", "12_controls", "12b_students", "13b_regimes",
            "14_search", "16_below_the_layer", "17_causal", "18_pairing_from_outputs", "19_larger_gaps",
            "20_version_two", "21_second_family", "22_two_vocabularies",
        )
    ),
    "90_cost": Chapter(),
    "91_pico": Chapter(),
    "92_smollm2": Chapter(),
    "93_full_run": Chapter(needs=("kept run",)),
}  # fmt: skip
"""Every chapter."""

KEPT_ELSEWHERE = ("90_cost", "91_pico", "92_smollm2", "93_full_run")
"""The notebooks that a profile says nothing to."""


class NotebookFailed(RuntimeError):
    """A notebook stopped with an error; the message names the notebook, the cell and the error."""


def missing(p: Profile) -> dict[str, str]:
    """The chapters that a profile leaves out, and what each of them lacks."""
    lacks = {name: [NEEDS[need][1] for need in c.needs if not NEEDS[need][0](p)] for name, c in ORDER.items()}
    return {name: f"needs {' and '.join(what)}" for name, what in lacks.items() if what}


def chapters_of(p: Profile) -> dict[str, Chapter]:
    """The chapters that a profile runs, reading from those that it runs."""
    out = missing(p)
    left = {name: chapter for name, chapter in ORDER.items() if name not in out}
    return {n: replace(c, reads=tuple(r for r in c.reads if r in left)) for n, c in left.items()}


def trials_of(p: Profile, name: str) -> list[str]:
    """The trials that are made in jobs before a chapter, as paths below ``artefacts/trials``.

    None where the profile has no ``trial_jobs``: there the notebook runs them itself, one after another.
    """
    return [trial_file(*of) for of in _trials_before(p, name)]


def trial_file(task: str, method: str, seed: int) -> str:
    """Where a trial is kept below ``artefacts/trials``."""
    return f"{task}/{method}-{seed}.json"


def trial_jobs(p: Profile, together: int) -> list[tuple[str, list[tuple[str, int]]]]:
    """The jobs that make the trials of a profile's chapters: a task, and methods with seeds, ``together`` at most.

    Raises:
        ProfileError: ``together`` is no number of trials.
    """
    if not isinstance(together, int) or together < 1:
        raise ProfileError(f"together={together} is no number of trials for a job: give 1 or more")
    wanted = dict.fromkeys(of for name in chapters_of(p) for of in _trials_before(p, name))
    by_task = {task: [of for of in wanted if of[0] == task] for task in p.tasks}
    return [
        (task, [(method, seed) for _, method, seed in trials[at : at + together]])
        for task, trials in by_task.items()
        for at in range(0, len(trials), together)
    ]


def _trials_before(p: Profile, name: str) -> list[tuple[str, str, int]]:
    shared = trials_shared(p, name) if p.trial_jobs else []
    return [(task, method, seed) for task, method, often in shared for seed in p.seeds[:often]]


def cells_of(notebook: nbformat.NotebookNode) -> list[tuple[str, str, list[str], dict[str, Any]]]:
    """What a notebook says and does, without outputs and counts: type, source, tags and caption of each cell."""
    cells = []
    for cell in notebook.cells:
        said = cell.metadata
        if "injected-parameters" in said.get("tags", []):  # papermill's, in an executed copy
            continue
        cells.append((cell.cell_type, cell.source, sorted(said.get("tags", [])), dict(said.get("mystnb", {}))))
    return cells


def digest(*parts: object) -> str:
    """Sixteen hexadecimal digits over anything that json can tell apart."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def contents(paths: Iterable[Path]) -> list[tuple[str, str]]:
    """Files by their path in the repository, and the hash of each."""
    return [(p.relative_to(ROOT).as_posix(), hashlib.sha256(p.read_bytes()).hexdigest()) for p in sorted(paths)]


def _code() -> list[tuple[str, str]]:
    """Everything in ``semalign`` that is read at run time, and the lock file; a manifest stands for the weights."""
    kept = {".py", ".yaml", ".json", ".csv"}
    tree = [p for p in (ROOT / "semalign").rglob("*") if p.suffix in kept and "__pycache__" not in p.parts]
    return contents([*tree, ROOT / "requirements.lock"])


def _data_of(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """The data files of the book that a notebook names, by themselves or by their folder."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    files = [
        p for p in (ROOT / "book").rglob("*") if p.suffix in (".json", ".yaml", ".npz") and "_build" not in p.parts
    ]
    folders = {p.parent.name for p in files} - {"book"}
    named = {folder for folder in folders if f'"{folder}"' in text or f"{folder}/" in text}
    return contents(p for p in files if p.name in text or p.parent.name in named)


def run_digest(p: Profile) -> str:
    """The hash of what can change a trial; which of it really does, the trial's own key decides."""
    return digest(_code(), p.model_dump(mode="json"))


def digests(p: Profile, last: str | None = None) -> dict[str, str]:
    """One hash a notebook over all that determines its result: source, profile, code, data, and what it reads.

    Of all chapters, or of those that the notebook ``last`` needs, and its own.
    """
    shared, run = run_digest(p), chapters_of(p)
    wanted = set(run) if last is None else {last}
    for name in reversed(run):
        wanted |= set(run[name].reads) if name in wanted else set()
    hashes: dict[str, str] = {}
    for name, chapter in ((name, chapter) for name, chapter in run.items() if name in wanted):
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        hashes[name] = digest(shared, cells_of(notebook), _data_of(notebook), [hashes[b] for b in chapter.reads])
    return hashes


def adopt(results: Path, values: Mapping[str, str]) -> None:
    """Stamp the finished notebooks of a folder that was put together by hand, where their cells are those of today.

    ``values`` are the digests of today, by notebook. What was made with values that differ from the profile's is none.
    """
    for name, value in values.items():
        output = results / "metrics" / f"{name}.json"
        if output.exists() and not stamped(output) and not _changed(output) and _same_cells(results, name):
            stamp(output, value)


def _changed(metrics: Path) -> bool:
    """Whether the values behind a notebook's metrics differed from its profile's, as they themselves say."""
    try:
        return BUT_FOR in json.loads(metrics.read_text(encoding="utf-8"))["provenance"]["profile"]
    except (ValueError, KeyError, TypeError):
        return False


def _same_cells(results: Path, name: str) -> bool:
    try:
        made = cells_of(nbformat.read(results / "notebooks" / f"{name}.ipynb", as_version=4))
    except (OSError, ValueError):
        return False
    return made == cells_of(nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4))


def _section(cells: list[nbformat.NotebookNode], index: int) -> str:
    """The heading that a cell stands under, for the progress lines."""
    above = "\n".join(c.source for c in cells[:index] if c.cell_type == "markdown").splitlines()
    return next((line.lstrip("# ") for line in reversed(above) if line.startswith("#")), "")


def leave_the_user_out(empty: Path) -> None:
    """Keep from kernels what their user's environment would put on a page; they keep their own files in ``empty``."""
    # A kernel of papermill has no widgets, and says so on the page of every notebook that imports tqdm.
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    os.environ.pop("MPLBACKEND", None)  # with a caller's backend a page has no figures
    os.environ.pop("JUPYTER_PATH", None)  # nor is another kernel of the same name meant
    os.environ["IPYTHONDIR"] = str(empty / "ipython")  # where a user's start-up files would print
    try:
        at_home = os.access(Path.home(), os.W_OK)
    except RuntimeError:  # a user without an entry, as in containers
        at_home = False
    if not at_home:  # libraries would report it
        os.environ |= {"MPLCONFIGDIR": str(empty / "matplotlib"), "JUPYTER_RUNTIME_DIR": str(empty / "jupyter")}
        os.environ["XDG_CACHE_HOME"] = str(empty / "cache")


def sockets_of(folder: Path) -> Config:
    """Files for a kernel to talk by: of ports, which are chosen before it binds them, two kernels can get the same."""
    place = str(folder / "k")
    if os.name != "posix" or len(os.fsencode(place)) > SOCKET:
        return Config()
    return Config({"KernelManager": {"transport": "ipc", "ip": place}})


def run_notebook(name: str, profile: str, results: Path, planned: str = "") -> Path:
    """Execute one notebook for a profile, by its name or path; ``planned`` is the digest that its run counts on.

    The executed copy goes to ``results/notebooks``; where a cell fails, the copy up to and with the traceback.

    Raises:
        ProfileError: the profile is unknown or malformed, or allows less than the notebook needs.
        NotebookFailed: a cell raised, the kernel died, the notebook left no metrics file, or something that it depends
            on has changed since the run was planned.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    p = load_profile(profile)
    preflight(p, results)
    source, target = NOTEBOOKS / f"{name}.ipynb", results / "notebooks" / f"{name}.ipynb"
    metrics = results / "metrics" / f"{name}.json"
    for folder in (target.parent, metrics.parent, results / "artefacts"):
        folder.mkdir(parents=True, exist_ok=True)
    unstamp(metrics)
    metrics.unlink(missing_ok=True)
    made_from = digests(p, name).get(name, "")
    if planned and planned != made_from:
        raise NotebookFailed(f"what notebook {name} depends on was changed while the run went on: call it again")
    own = tempfile.TemporaryDirectory()
    leave_the_user_out(Path(own.name))
    if forks.ADDRESS in os.environ:
        forks.kernel_of_forks(Path(own.name))
    started, at = time.monotonic(), [0]

    class Progress(papermill.engines.NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **kwargs: Any) -> None:
            begin, end, save, cells = nb_man.cell_start, nb_man.cell_complete, nb_man.save, nb_man.nb.cells

            def announce(cell: Any, cell_index: int = 0, **kw: Any) -> None:
                at[0] = cell_index
                if cell.cell_type == "code":
                    when = f"{time.monotonic() - started:6.1f} s  cell {cell_index + 1}/{len(cells)}"
                    print(f"[{name}] {when}  {_section(cells, cell_index)}", flush=True)
                unsaved(begin, cell, cell_index, **kw)
                if cell.cell_type == "code":
                    save()

            def unsaved(step: Callable[..., None], *args: Any, **kw: Any) -> None:
                nb_man.save = lambda **_: None
                try:
                    step(*args, **kw)
                finally:
                    nb_man.save = save

            # The copy is saved before a cell runs, with all that ran before it, and not four times between two of them.
            nb_man.cell_start, nb_man.cell_complete = announce, partial(unsaved, end)
            quiet = ["--IPKernelApp.log_level=50"]  # the kernel reports its transport and its shutdown
            told = sockets_of(Path(own.name))
            super().execute_managed_notebook(nb_man, kernel_name, extra_arguments=quiet, config=told, **kwargs)

    papermill.engines.papermill_engines.register("progress", Progress)
    given = {"profile": profile, "results": str(results)}
    try:
        papermill.execute_notebook(
            str(source), str(target), parameters=given, engine_name="progress", kernel_name="python3",
            cwd=str(NOTEBOOKS), progress_bar=False, log_output=False,
        )  # fmt: skip
    except PapermillExecutionError as error:
        raise NotebookFailed(
            f"notebook {name} failed in cell {error.cell_index}: {error.ename}: {error.evalue}\n"
            f"the cell:\n{error.source}\nthe executed part, with the traceback: {target}"
        ) from None
    except DeadKernelError:
        raise NotebookFailed(
            f"the kernel of notebook {name} died in cell {at[0] + 1}, as it does where memory runs out: give it more, "
            f"or lower eval_batch_size; the part that had run: {target}"
        ) from None
    if not metrics.exists():
        raise NotebookFailed(f"notebook {name} saved no metrics to {metrics}: end it with report.save_metrics")
    stamp(metrics, made_from)
    print(f"[{name}] {time.monotonic() - started:6.1f} s  done", flush=True)
    return target
