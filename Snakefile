# The order of the notebooks. `make book` calls this; so does any Snakemake executor (see clusters/).
#
#   snakemake --cores 2 --config profile=classroom
#
# A notebook's metrics file is the output that Snakemake tracks. The executed notebook is declared as the log,
# because Snakemake deletes the outputs of a failed job and keeps its log: the copy with the traceback.
import os
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)
from semalign import pipeline

PROFILE = config.get("profile", "classroom")
RESULTS = Path(config.get("results", f"results/{PROFILE}")).as_posix()
DIGESTS = pipeline.digests(PROFILE)
BEFORE = pipeline.notebooks_of(PROFILE)
GPU = int(pipeline.load_profile(PROFILE).device != "cpu")  # jobs that share a GPU run one after another
# The small models of a CPU profile gain nothing from a second thread: notebooks run side by side instead.
THREADS = (workflow.cores or 1) if GPU else 1
PYTHON = config.get("python", sys.executable)

os.environ["SEMALIGN_PIPELINE_PID"] = str(os.getpid())


onstart:
    pipeline.lock(RESULTS)


localrules: notebooks, book


wildcard_constraints:
    task="[a-z0-9]+",
    method="[a-z_]+",
    seed="[0-9]+",


rule book:
    input:
        expand(f"{RESULTS}/metrics/{{notebook}}.json", notebook=DIGESTS),
        pipeline.book_sources(),
    output:
        f"{RESULTS}/book/_build/html/index.html",
    params:
        digest=pipeline.book_digest(PROFILE),
    shell:
        "{PYTHON} -m semalign.pipeline book {PROFILE} --results {RESULTS}"


rule notebooks:
    input:
        expand(f"{RESULTS}/metrics/{{notebook}}.json", notebook=DIGESTS),


# A method on a task under a seed: the unit that a cluster runs side by side.
rule trial:
    output:
        f"{RESULTS}/artefacts/trials/{{task}}/{{method}}-{{seed}}.json",
    params:
        digest=pipeline.trial_digest(PROFILE),
    threads: 1
    priority: -100
    resources:
        gpu=GPU,
    shell:
        "OMP_NUM_THREADS={threads} {PYTHON} -m semalign.pipeline trial {PROFILE} {wildcards.task} {wildcards.method} "
        "{wildcards.seed} --results {RESULTS}"


# A rule a notebook. What decides whether it runs again is `digest`, which covers the notebook's source, the
# profile, semalign's code, the lock file and the digests of the notebooks before it: not modification times.
for name in DIGESTS:

    rule:
        name:
            f"notebook_{name}"
        input:
            [f"{RESULTS}/metrics/{before}.json" for before in BEFORE[name]],
            [f"{RESULTS}/artefacts/trials/{path}" for path in pipeline.trials_of(PROFILE, name)],
        output:
            f"{RESULTS}/metrics/{name}.json",
        log:
            f"{RESULTS}/notebooks/{name}.ipynb",
        params:
            digest=DIGESTS[name],
            notebook=name,
        threads: THREADS
        priority: -list(DIGESTS).index(name)
        resources:
            gpu=GPU,
        shell:
            "OMP_NUM_THREADS={threads} {PYTHON} -m semalign.pipeline notebook {params.notebook} {PROFILE} "
            "--results {RESULTS}"
