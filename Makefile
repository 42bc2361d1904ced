# `make help` lists the commands.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_OUTPUT ?= demo-output
MUTANTS ?= --jobs 2

export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help demo test test-full docs mutants lint types spec clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip --constraint constraints.txt
	$(BIN)/pip install --quiet torch --constraint constraints.txt
	$(BIN)/pip install --quiet --editable '.[test]' --constraint constraints.txt
	touch $@

demo: $(INSTALLED) ## compress the embedded model, reload it, compare
	$(BIN)/lorap demo --output $(DEMO_OUTPUT) --overwrite

lint: $(INSTALLED) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## mypy, strict
	$(BIN)/mypy

test: lint types ## all that a change must pass
	HYPOTHESIS_PROFILE=ci OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-full: lint types ## the long tests too, and the older transformers
	HYPOTHESIS_PROFILE=nightly OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
	bash tests/with_transformers.sh 4.57 $(PYTHON)

docs: $(INSTALLED) ## build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

mutants: $(INSTALLED) ## change the math in every small way: do the tests notice?
	$(BIN)/python -m parity_tests.mutation $(MUTANTS)

spec: $(INSTALLED) ## rewrite the traceability table of SPEC.md
	$(BIN)/python -m parity_tests.traceability --write

clean: ## remove what the commands made
	rm -rf $(VENV) $(DEMO_OUTPUT) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
