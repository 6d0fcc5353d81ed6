"""The command line: ``run``, ``tune``, ``keep``, ``pdf``, ``slides``; and what the Snakefile calls."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from semalign.lm.files import read_json
from semalign.pipeline.notebooks import KEPT_ELSEWHERE, ORDER, ROOT, chapters_of, preflight, run_digest, stamp
from semalign.profiles import Profile, load_profile

_LOCKS: list[Any] = []  # open lock files: closing one would release it


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


OWNERS = ("SEMALIGN_MAKE", "SEMALIGN_RUN", "SEMALIGN_SNAKEMAKE")
"""Where a process of a run finds those that it must not outlive, as HOST:PID: on another host of a cluster it may."""


def own(name: str, pid: int) -> None:
    """Let what this process starts know that it must not outlive ``pid``, under one of :data:`OWNERS`."""
    os.environ[name] = f"{socket.gethostname()}:{pid}"


def watch_owners() -> None:
    """Stop this process, and with it its kernel, once one of its owners is gone: a kill leaves nothing behind."""
    of_name = (os.environ.get(name, "").rpartition(":") for name in OWNERS)
    pids = [int(pid) for host, _, pid in of_name if pid and host == socket.gethostname()]

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


def make_trial(profile: str, task: str, method: str, seed: int, results: Path) -> None:
    """One trial of a profile, in the file that the notebooks look for."""
    from semalign.study import trials

    p, started = load_profile(profile), time.monotonic()
    preflight(p)
    folder = results / "artefacts" / "trials"
    trials.run_trial(p, task, method, seed, folder, others=p.others)
    stamp(folder / task / f"{method}-{seed}.json", run_digest(p))
    print(f"[{task}] {time.monotonic() - started:6.1f} s  {method}, seed {seed}", flush=True)


def choose(profile: str, cores: int) -> Path:
    """Tune every method of a profile that has draws of its own, and keep draws and choices in ``book/tuned``.

    The trials are kept in the profile's results, so that a run that was stopped goes on where it was.
    """
    from concurrent.futures import ProcessPoolExecutor

    from semalign.report import save_metrics
    from semalign.study import trials, tuning

    p = load_profile(profile)
    target, folder = ROOT / "book" / "tuned" / f"{p.name}.json", ROOT / "results" / p.name / "artefacts" / "tuning"
    with ProcessPoolExecutor(cores) as pool:
        running = {m: pool.submit(tuning.tune, p, m, folder, tuning.DRAWS) for m in tuning.tuned_methods(p.methods)}
        methods = {method: tried.result() for method, tried in running.items()}
    of = {"tasks": p.search.tasks, "examples": dict(p.sizes), "batch": p.batch_size}
    metrics = {**of, "methods": methods, "code": trials.code_key()}
    save_metrics(target, metrics, seeds=p.seeds[:1], profile=p.name)
    return target


def keep(profile: str) -> Path:
    """Copy the metrics of a finished run to ``book/full_run``, with the version of the code that they belong to.

    Every answer and loss of its trials goes to ``book/full_run/items``, so that the tables can be computed again.

    Raises:
        RuntimeError: a notebook has no metrics yet; nothing is copied then.
    """
    from semalign.report import load_metrics, save_metrics
    from semalign.study.kept import keep_items
    from semalign.study.trials import code_key

    p = load_profile(profile)
    source, target = ROOT / "results" / p.name / "metrics", ROOT / "book" / "full_run"
    names = [name for name in chapters_of(p) if name not in KEPT_ELSEWHERE]
    if absent := [name for name in names if not (source / f"{name}.json").exists()]:
        raise RuntimeError(f"{p.name} has no numbers of {', '.join(absent)}: call make notebooks PROFILE={profile}")
    _, made = load_metrics(source / f"{names[-1]}.json")
    save_metrics(target / "version.json", {"code": code_key()}, seeds=made["seeds"], profile=p.name)
    for name in names:
        shutil.copyfile(source / f"{name}.json", target / f"{name}.json")
    keep_items(finished_trials(p, source.parent / "artefacts" / "trials"), target / "items")
    return target


def finished_trials(p: Profile, folder: Path) -> Iterator[dict[str, Any]]:
    """The trials in a run's folder that its profile has: of its tasks; without a variant, of its methods and seeds."""
    for path in (path for task in p.tasks for path in sorted((folder / task).glob("*.json"))):
        trial = read_json(path)
        of_profile = trial["method"] in ("teacher", "none", *p.methods) and trial["seed"] in p.seeds
        if of_profile or trial["variant"]:
            yield trial


