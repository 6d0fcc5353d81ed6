"""The command line: ``run``, ``plan``, ``tune``, ``keep``, ``verify``, ``pdf``, ``slides``, and a run's jobs."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from semalign.lm.files import alive, locked, read_json
from semalign.pipeline import forks
from semalign.pipeline.notebooks import KEPT_ELSEWHERE, ORDER, ROOT, chapters_of, digests, run_digest, trial_file
from semalign.planning.preflight import (
    CHECKED,
    asks_more,
    before_models,
    checked,
    disks,
    memory,
    on_cpu,
    preflight,
    tokens,
)
from semalign.planning.stamps import stamp
from semalign.profiles import Profile, ProfileError, load_profile

_LOCKS = contextlib.ExitStack()  # held until the process ends, which releases them


def lock(results: str) -> None:
    """Refuse a second run over the same results while one is alive. The lock ends with its process, however it ends.

    Raises:
        RuntimeError: another process holds it.
    """
    Path(results).mkdir(parents=True, exist_ok=True)
    try:
        _LOCKS.enter_context(locked(Path(results), wait=False))
    except RuntimeError:
        raise RuntimeError(f"another run is writing to {results}; wait for it to end, or stop it") from None


OWNERS = ("SEMALIGN_MAKE", "SEMALIGN_RUN", "SEMALIGN_SNAKEMAKE")
"""Where a process of a run finds those that it must not outlive, as HOST:PID: on another host of a cluster it may."""


def announce(name: str, pid: int) -> None:
    """Let what this process starts know that it must not outlive ``pid``, under one of :data:`OWNERS`."""
    os.environ[name] = f"{socket.gethostname()}:{pid}"


def disown() -> None:
    """Let this process, and what it starts, outlive whoever submitted it: the jobs of a cluster go on by themselves."""
    for name in OWNERS:
        os.environ.pop(name, None)


def watch_owners() -> None:
    """Stop this process, and with it its kernel, once one of its owners is gone: a kill leaves nothing behind."""
    of_name = (os.environ.get(name, "").rpartition(":") for name in OWNERS)
    pids = [int(pid) for host, _, pid in of_name if pid and host == socket.gethostname()]

    def loop() -> None:
        while True:
            if not all(map(alive, pids)):
                for one in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                        one.kill()  # a kernel that still loads would not yet look for its parent
                os._exit(1)
            time.sleep(0.5)

    threading.Thread(target=loop, daemon=True).start()


def check(profile: str, results: str, *, elsewhere: bool) -> None:
    """All that can be checked before the first job, for the Snakefile; jobs on this machine need not look again.

    What needs a model library is looked at in a process of its own, which ends and leaves Snakemake small.

    Args:
        elsewhere: the jobs run on other machines, which check their own device and sandbox.

    Raises:
        SystemExit: something is missing, and the process has said what.
    """
    p = load_profile(profile)
    if not asks_more(p, elsewhere=elsewhere):
        return
    command = [*forks.command(sys.executable, "semalign.pipeline"), "check", profile, "--results", results]
    if subprocess.run([*command, *(["--elsewhere"] if elsewhere else [])]).returncode:
        sys.exit(1)
    if p.data == "benchmarks":
        os.environ[CHECKED] = checked(p)


def lengths(p: Profile) -> None:
    """Refuse examples of which none leaves room for a response, by the tokenizer: no weights are read.

    Raises:
        ProfileError: names the task, its split, and the setting.
    """
    from semalign.lm.examples import encode
    from semalign.models import load_pair
    from semalign.study.trials import SPLITS, splits

    tokenizer = load_pair(p).tokenizer
    for task in p.tasks:
        examples = splits(p, task)
        for split in SPLITS:
            try:
                with warnings.catch_warnings(action="ignore"):  # of those that are left out chapter 00 speaks
                    encode(tokenizer, getattr(examples, split), max_length=p.max_length)
            except ValueError as error:
                raise ProfileError(f"profile {p.name}: in {split} of {task}, {error}") from None


def fetch(profile: str) -> list[str]:
    """Bring a profile's models and questions into the caches of the hub, for nodes that have no network.

    Returns:
        What is there now, a line each.

    Raises:
        RuntimeError: something cannot be had; the one sentence names all of it, and the rest has been fetched.
        ProfileError: a gated model without a token, or a disk without room.
    """
    from semalign import benchmarks, models
    from semalign.profiles import Hub

    p = load_profile(profile)
    tokens(p)
    disks(p, None, trains=False)
    there, missing = [], []
    for model in {(m.id, m.revision): m for m in p.models if isinstance(m, Hub)}.values():
        try:
            there.append(f"{model.id} at {models.download(model)}")
        except models.ModelUnavailable as error:
            missing.append(str(error))
    for task in p.tasks if p.data == "benchmarks" else ():
        try:
            asked, learned = len(benchmarks.load_items(task)), benchmarks.task_data(task)
            there.append(f"{task}: {asked} questions, {len(learned.train)} training examples")
        except benchmarks.DataError as error:
            missing.append(str(error))
    if missing:
        raise RuntimeError(f"of profile {p.name} this cannot be fetched: {'; '.join(missing)}")
    return there


def make_trials(profile: str, task: str, wanted: Sequence[tuple[str, int]], results: Path) -> None:
    """Trials of a profile on a task, methods with seeds, one after another in the files that the notebooks look for."""
    from semalign.study import trials

    p = load_profile(profile)
    before_models(p, results)
    folder = results / "artefacts" / "trials"
    for method, seed in wanted:
        started = time.monotonic()
        trials.run_trial(p, task, method, seed, folder, others=p.others)
        stamp(folder / trial_file(task, method, seed), run_digest(p))
        print(f"[{task}] {time.monotonic() - started:6.1f} s  {method}, seed {seed}", flush=True)


def choose(profile: str, cores: int) -> Path:
    """Tune every method of a profile that has draws of its own, and keep draws and choices in ``book/tuned``.

    What a method chose is kept at once, and a method that has chosen by the same code on the same data is not tuned
    again: a run that was stopped goes on where it was.
    """
    from concurrent.futures import ProcessPoolExecutor, as_completed

    from semalign.report import load_metrics, save_metrics
    from semalign.study import trials, tuning

    p = load_profile(profile)
    before_models(p)
    target, folder = ROOT / "book" / "tuned" / f"{p.name}.json", ROOT / "results" / p.name / "artefacts" / "tuning"
    of = {"tasks": p.search.tasks, "examples": dict(p.sizes), "batch": p.batch_size}
    keys = {m: trials.trial_key(p.changed(hyperparameters={}), p.search.tasks, m, p.seeds[0]) for m in p.methods}
    kept = load_metrics(target)[0]["methods"] if target.exists() else {}
    methods = {m: tried for m, tried in kept.items() if tried["key"] == keys.get(m)}
    with ProcessPoolExecutor(cores, initializer=gc.freeze) as pool:  # see semalign.report.opened
        waiting = [m for m in tuning.tuned_methods(p.methods) if m not in methods]
        running = {pool.submit(tuning.tune, p, m, folder, tuning.DRAWS): m for m in waiting}
        for tried in as_completed(running):
            method = running[tried]
            if tried.exception():
                pool.shutdown(wait=False, cancel_futures=True)  # what runs ends; what waits would fail in the same way
            methods[method] = {**tried.result(), "key": keys[method]}
            save_metrics(target, {**of, "methods": methods}, seeds=p.seeds[:1], profile=p.name)
    return target


def keep(profile: str, *, trials_alone: bool = False) -> Path:
    """Copy the metrics of a finished run to ``book/full_run``, with the version of the code that they belong to.

    Every answer and loss of its trials goes to ``book/full_run/items``, so that the tables can be computed again, and
    the trials whole to ``book/trials``. Of a run that has not ended ``trials_alone`` are kept, from which it goes on.

    Raises:
        RuntimeError: a notebook has no metrics yet; nothing is copied then.
    """
    from semalign.report import load_metrics, save_metrics
    from semalign.study.kept import keep_items, pack_run, version_of

    p = load_profile(profile)
    source, target = ROOT / "results" / p.name / "metrics", ROOT / "book" / "full_run"
    if trials_alone:
        pack_run(p, source.parent / "artefacts", archive_of(p))
        return archive_of(p)
    names = [name for name in chapters_of(p) if name not in KEPT_ELSEWHERE]
    if absent := [name for name in names if not (source / f"{name}.json").exists()]:
        raise RuntimeError(f"{p.name} has no numbers of {', '.join(absent)}: call make notebooks PROFILE={profile}")
    _, made = load_metrics(source / f"{names[-1]}.json")
    save_metrics(target / "version.json", version_of(p.methods, p.tasks), seeds=made["seeds"], profile=p.name)
    for name in names:
        shutil.copyfile(source / f"{name}.json", target / f"{name}.json")
    keep_items(finished_trials(p, source.parent / "artefacts" / "trials"), target / "items")
    pack_run(p, source.parent / "artefacts", archive_of(p))
    return target


def verify(profile: str, cores: int) -> str:
    """Make kept trials again by the code of now; what it says of them, in a sentence.

    Raises:
        RuntimeError: nothing is kept, or some numbers differ.
    """
    from concurrent.futures import ProcessPoolExecutor

    from semalign.study import kept

    p = load_profile(profile)
    before_models(p)
    if not archive_of(p).exists():
        raise RuntimeError(f"no trials of {p.name} are kept: call make keep PROFILE={profile} after a run of it")
    folder = ROOT / "results" / p.name / "verified"
    kept.unpack_trials(archive_of(p), folder / "kept")
    with ProcessPoolExecutor(cores, initializer=gc.freeze) as pool:  # see semalign.report.opened
        codes = read_json(kept.codes_path(archive_of(p)))["codes"]
        apart = kept.verify(p, codes, folder / "kept" / "trials", folder / "now", pool)
    if not apart:
        return "no code has changed since the kept trials were made or verified"
    return f"{len(apart)} trials were made again: {kept.told(apart)}"


def archive_of(p: Profile) -> Path:
    """Where the repository keeps the trials of a profile's run."""
    return ROOT / "book" / "trials" / f"{p.name}.tar.xz"


