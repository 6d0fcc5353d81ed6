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
PYTHON = config.get("python", sys.executable)

os.environ["SEMALIGN_PIPELINE_PID"] = str(os.getpid())


onstart:
    pipeline.lock(RESULTS)


localrules: notebooks, book


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


# A rule a notebook. What decides whether it runs again is `digest`, which covers the notebook's source, the
# profile, semalign's code, the lock file and the digests of the notebooks before it: not modification times.
for name in DIGESTS:

    rule:
        name:
            f"notebook_{name}"
        input:
            [f"{RESULTS}/metrics/{before}.json" for before in pipeline.ORDER[name]],
        output:
            f"{RESULTS}/metrics/{name}.json",
        log:
            f"{RESULTS}/notebooks/{name}.ipynb",
        params:
            digest=DIGESTS[name],
            notebook=name,
        threads: workflow.cores or 1
        priority: -list(DIGESTS).index(name)
        resources:
            gpu=1,
        shell:
            "{PYTHON} -m semalign.pipeline notebook {params.notebook} {PROFILE} --results {RESULTS}"
