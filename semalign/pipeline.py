"""The pipeline: notebooks in order through papermill, then the book. Snakemake decides what runs; this does it.

``python -m semalign.pipeline run PROFILE`` is what ``make book`` calls.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
import yaml

from semalign.profiles import ProfileError, load_profile, parameters

ROOT = Path(__file__).resolve().parent.parent

ORDER: dict[str, tuple[str, ...]] = {
    "00_models_and_data": (),
    "01_semantics": (),
    "02_importance": ("00_models_and_data",),
    "03_pairing": ("02_importance",),
    "04_alignment": ("03_pairing",),
    "05_mmlu": (),
    "06_gsm8k": (),
    "07_humaneval": (),
    "08_mbpp": (),
    "09_fine_tuned_teachers": (),
    "10_similarity": (),
    "11_ablations": (),
    "12_controls": (),
    "13_rivals": (),
    "14_search": (),
    "15_paper_against_ours": (
        "01_semantics", "04_alignment", "05_mmlu", "06_gsm8k", "07_humaneval", "08_mbpp", "09_fine_tuned_teachers",
        "10_similarity", "11_ablations", "12_controls", "14_search",
    ),
    "90_cost": (),
    "91_pico": (),
    "92_smollm2": (),
    "93_full_run": (),
}  # fmt: skip
"""Every notebook, and the notebooks whose artefacts or numbers it reads, where the profile has them."""

BENCHMARKS = {"05_mmlu": "mmlu", "06_gsm8k": "gsm8k", "07_humaneval": "humaneval", "08_mbpp": "mbpp"}
"""The notebooks that are of one task, and run where the profile has it."""

KEPT_ELSEWHERE = ("90_cost", "91_pico", "92_smollm2", "93_full_run")
"""The notebooks that a profile says nothing to."""

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
"""The grid of learning rates, the same for every method."""

_LOCKS: list[Any] = []  # open lock files: closing one would release it


class NotebookFailed(RuntimeError):
    """A notebook stopped with an error; the message names the notebook, the cell and the error."""


def sources(notebook: nbformat.NotebookNode) -> list[tuple[str, str, list[str], dict[str, Any]]]:
    """What a notebook says and does, without outputs and counts: type, source, tags and caption of each cell."""
    found = []
    for cell in notebook.cells:
        said = cell.metadata
        found.append((cell.cell_type, cell.source, sorted(said.get("tags", [])), dict(said.get("mystnb", {}))))
    return found


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _files(paths: Iterable[Path]) -> list[tuple[str, str]]:
    return [(p.relative_to(ROOT).as_posix(), hashlib.sha256(p.read_bytes()).hexdigest()) for p in sorted(paths)]


def _code() -> list[tuple[str, str]]:
    """Everything in ``semalign`` that is read at run time, and the lock file."""
    kept = {".py", ".yaml", ".json", ".csv", ".safetensors"}
    tree = [p for p in (ROOT / "semalign").rglob("*") if p.suffix in kept and "__pycache__" not in p.parts]
    return _files([*tree, ROOT / "requirements.lock"])


def _data_of(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """The data files of the book that a notebook names, by themselves or by their folder."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    found = []
    for path in (ROOT / "book").rglob("*"):
        names = [path.relative_to(ROOT).as_posix(), path.parent.relative_to(ROOT).as_posix()]
        wanted = f"../{names[0]}" in text or (names[1] != "book" and f"../{names[1]}" in text)
        if path.suffix in (".json", ".yaml") and wanted:
            found.append(path)
    return _files(found)


def notebooks_of(profile: str) -> dict[str, tuple[str, ...]]:
    """Those of ``ORDER`` that a profile runs: all but the chapters of tasks that it leaves out."""
    tasks = load_profile(profile).tasks
    left = {name: before for name, before in ORDER.items() if BENCHMARKS.get(name, tasks[0]) in tasks}
    return {name: tuple(b for b in before if b in left) for name, before in left.items()}


def trials_of(profile: str, name: str) -> list[str]:
    """The trials that are jobs of their own before a notebook, as paths below ``artefacts/trials``.

    None where the profile has no ``trial_jobs``: there the notebook runs them itself, one after another.
    """
    chosen = load_profile(profile)
    task = BENCHMARKS.get(name) if chosen.trial_jobs else None
    alone = dict.fromkeys(("teacher", "none"), chosen.seeds[:1])  # as trials.seeds_of, whose import takes seconds
    seeds = {**dict.fromkeys(chosen.methods, chosen.seeds), **alone}
    return [f"{task}/{method}-{seed}.json" for method, own in seeds.items() for seed in own] if task else []