def finished_trials(p: Profile, folder: Path) -> Iterator[dict[str, Any]]:
    """The trials in a run's folder that its profile has: of its tasks; without a variant, of its methods and seeds."""
    methods, seeds = {"teacher", "none", *p.methods}, {*p.seeds, *p.decisive_seeds, *p.contest_seeds}
    for path in (path for task in p.tasks for path in sorted((folder / task).glob("*.json"))):
        trial = read_json(path)
        if trial["variant"] or (trial["method"] in methods and trial["seed"] in seeds):
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


def check_writable(folder: Path) -> None:
    """Refuse a folder of results that cannot be written, before a run is planned over it.

    Raises:
        RuntimeError: it is a file, or somebody else's; the message names the owner.
    """
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not place.is_dir():
        raise RuntimeError(f"{place} is a file: choose another folder for the results")
    if not os.access(place, os.W_OK | os.X_OK):
        try:
            owner = place.owner()
        except KeyError:  # a number without an entry, as in containers
            owner = f"user {place.stat().st_uid}"
        raise RuntimeError(
            f"{place} belongs to {owner} and cannot be written: have it given to you (chown), or choose another folder "
            "with RESULTS=folder"
        )


def run(profile: str, cores: str, until: str, results: Path | None = None) -> int:
    """Call Snakemake for one profile and print where the book is.

    Raises:
        ProfileError: the profile is unknown or malformed, or asks for programs and does not allow them.
        RuntimeError: the results cannot be written.
    """
    p = load_profile(profile)
    folder, forks_here = (results or ROOT / "results" / p.name).resolve(), on_cpu(p)
    check_writable(folder)
    preflight(p, folder)
    if Path(profile).suffix in (".yaml", ".yml"):
        profile = str(Path(profile).expanduser().resolve())
    command = [
        sys.executable, "-m", "snakemake", until, "--snakefile", str(ROOT / "Snakefile"), "--directory", str(ROOT),
        "--cores", cores, "--resources", "gpu=1", "--nolock", "--rerun-incomplete",
        "--config", f"profile={profile}", f"results={folder}", *(["gpu=0", "together=1"] if forks_here else ["gpu=1"]),
        "--rerun-triggers", "software-env",
        "--quiet", "rules", "progress", "host", "reason",
        # What profiles/default says, without a line about it: nothing is kept in a home folder.
        "--workflow-profile", "none",
        "--shared-fs-usage", "persistence", "input-output", "software-deployment", "sources", "storage-local-copies",
    ]  # fmt: skip
    announce("SEMALIGN_RUN", os.getpid())
    todo = any(not (folder / "metrics" / f"{name}.json.{made}").exists() for name, made in digests(p).items())
    # The questions of the test are a sample of all of its items.
    splits = [(split, None if split == "test" else size) for split, size in p.sizes]
    items = [(task, *of) for task in p.tasks for of in splits if p.data == "classroom"]
    at_once = forks.forking(classroom=items, ahead=todo) if forks_here else contextlib.nullcontext()
    with at_once:  # the imports of all jobs go on beside what is read and planned first
        if said := too_few(p):
            print(said, flush=True)
        take_kept(p, folder)
        code = subprocess.run(command).returncode
    if code == 0 and until == "book":
        print(f"the book: {folder / 'book' / '_build' / 'html' / 'index.html'}")
    return code


