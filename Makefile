# Headstart needs python3 (3.10 to 3.14) with pip, make and git. All else is installed into .venv.
# Try `make help`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.headstart
PACKAGES := common configs heads data eval train serve api cli
CONFIG ?= configs/quickstart.yaml
ARGS ?=
# Releases of transformers that `make test-matrix` tests: the oldest, a middle and the newest one.
MATRIX ?= 5.20.2 5.22.2 5.24.0
# The release that `make setup` installs into a new environment; empty: pip's choice of those that
# pyproject.toml allows.
TRANSFORMERS ?=
TORCH := $(shell sed -n 's/^ *"\(torch[^"]*\)".*/\1/p' pyproject.toml)
# CPU builds of torch that an index may have, newest first, and the index that PyTorch's install
# page names for them.
TORCH_CPU := 2.15.0 2.14.1 2.14.0 2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
# Threads that wait sleep: tests with several processes would otherwise spin each other to a crawl.
PATIENT := OMP_WAIT_POLICY=passive
# Tests that run at a time, those of one file after another,
WORKERS ?= 2
# in random order: files, and the tests of each, so that what a file prepares is prepared once. The
# seed is printed; ARGS='--random-order-seed=N' takes it again.
PYTEST = $(PATIENT) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	--random-order --random-order-bucket=module
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Should .venv be broken in a way not thought of here, pip refuses to install into the system.
export PIP_REQUIRE_VIRTUALENV := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup torch train test test-all test-unit test-matrix test-dtypes test-engines check format \
	docs docs-check build gpu-bundle clean links

help: ## show this text
	@echo "Headstart: a draft head for any Gemma model."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "Start with \`make setup\`, then \`make train\`. Settings go through ARGS, as in"
	@echo "  make train ARGS='train.max_steps=100'"
	@echo "and the recipe through CONFIG (now $(CONFIG)). Another Python: make setup PYTHON=python3.12"

setup: $(STAMP) links ## make .venv with Headstart in it (again only if pyproject.toml changed)
	@echo "Ready: $$($(BIN)/python --version) in $(VENV)."

# A venv that was cut short while it was made lacks pyvenv.cfg (then its python answers for the
# system's, where sys.prefix == sys.base_prefix) or pip's RECORD, the last file that is written.
# Such a venv, or one whose Python is gone, is made anew.
$(STAMP): pyproject.toml
	@if ! $(BIN)/python -c 'import sys, pip, importlib.metadata as m; sys.exit(sys.prefix == sys.base_prefix or not m.distribution("pip").read_text("RECORD"))' >/dev/null 2>&1; then \
		command -v '$(PYTHON)' >/dev/null 2>&1 || { echo "Headstart needs Python 3.10 to 3.14, but '$(PYTHON)' was not found: try make setup PYTHON=python3.11" >&2; exit 1; }; \
		'$(PYTHON)' -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 14) else "Headstart needs Python 3.10 to 3.14, but $(PYTHON) is %d.%d: try make setup PYTHON=python3.11" % v)' || exit 1; \
		echo "Making $(VENV) ..."; \
		'$(PYTHON)' -m venv --clear $(VENV); \
	fi
	@$(MAKE) --no-print-directory torch
	@echo "Installing Headstart and what it needs (some minutes the first time) ..."
	@$(PIP) install --quiet -e '.[demo,dev]' $(TRANSFORMERS:%='transformers==%')
	@touch $(STAMP)

# Without a GPU a CPU build of torch does, a tenth of the size: one that the usual index or a local
# folder has, else one of PyTorch's own CPU index. Neither is everywhere, so a failure is no error:
# the plain install that comes next brings the usual build.
torch:
	@if command -v nvidia-smi >/dev/null 2>&1; then exit 0; fi; \
	if $(BIN)/python -c 'import importlib.metadata as m; m.version("torch")' >/dev/null 2>&1; then \
		exit 0; \
	fi; \
	echo "No GPU here: looking for a CPU build of torch ..."; \
	for version in $(TORCH_CPU); do \
		if $(PIP) install --quiet "torch==$$version+cpu" >/dev/null 2>&1; then \
			echo "Took torch $$version+cpu, of the index or folder that pip is set to."; exit 0; \
		fi; \
	done; \
	if $(PIP) --retries 1 --timeout 15 install --quiet --index-url $(TORCH_CPU_INDEX) \
		'$(TORCH)' >/dev/null 2>&1; then \
		echo "Took the newest CPU build of torch from $(TORCH_CPU_INDEX)."; exit 0; \
	fi; \
	echo "There is none for this Python and platform: taking the usual build."

# mypy and editors find headstart.NAME through these links.
links:
	@mkdir -p .types/headstart
	@for name in $(PACKAGES); do ln -sfn "../../$$name" ".types/headstart/$$name"; done

# --resume: an interrupted `make train` goes on, a finished one measures its head again.
# Several processes go through `accelerate launch train.py`, which takes the same arguments.
train: $(STAMP) ## train a head and measure it (CONFIG=..., ARGS='key=value ...')
	$(BIN)/headstart train --resume --config $(CONFIG) $(ARGS)

test: $(STAMP) ## run the tests, those on the real Gemma 3 270M too (ARGS='-k name' to choose)
	@$(PYTEST) -m "not slow and not engines" $(ARGS)

test-all: $(STAMP) ## run the slow ones too: kill sweeps, several processes, wheels, draws, fuzzing
	@$(PYTEST) -m "not engines" $(ARGS)

test-unit: $(STAMP) ## run the tests that need no weights, the slow ones too
	@$(PYTEST) -m "not real and not engines" $(ARGS)

# In environments of their own, .venvs/RELEASE.
test-matrix: ## run the unit tests on each tested release of transformers (MATRIX='5.22.2' to choose)
	@failed=; for release in $(MATRIX); do \
		echo "=== transformers $$release"; \
		$(MAKE) --no-print-directory test-unit VENV=.venvs/$$release TRANSFORMERS=$$release \
			|| failed="$$failed $$release"; \
	done; \
	[ -z "$$failed" ] || { echo "failed on transformers$$failed" >&2; exit 1; }

test-dtypes: $(STAMP) ## run what depends on bfloat16 instructions, as on machines with and without them
	@for dtype in float32 bfloat16; do \
		$(PYTEST) -m auto_dtype --machine-dtype $$dtype $(ARGS) || exit 1; \
	done

test-engines: $(STAMP) ## install serving engines (4 GB) and compare them with transformers
	@$(PATIENT) $(BIN)/python -m pytest -m engines $(ARGS)

check: $(STAMP) links ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=.types $(BIN)/lint-imports --no-cache
	$(BIN)/mypy

format: $(STAMP) ## sort imports, fix what can be fixed, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## write the tables and the reference of the documents, build the site into site/
	$(BIN)/python -m docs.make write
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-check: $(STAMP) ## find stale tables, dead links and commands that do not parse in the documents
	$(BIN)/python -m docs.make check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

build: $(STAMP) ## build the wheel into dist/
	@rm -rf build # setuptools would pack files that were deleted since the last build
	$(BIN)/python -m build --quiet --wheel --no-isolation

# Beside the checkout: GPU machines often have no network, and get both.
gpu-bundle: $(STAMP) ## download the wheels that `python -m tests.gpu_proof` needs into ../gpu-bundle
	rm -rf ../gpu-bundle
	$(BIN)/python -m tests.helpers.gpu_bundle ../gpu-bundle

clean: ## remove build outputs and caches (.venv and runs/ stay)
	rm -rf build dist site ./*.egg-info .types .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf __pycache__