def trial_digest(profile: str) -> str:
    """The hash of what can change a trial; which of it really does, the trial's own key decides."""
    return _digest(_code(), parameters(load_profile(profile)))


def digests(profile: str) -> dict[str, str]:
    """One hash a notebook over all that determines its result: source, parameters, code, data, and what it reads.

    Raises:
        ProfileError: the profile is unknown or malformed.
    """
    shared = trial_digest(profile)
    found: dict[str, str] = {}
    for name, before in notebooks_of(profile).items():
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        found[name] = _digest(shared, sources(notebook), _data_of(notebook), [found[b] for b in before])
    return found


def book_sources() -> list[str]:
    """The prose, configuration and static files of the book, relative to the repository."""
    kept = [p for p in (ROOT / "book").rglob("*") if p.is_file() and "_build" not in p.parts]
    return [p.relative_to(ROOT).as_posix() for p in [*sorted(kept), ROOT / "_config.yml", ROOT / "_toc.yml"]]


def book_digest(profile: str) -> str:
    """The hash of all that determines the built book."""
    return _digest(digests(profile), _files(ROOT / p for p in book_sources()))


def lock(results: str) -> None:
    """Refuse a second run over the same results while one is alive. The lock ends with its process, however it ends.

    Raises:
        RuntimeError: another process holds it.
    """
    import fcntl

    Path(results).mkdir(parents=True, exist_ok=True)
    handle = open(Path(results) / ".lock", "w")  # noqa: SIM115 - held open on purpose
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise RuntimeError(f"another run is writing to {results}; wait for it to end, or stop it") from None
    _LOCKS.append(handle)


def _watch(pids: list[int]) -> None:
    """Stop this process, and with it its kernel, once one of ``pids`` is gone (a killed make leaves nothing behind)."""

    def loop() -> None:
        while True:
            for pid in pids:
                try:
                    os.kill(pid, 0)
                except ProcessLookupError:
                    os._exit(1)
                except PermissionError:
                    pass
            time.sleep(0.5)

    threading.Thread(target=loop, daemon=True).start()


def _section(cells: list[nbformat.NotebookNode], index: int) -> str:
    """The heading that a cell stands under, for the progress lines."""
    above = "\n".join(c.source for c in cells[:index] if c.cell_type == "markdown").splitlines()
    return next((line.lstrip("# ") for line in reversed(above) if line.startswith("#")), "")