def take_kept(p: Profile, folder: Path) -> None:
    """Give a run the trials that the repository keeps of its profile; each says itself whether it still holds."""
    archive = archive_of(p)
    if archive.exists():
        from semalign.study.kept import unpack_trials

        if taken := unpack_trials(archive, folder / "artefacts"):
            print(f"{taken} trials are taken from {archive.relative_to(ROOT)}", flush=True)


def pairs_of(words: Sequence[str]) -> list[tuple[str, int]]:
    """Methods and their seeds, as they are given on the command line one after another.

    Raises:
        ValueError: a seed is missing, or is none.
    """
    if len(words) % 2:
        raise ValueError(f"{words[-1]!r} has no seed after it: give each method's seed, 0 or a whole number above it")
    for text in words[1::2]:
        if not text.isdecimal():
            raise ValueError(f"{text!r} is no seed: give 0 or a whole number above it")
    return [(method, int(seed)) for method, seed in zip(words[::2], words[1::2], strict=True)]


def cores_of(text: str) -> str:
    """How many cores a run may use, as Snakemake takes it: ``all``, or a number from 1."""
    if text == "all" or (text.isdecimal() and int(text)):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is no number of cores: give 1 or more, or all")


def said_of(error: Exception) -> str:
    """An error in one sentence; the system's own, which names a file and no way out, in words."""
    if not isinstance(error, OSError) or error.filename is None:
        return str(error)
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} is missing: correct the path, or run what makes it"
    return f"{error.filename} cannot be used ({error.strerror}): correct the path, or choose a folder of your own"


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; what goes wrong is said in one sentence, and the exit status is 1."""
    parser = argparse.ArgumentParser(prog="python -m semalign.pipeline", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    whole = verbs.add_parser("run", help="run a profile's notebooks and build its book")
    whole.add_argument("profile")
    whole.add_argument("--cores", default="all", type=cores_of)
    whole.add_argument("--until", default="book", choices=["book", "notebooks"])
    whole.add_argument("--results", type=Path)
    one = verbs.add_parser("notebook", help="run one notebook")
    one.add_argument("name", choices=list(ORDER))
    one.add_argument("profile")
    one.add_argument("--results", type=Path, required=True)
    one.add_argument("--planned", default="")
    trial = verbs.add_parser("trial", help="run methods on one task, each under the seed that follows it")
    trial.add_argument("profile")
    trial.add_argument("task")
    trial.add_argument("wanted", nargs="+", metavar="METHOD SEED")
    trial.add_argument("--results", type=Path, required=True)
    before = verbs.add_parser("check", help="check what a run needs before its first model loads")
    before.add_argument("profile")
    before.add_argument("--results", type=Path, required=True)
    before.add_argument("--elsewhere", action="store_true", help="the jobs run on other machines")
    verbs.add_parser("fetch", help="fetch models and questions for nodes without a network").add_argument("profile")
    verbs.add_parser("address", help="bring the notebooks in line with the address in _config.yml")
    verbs.add_parser("plan", help="say what a profile needs, without its weights").add_argument("profile")
    tuned = verbs.add_parser("tune", help="choose the methods' hyperparameters on validation examples")
    tuned.add_argument("profile")
    tuned.add_argument("--cores", default="all", type=cores_of)
    verified = verbs.add_parser("verify", help="make kept trials again by the code of now, and compare")
    verified.add_argument("profile")
    verified.add_argument("--cores", default="all", type=cores_of)
    kept = verbs.add_parser("keep", help="keep a run's numbers")
    kept.add_argument("profile")
    kept.add_argument("--trials", action="store_true", help="of a run that has not ended, its trials alone")
    book = verbs.add_parser("book", help="build the book from executed notebooks")
    book.add_argument("profile")
    book.add_argument("--results", type=Path, required=True)
    for verb, what in {"pdf": "print a built book", "slides": "make slides of a finished run"}.items():
        made = verbs.add_parser(verb, help=what)
        made.add_argument("profile")
        made.add_argument("--results", type=Path)
    given = parser.parse_args(argv)
    if make := os.environ.pop("SEMALIGN_MAKE_PID", ""):
        announce("SEMALIGN_MAKE", int(make))
    watch_owners()
    try:
        if given.verb == "run":
            return run(given.profile, given.cores, given.until, given.results)
        if given.verb == "notebook":
            from semalign.pipeline.notebooks import run_notebook

            run_notebook(given.name, given.profile, given.results.resolve(), given.planned)
        elif given.verb == "trial":
            make_trials(given.profile, given.task, pairs_of(given.wanted), given.results.resolve())
        elif given.verb in ("tune", "verify"):
            cores = (os.cpu_count() or 1) if given.cores == "all" else int(given.cores)
            print((choose if given.verb == "tune" else verify)(given.profile, cores))
        elif given.verb == "keep":
            print(keep(given.profile, trials_alone=given.trials))
        elif given.verb == "check":
            p = load_profile(given.profile)
            before_models(p, given.results.resolve(), elsewhere=given.elsewhere)
            if not given.elsewhere:
                memory(p, chapters_of(p))
                lengths(p)
        elif given.verb == "fetch":
            print("\n".join([*fetch(given.profile), "on the nodes set HF_HUB_OFFLINE=1 and HF_DATASETS_OFFLINE=1"]))
        elif given.verb == "address":
            from semalign.pipeline.address import write_cells

            changed = write_cells(ROOT / "_config.yml", ROOT / "notebooks")
            print(f"{len(changed)} notebooks changed")
        elif given.verb == "plan":
            from semalign.planning.plan import markdown, plan

            p = load_profile(given.profile)
            print(markdown(plan(p, chapters_of(p))), end="")
        elif given.verb in ("pdf", "slides"):
            print(again(given.verb, given.profile, given.results))
        else:
            from semalign.pipeline.book import build_book

            build_book(given.profile, given.results.resolve())
    except (ValueError, RuntimeError, OSError) as error:
        print(f"semalign: {said_of(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