def again(form: str, profile: str, results: Path | None) -> Path:
    """A finished run in another form, ``pdf`` or ``slides``; returns where it is."""
    from semalign.pipeline.printing import print_book
    from semalign.pipeline.slides import make_slides

    p = load_profile(profile)
    folder = (results or ROOT / "results" / p.name).resolve()
    return print_book(folder / "book") if form == "pdf" else make_slides(p, folder)


def too_few(p: Profile) -> str:
    """Said before a run: that it asks too few questions to call a difference none, and how many it takes."""
    from semalign.study.analysis import too_few_questions

    said = too_few_questions(p.sizes.test, seeds=len(p.seeds)) if p.sizes.test else ""
    return f"profile {p.name}: {said}" if said else ""


def run(profile: str, cores: str, until: str, results: Path | None = None) -> int:
    """Call Snakemake for one profile and print where the book is.

    Raises:
        ProfileError: the profile is unknown or malformed, or asks for programs and does not allow them.
    """
    p = load_profile(profile)
    preflight(p)
    if said := too_few(p):
        print(said, flush=True)
    if Path(profile).suffix in (".yaml", ".yml"):
        profile = str(Path(profile).expanduser().resolve())
    folder = (results or ROOT / "results" / p.name).resolve()
    command = [
        sys.executable, "-m", "snakemake", until, "--snakefile", str(ROOT / "Snakefile"), "--directory", str(ROOT),
        "--cores", cores, "--resources", "gpu=1", "--nolock", "--rerun-incomplete",
        "--config", f"profile={profile}", f"results={folder}", "--rerun-triggers", "software-env",
        "--quiet", "rules", "progress", "host", "reason",
    ]  # fmt: skip
    own("SEMALIGN_RUN", os.getpid())
    code = subprocess.run(command).returncode
    if code == 0 and until == "book":
        print(f"the book: {folder / 'book' / '_build' / 'html' / 'index.html'}")
    return code


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; what goes wrong is said in one sentence, and the exit status is 1."""
    parser = argparse.ArgumentParser(prog="python -m semalign.pipeline", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    whole = verbs.add_parser("run", help="run a profile's notebooks and build its book")
    whole.add_argument("profile")
    whole.add_argument("--cores", default="all")
    whole.add_argument("--until", default="book", choices=["book", "notebooks"])
    whole.add_argument("--results", type=Path)
    one = verbs.add_parser("notebook", help="run one notebook")
    one.add_argument("name", choices=list(ORDER))
    one.add_argument("profile")
    one.add_argument("--results", type=Path, required=True)
    one.add_argument("--planned", default="")
    trial = verbs.add_parser("trial", help="run one method on one task under one seed")
    trial.add_argument("profile")
    trial.add_argument("task")
    trial.add_argument("method")
    trial.add_argument("seed", type=int)
    trial.add_argument("--results", type=Path, required=True)
    tuned = verbs.add_parser("tune", help="choose the methods' hyperparameters on validation examples")
    tuned.add_argument("profile")
    tuned.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    verbs.add_parser("keep", help="keep a run's numbers").add_argument("profile")
    book = verbs.add_parser("book", help="build the book from executed notebooks")
    book.add_argument("profile")
    book.add_argument("--results", type=Path, required=True)
    for verb, what in {"pdf": "print a built book", "slides": "make slides of a finished run"}.items():
        made = verbs.add_parser(verb, help=what)
        made.add_argument("profile")
        made.add_argument("--results", type=Path)
    given = parser.parse_args(argv)
    if make := os.environ.pop("SEMALIGN_MAKE_PID", ""):
        own("SEMALIGN_MAKE", int(make))
    watch_owners()
    try:
        if given.verb == "run":
            return run(given.profile, given.cores, given.until, given.results)
        if given.verb == "notebook":
            from semalign.pipeline.notebooks import run_notebook

            run_notebook(given.name, given.profile, given.results.resolve(), given.planned)
        elif given.verb == "trial":
            make_trial(given.profile, given.task, given.method, given.seed, given.results.resolve())
        elif given.verb in ("tune", "keep"):
            print(choose(given.profile, given.cores) if given.verb == "tune" else keep(given.profile))
        elif given.verb in ("pdf", "slides"):
            print(again(given.verb, given.profile, given.results))
        else:
            from semalign.pipeline.book import build_book

            build_book(given.profile, given.results.resolve())
    except (ValueError, RuntimeError, OSError) as error:
        print(f"semalign: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
