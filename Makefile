# make train: the small real job · make test: the tests · make lint · make test-quick. Each makes .venv and installs what it needs.
# make test-kernels-all: every kernel, shape and target · make compiled: docs/performance/compiled.csv anew
# make gpu: kernels' tests and benchmark on the GPU of this machine, installing nothing; WHEELS=FOLDER holds what it lacks
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
CONFIG ?= configs/quickstart.yaml

# The folders here have names (`kernels`) that packages elsewhere have too: never search the working folder for imports.
export PYTHONSAFEPATH := 1

.PHONY: help train test test-quick test-kernels-all compiled gpu lint install clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,3s/^# //p' Makefile

install: $(VENV)/installed

$(VENV)/installed: setup.py constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (torch first, pinned in constraints.txt) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch setuptools wheel
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	@touch $@

train: install
	@$(BIN)/baton train $(CONFIG) run=$(RUN) --nproc auto --resume

test: install
	$(BIN)/pytest tests -m "not exhaustive"

test-quick: install
	$(BIN)/pytest tests -m "not slow and not exhaustive"

test-kernels-all: install
	$(BIN)/pytest tests/kernels tests/test_interpreter.py

compiled: install
	$(BIN)/python tests/kernels/ahead_of_time.py --write

gpu:
	@PYTHON="$(PYTHON)" WHEELS="$(WHEELS)" tests/on_gpu.sh

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
