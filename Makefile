# Every target sets up what it needs, is safe to repeat and reinstalls nothing while pyproject.toml is unchanged.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
STAMP := .venv/.installed
DEMO := .venv/.demo
RUN := runs/demo
export OMP_NUM_THREADS ?= 1
unexport PYTHONDONTWRITEBYTECODE  # pytest compiles each test file once, and not at each start

.PHONY: help demo lint check test test-extended mutants docs clean
help:  ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	@echo "creating the virtual environment .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv

$(DEMO): pyproject.toml constraints.txt | $(BIN)/python
	@echo "1/2 installing PyTorch, the largest part (about half a minute)"
	@$(PIP) --no-compile torch
	@echo "2/2 installing the rest of what the demo needs: Lightning Fabric, scikit-learn, matplotlib"
	@$(PIP) --no-compile -e '.[demo]'
	@touch $@

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing everything that development needs (two to three minutes)"
	@$(PIP) -e '.[dev]'
	@touch $(DEMO) $@

demo: $(DEMO)  ## train, evaluate and report a small multiscale DEQ on real digits (3 minutes from nothing)
	OMP_NUM_THREADS=2 $(BIN)/equipoise train mdeq-digits --run-dir $(RUN) --overwrite --tensorboard false
	@echo "next: $(BIN)/equipoise evaluate $(RUN), and open $(RUN)/report.html"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint  ## ruff, types, the fast tests (laws, unit) and one run from training to prediction
	$(BIN)/python -m pytest -n 2 -m 'not (thorough or slow or extended or gpu)' tests/laws tests/unit tests/runs/test_journey.py

test: $(STAMP)  ## run every test that CI runs, each once
	$(BIN)/python -m pytest -n 2 -m 'not (extended or gpu)'

test-extended: $(STAMP)  ## long fuzzers and trainings, not in CI
	$(BIN)/python -m pytest -n 2 -m 'extended and not gpu'

mutants: $(STAMP)  ## mutation testing of the mathematical packages, resumable, up to an hour
	$(PIP) -e '.[mutants]'
	$(BIN)/python tests/mutants.py

docs: $(STAMP)  ## build the documentation site, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove what the targets made, but not runs/
	rm -rf .venv build dist site mutants .mypy_cache .pytest_cache .ruff_cache