def run_notebook(name: str, profile: str, results: Path) -> Path:
    """Execute one notebook with the profile's values for the parameters that it declares.

    The executed copy goes to ``results/notebooks``; where a cell fails, the copy up to and with the traceback.

    Raises:
        NotebookFailed: a cell raised, or the notebook left no metrics file.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    source, target = ROOT / "notebooks" / f"{name}.ipynb", results / "notebooks" / f"{name}.ipynb"
    metrics = results / "metrics" / f"{name}.json"
    for folder in (target.parent, metrics.parent, results / "artefacts"):
        folder.mkdir(parents=True, exist_ok=True)
    metrics.unlink(missing_ok=True)
    declared = set(papermill.inspect_notebook(str(source)))
    given = {k: v for k, v in parameters(load_profile(profile)).items() if k in declared}
    given["results"] = os.path.relpath(results, ROOT / "notebooks")
    given["profile"] = profile
    # A kernel of papermill has no widgets, and says so on the page of every notebook that imports tqdm.
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    started = time.monotonic()

    class Progress(papermill.engines.NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **kwargs: Any) -> None:
            begin, cells = nb_man.cell_start, nb_man.nb.cells

            def announce(cell: Any, cell_index: int = 0, **kw: Any) -> None:
                if cell.cell_type == "code":
                    at = f"{time.monotonic() - started:6.1f} s  cell {cell_index + 1}/{len(cells)}"
                    print(f"[{name}] {at}  {_section(cells, cell_index)}", flush=True)
                begin(cell, cell_index, **kw)

            nb_man.cell_start = announce
            quiet = ["--IPKernelApp.log_level=50"]  # the kernel reports its transport and its shutdown
            super().execute_managed_notebook(nb_man, kernel_name, extra_arguments=quiet, **kwargs)

    papermill.engines.papermill_engines.register("progress", Progress)
    try:
        papermill.execute_notebook(
            str(source), str(target), parameters=given, engine_name="progress", kernel_name="python3",
            cwd=str(ROOT / "notebooks"), progress_bar=False, log_output=False,
        )  # fmt: skip
    except PapermillExecutionError as error:
        raise NotebookFailed(
            f"notebook {name} failed in cell {error.cell_index}: {error.ename}: {error.evalue}\n"
            f"the cell:\n{error.source}\nthe executed part, with the traceback: {target}"
        ) from None
    if not metrics.exists():
        raise NotebookFailed(f"notebook {name} ran to its end but saved no metrics to {metrics}")
    print(f"[{name}] {time.monotonic() - started:6.1f} s  done", flush=True)
    return target


def _made(name: str, notebook: nbformat.NotebookNode, results: Path) -> str:
    """The block under a notebook that says how it was made."""
    from semalign.report import load_metrics, provenance_table

    _, provenance = load_metrics(results / "metrics" / f"{name}.json")
    seconds = notebook.metadata.papermill.duration
    return f"## How this page was made\n\n{provenance_table({**provenance, 'wall_s': seconds})}\n"


def stage_book(profile: str, results: Path) -> Path:
    """Lay the prose, the executed notebooks and the configuration side by side, as the book's source folder.

    Pages keep their paths in the repository, which the launch buttons need.
    """
    stage = results / "book"
    shutil.rmtree(stage, ignore_errors=True)
    for path in book_sources():
        (stage / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, stage / path)
    shutil.copy(results / "artefacts" / "main_figure.svg", stage / "book")
    (stage / "notebooks").mkdir()
    toc = yaml.safe_load((stage / "_toc.yml").read_text(encoding="utf-8"))
    missing = {f"notebooks/{name}" for name in set(ORDER) - set(notebooks_of(profile))}
    for part in toc["parts"]:
        part["chapters"] = [c for c in part["chapters"] if c["file"] not in missing]
    toc["parts"] = [part for part in toc["parts"] if part["chapters"]]
    (stage / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False), encoding="utf-8")
    for name in notebooks_of(profile):
        notebook = nbformat.read(results / "notebooks" / f"{name}.ipynb", as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":  # folded on the page: the story is in the text and the figures
                cell.metadata.tags = [*cell.metadata.get("tags", []), "hide-input"]
        notebook.cells.append(nbformat.v4.new_markdown_cell(_made(name, notebook, results)))
        nbformat.write(notebook, stage / "notebooks" / f"{name}.ipynb")
    return stage


def build_book(profile: str, results: Path) -> Path:
    """Build the staged book with warnings as errors; returns the path of its ``index.html``.

    Raises:
        RuntimeError: Sphinx warned or failed; its output has been printed.
    """
    stage = stage_book(profile, results)
    jupyter_book = str(Path(sys.executable).with_name("jupyter-book"))
    command = [jupyter_book, "build", str(stage), "-W", "-n", "--keep-going", "-q"]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    index = stage / "_build" / "html" / "index.html"
    if done.returncode or not index.exists():
        print(done.stdout)
        index.unlink(missing_ok=True)
        raise RuntimeError("the book did not build; the warnings above are errors")
    return index


def run_trial(profile: str, task: str, method: str, seed: int, results: Path) -> None:
    """One trial of a profile, in the file that the notebooks look for."""
    from semalign import trials

    settings, started = parameters(load_profile(profile)), time.monotonic()
    trials.run_trial(settings, task, method, seed, results / "artefacts" / "trials", others=settings["others"])
    print(f"[{task}] {time.monotonic() - started:6.1f} s  {method}, seed {seed}", flush=True)


def choose_rates(profile: str) -> Path:
    """Try every method of a profile at the rates of the grid, and keep scores and choices in ``book/rates``.

    The trials are kept in the profile's results, so that a run that was stopped goes on where it was.
    """
    from semalign import trials
    from semalign.report import save_metrics

    settings, target = parameters(load_profile(profile)), ROOT / "book" / "rates" / f"{profile}.json"
    scores = trials.grid(settings, RATES, ROOT / "results" / profile / "artefacts" / "rates")
    chosen = {method: trials.choose_rate(of_rates) for method, of_rates in scores.items()}
    found = {"tasks": settings["tasks"], "examples": settings["sizes"], "epochs": settings["epochs"]}
    metrics = {**found, "scores": scores, "chosen": chosen, "code": trials.code_key()}
    save_metrics(target, metrics, seeds=settings["seeds"][:1], profile=profile)
    return target


def keep(profile: str) -> Path:
    """Copy the metrics of a finished run to ``book/full_run``, with the version of the code that they belong to.

    Raises:
        RuntimeError: a notebook has no metrics yet; nothing is copied then.
    """
    from semalign.report import load_metrics, save_metrics
    from semalign.trials import code_key

    source, target = ROOT / "results" / profile / "metrics", ROOT / "book" / "full_run"
    names = [name for name in notebooks_of(profile) if name not in KEPT_ELSEWHERE]
    if missing := [name for name in names if not (source / f"{name}.json").exists()]:
        raise RuntimeError(f"{profile} has no numbers of {', '.join(missing)}: call make notebooks PROFILE={profile}")
    _, made = load_metrics(source / f"{names[-1]}.json")
    save_metrics(target / "version.json", {"code": code_key()}, seeds=made["seeds"], profile=profile)
    for name in names:
        shutil.copyfile(source / f"{name}.json", target / f"{name}.json")
    return target


def run(profile: str, cores: str, until: str) -> int:
    """Call Snakemake for one profile and print where the book is.

    Raises:
        ProfileError: the profile is unknown or malformed, or asks for programs and does not allow them.
    """
    chosen = load_profile(profile)
    programs = [task for task in chosen.tasks if task in ("humaneval", "mbpp")]
    if programs and not chosen.allow_code_execution:
        raise ProfileError(
            f"profile {profile} has {' and '.join(programs)}, which run programs that a model wrote: set "
            f"allow_code_execution: true in it to have them run in the sandbox, or take the tasks out"
        )
    command = [
        sys.executable, "-m", "snakemake", until, "--snakefile", str(ROOT / "Snakefile"), "--directory", str(ROOT),
        "--cores", cores, "--resources", "gpu=1", "--nolock", "--rerun-incomplete",
        "--config", f"profile={profile}", "--rerun-triggers", "params", "input",
        "--quiet", "rules", "progress", "host", "reason",
    ]  # fmt: skip
    code = subprocess.run(command).returncode
    if code == 0 and until == "book":
        print(f"the book: {ROOT / 'results' / profile / 'book' / '_build' / 'html' / 'index.html'}")
    return code


def main(argv: list[str] | None = None) -> int:
    """The command line: ``run``, ``rates``, ``keep``; and, for the Snakefile, ``notebook``, ``trial`` and ``book``."""
    parser = argparse.ArgumentParser(prog="python -m semalign.pipeline", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    whole = verbs.add_parser("run", help="run a profile's notebooks and build its book")
    whole.add_argument("profile")
    whole.add_argument("--cores", default="all")
    whole.add_argument("--until", default="book", choices=["book", "notebooks"])
    one = verbs.add_parser("notebook", help="run one notebook")
    one.add_argument("name", choices=list(ORDER))
    one.add_argument("profile")
    one.add_argument("--results", type=Path, required=True)
    trial = verbs.add_parser("trial", help="run one method on one task under one seed")
    trial.add_argument("profile")
    trial.add_argument("task")
    trial.add_argument("method")
    trial.add_argument("seed", type=int)
    trial.add_argument("--results", type=Path, required=True)
    for name, say in {"rates": "choose the methods' learning rates", "keep": "keep a run's numbers"}.items():
        verbs.add_parser(name, help=say).add_argument("profile")
    book = verbs.add_parser("book", help="build the book from executed notebooks")
    book.add_argument("profile")
    book.add_argument("--results", type=Path, required=True)
    given = parser.parse_args(argv)
    _watch([int(os.environ[k]) for k in ("SEMALIGN_MAKE_PID", "SEMALIGN_PIPELINE_PID") if os.environ.get(k)])
    try:
        if given.verb == "run":
            return run(given.profile, given.cores, given.until)
        if given.verb == "notebook":
            run_notebook(given.name, given.profile, given.results.resolve())
        elif given.verb == "trial":
            run_trial(given.profile, given.task, given.method, given.seed, given.results.resolve())
        elif given.verb in ("rates", "keep"):
            print({"rates": choose_rates, "keep": keep}[given.verb](given.profile))
        else:
            build_book(given.profile, given.results.resolve())
    except (ProfileError, NotebookFailed, RuntimeError) as error:
        print(f"semalign: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
