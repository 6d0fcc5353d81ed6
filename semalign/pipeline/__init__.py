"""The pipeline: notebooks in order through papermill, then the book. Snakemake decides what runs; this does it."""
