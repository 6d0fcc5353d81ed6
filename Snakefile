# The order of the notebooks. `make book` calls this; so does any Snakemake executor (see clusters/).
#
#   snakemake --cores 2 --config profile=classroom
#
# A notebook's metrics file is the output that Snakemake tracks. The executed notebook is declared as the log,
# because Snakemake deletes the outputs of a failed job and keeps its log: the copy with the traceback.
# What decides whether something runs again is the digest beside each finished file, which is in a name and so an output:
# not modification times, nor Snakemake's own memory, so that a finished folder can be handed to somebody else.
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)
from semalign.pipeline import book as the_book
from semalign.pipeline import forks
from semalign.pipeline import notebooks as chapters
from semalign.pipeline.__main__ import announce, check, disown, lock, watch_owners
from semalign.planning.plan import job_needs, on_card, trials_need
from semalign.planning.preflight import GPU as GIVEN, preflight
from semalign.profiles import load_profile

PROFILE = str(config.get("profile", "classroom"))
CHOSEN = load_profile(PROFILE)
RESULTS = Path(str(config.get("results", f"results/{CHOSEN.name}"))).as_posix()
preflight(CHOSEN, Path(RESULTS), trains=False)  # its jobs ask for their own room
RUN = chapters.chapters_of(CHOSEN)
DIGESTS = chapters.digests(CHOSEN)
TRIAL_DIGEST = chapters.run_digest(CHOSEN)
chapters.adopt(Path(RESULTS), DIGESTS)
# Jobs that share a GPU run one after another. A run on one machine says whether it has one; nodes of a cluster do where
# the profile is not of the CPU, whatever there is where their jobs are submitted.
GPU = int(config.get("gpu", CHOSEN.device != "cpu"))
# The small models of a CPU profile gain nothing from a second thread: notebooks run side by side instead. A GPU is fed
# by a few, whatever the machine has.
THREADS = 4 if GPU else 1
PYTHON = config.get("python", sys.executable)
JOB = shlex.join(forks.command(PYTHON, "semalign.pipeline"))  # where a run has imported everything once, a fork of that
REMOTE = workflow.remote_exec  # this is a job of a cluster: it outlives the process that submitted it

if REMOTE:
    disown()
    os.environ.pop(forks.ADDRESS, None)  # its cores and memory are those of the job
watch_owners()
announce("SEMALIGN_SNAKEMAKE", os.getpid())
SAYS = f"{GIVEN}={{resources.gpu}} " if REMOTE else ""  # what a job of a cluster was given

# So many trials of a task share a job, one after another in one process, which loads libraries and the teacher as a judge
# once for all of them. Where each is a fork of the run, the run says that each is a job of its own.
TOGETHER = config.get("together", 15)


def made(name):
    """The file whose name says what a notebook's numbers were made from; its age says nothing."""
    return f"{RESULTS}/metrics/{name}.json.{DIGESTS[name]}"


onstart:
    lock(RESULTS)
    check(PROFILE, RESULTS, elsewhere=not workflow.local_exec)


localrules: notebooks, book


rule book:
    input:
        [ancient(made(name)) for name in RUN],
        [ancient(path) for path in the_book.book_sources()],
    output:
        f"{RESULTS}/book/{the_book.book_digest(DIGESTS)}.built",
    params:
        profile=PROFILE, results=RESULTS, job=JOB,
    shell:
        "{params.job} book {params.profile:q} --results {params.results:q} && touch {output:q}"


rule notebooks:
    input:
        [ancient(made(name)) for name in RUN],


# Methods on a task under their seeds: the unit that a cluster runs side by side. The files of the trials are not declared:
# Snakemake would delete them before the job, which is to find by each trial's own key whether it still holds.
for task, trials in chapters.trial_jobs(CHOSEN, TOGETHER):

    rule:
        name:
            f"trials_{task}_{trials[0][0]}_{trials[0][1]}"
        output:
            [f"{RESULTS}/artefacts/trials/{chapters.trial_file(task, *of)}.{TRIAL_DIGEST}" for of in trials],
        params:
            task=task, trials=[word for of in trials for word in of], profile=PROFILE, results=RESULTS, job=JOB,
        threads: 1
        priority: -100
        resources:
            gpu=GPU, **trials_need(CHOSEN, task, [method for method, _ in trials]),
        shell:
            SAYS + "OMP_NUM_THREADS={threads} {params.job} trial {params.profile:q} {params.task} {params.trials} "
            "--results {params.results:q}"


# A rule a notebook.
for name in RUN:

    rule:
        name:
            f"notebook_{name}"
        input:
            [ancient(made(before)) for before in RUN[name].reads],
            [ancient(f"{RESULTS}/artefacts/trials/{path}.{TRIAL_DIGEST}") for path in chapters.trials_of(CHOSEN, name)],
        output:
            f"{RESULTS}/metrics/{name}.json",
            made(name),
        log:
            f"{RESULTS}/notebooks/{name}.ipynb",
        params:
            notebook=name, profile=PROFILE, results=RESULTS, job=JOB, digest=DIGESTS[name],
        threads: THREADS
        priority: -list(RUN).index(name)
        resources:
            gpu=GPU if on_card(CHOSEN, name) else 0, **job_needs(CHOSEN, name),
        shell:
            SAYS + "OMP_NUM_THREADS={threads} {params.job} notebook {params.notebook} "
            "{params.profile:q} --results {params.results:q} --planned {params.digest}"
