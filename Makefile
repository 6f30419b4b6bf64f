# Every target sets up what it needs, is safe to repeat and reinstalls nothing while pyproject.toml is unchanged.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test check docs clean
help:  ## show the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)  ## train a small multiscale DEQ with SHINE gradients on real digits (under 3 minutes)
	OMP_NUM_THREADS=2 $(BIN)/equipoise train mdeq-digits --run-dir runs/demo --overwrite

test: $(STAMP)  ## run every test that CI runs
	$(BIN)/python -m pytest -n 2 -m 'not gpu'

check: $(STAMP)  ## ruff, types and the fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 -m 'not slow and not gpu'

docs: $(STAMP)  ## build the documentation site, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove what the targets made, but not runs/
	rm -rf .venv build dist site .mypy_cache .pytest_cache .ruff_cache
