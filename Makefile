# `make demo` and `make test` need Python 3.11 or later, make and a C++ compiler; the rest they install.
PYTHON ?= python3
VENV ?= .venv
# LOCK=requirements.hashed.lock has pip compare the SHA-256 of every file as well; torch must then come from PyPI.
LOCK ?= requirements.lock
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

ROOMS := platform jobs tune federated

.PHONY: help demo test $(ROOMS:%=test-%) test-slow check format bench clean
.DEFAULT_GOAL := help

help: ## say what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

demo: $(INSTALLED) ## install, then train a small transformer on two workers (about three minutes)
	$(BIN)/lossworks train jobs/specs/demo.yaml

test: check ## install, then lint, check types, run the tests and audit every loss
	$(BIN)/pytest --durations=10
	$(BIN)/lossworks check --all --one-process

test-platform: $(INSTALLED) ## the tests of the library alone, and those of the whole repository
	$(BIN)/pytest tests/platform $(wildcard tests/test_*.py)

test-jobs: $(INSTALLED) ## the tests of jobs on Ray alone
	$(BIN)/pytest tests/jobs

test-tune: $(INSTALLED) ## the tests of sweeps and studies alone
	$(BIN)/pytest tests/tune

test-federated: $(INSTALLED) ## the tests of federations alone
	$(BIN)/pytest tests/federated

test-slow: $(INSTALLED) ## the tests that take minutes, and the audit of every loss on two ranks
	$(BIN)/pytest -m slow --timeout=1800 --durations=10
	$(BIN)/lossworks check --all

check: $(INSTALLED) ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## format the code and mend what lint can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## measure our training beside a bare loop
	$(BIN)/lossworks bench train

clean: ## remove the virtual environment and caches of tools
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist

$(INSTALLED): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Lossworks needs Python 3.11 or later; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@
