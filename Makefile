# make train: the small real job · make test: the tests · make lint · make test-quick. Each makes .venv and installs what it needs.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
CONFIG ?= configs/quickstart.yaml

# The folders here have names (`kernels`) that packages elsewhere have too: never search the working folder for imports.
export PYTHONSAFEPATH := 1

.PHONY: help train test test-quick lint install clean
.DEFAULT_GOAL := help

help:
	@sed -n '1s/^# //p' Makefile

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
	$(BIN)/pytest tests

test-quick: install
	$(BIN)/pytest tests -m "not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
