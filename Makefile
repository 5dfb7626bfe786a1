# make demo | test | check | install | clean.  Every target but clean makes .venv and installs when needed.
.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-recipes test-pythons docs check clean
SHELL := /bin/bash

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.installed
# The first Python of the supported versions; PYTHON=/path/to/python overrides.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
# One thread a process: the tests start several processes, and threads that share a core only slow each other.
export OMP_NUM_THREADS ?= 1
# Three at a time on two cores, each file of tests in one process, in order: the longest come first. What several real
# processes do takes time, not cores.
PYTEST_FLAGS ?= --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 12
SHELL_SCRIPTS = $(shell find . \( -name '*.sh' -o -name '*.sbatch' \) -not -path './$(VENV)/*' -not -path './build/*') .ci/run

help:
	@echo "make demo     two small translation models codistil, with BLEU, bits and a figure"
	@echo "make test     the tests"
	@echo "make test-slow  variations of them that take long; eight minutes"
	@echo "make test-recipes  the recipes that the tests leave out, under SMOKE=1; 17 minutes"
	@echo "make test-pythons  the distributed tests in fresh environments of PYTHONS, python3.10 and python3.13; an hour"
	@echo "make docs     the documentation as a site, in build/site"
	@echo "make check    ruff, mypy, shellcheck, hadolint, the documentation, then the tests"
	@echo "make install  only the environment in $(VENV)"
	@echo "make clean    removes the environment and caches"

install: $(STAMP)

# --no-compile: of what is installed a small part is imported, and compiled then.
$(STAMP): pyproject.toml setup.py
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || test -n "$(PYTHON)" || \
		{ echo "no Python 3.10 to 3.13 found; install one, or give make PYTHON=/path/to/python" >&2; exit 1; }
	@# Debian's Python without python3-venv leaves an environment that has no pip.
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || \
		{ echo "no environment could be made; on Debian and Ubuntu install python3-venv and python3-dev" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	PATH="$(BIN):$$PATH" PYTHON="$(abspath $(BIN))/python" bash recipes/demo/run.sh

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(PYTEST_FLAGS)

test-recipes: $(STAMP)
	$(BIN)/python -m pytest -m recipes --timeout 1200

test-pythons: $(STAMP)
	$(BIN)/python -m pytest -m pythons tests/pythons

# What builds the site is not needed for anything else, and is installed when it is asked for.
docs: $(STAMP)
	$(BIN)/python -c 'import material, mkdocstrings' 2>/dev/null || $(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources $(SHELL_SCRIPTS)
	$(BIN)/hadolint Dockerfile
	$(MAKE) docs
	$(BIN)/python -m pytest $(PYTEST_FLAGS)
	$(MAKE) test-slow

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
