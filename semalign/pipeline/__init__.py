"""The pipeline: notebooks in order through papermill, then the book. Snakemake decides what runs; this does it."""

from semalign.pipeline.notebooks import ORDER, NotebookFailed, chapters_of, digests, run_notebook, trials_of

__all__ = ["ORDER", "NotebookFailed", "chapters_of", "digests", "run_notebook", "trials_of"]
