# Every target sets itself up: a virtual environment in .venv with this project in it.
# Needs Python >= 3.11 (make PYTHON=python3.12 for another one) and make.
#
# `make` alone lists them.
#
# What the tests compile is kept in ~/.cache/lowrank_jax: the second run is faster.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PEERS := .venv-peers
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-fast test-slow faults lint build benchmark peers docs \
  docs-serve notebooks hooks clean

help:  ## this list
	@echo 'make TARGET'
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

quickstart: $(READY)  ## train on real digits, cut, evaluate, compare, draw
	$(BIN)/python -m train.quickstart --config=configs/digits_mlp.py \
	  --workdir=runs/quickstart

test: $(READY)  ## all but the slow ones, a fourteenth of the contract tables; 2 workers, 5 GiB each
	$(PYTEST)

test-fast: $(READY)  ## for every save: no training, no binaries, no comparison with references
	$(PYTEST) -m 'not slow and not long'

test-slow: $(READY)  ## whole recipes, minutes each, and the rest of the tables
	$(BIN)/python -m pytest -m slow

faults: $(READY)  ## 206 small runs, killed and damaged, until all are done; half an hour
	$(BIN)/python -W ignore -m tests.faults.campaign --runs=206 --jobs=2 \
	  --report=docs/faults.md

lint: $(READY)  ## ruff, and mypy on the library
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

build: $(READY)  ## the wheel and the sdist, in dist/
	$(BIN)/python -m build --no-isolation

benchmark: $(READY)  ## every table of benchmarks/ into docs/results.md, on an idle machine; long
	for name in import_time step_time inference scaling host_time penalty_time latency elastic; do \
	  $(BIN)/python -m benchmarks.$$name --docs=docs/results.md || exit 1; done
	$(MAKE) peers

peers: $(READY) $(PEERS)/ready  ## the one against PyTorch, which it installs into .venv-peers
	$(BIN)/python -m benchmarks.peers --docs=docs/results.md

$(PEERS)/ready: benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --requirement benchmarks/peers.txt
	touch $@

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, this is " \
	  + sys.version.split()[0] + "; use make PYTHON=python3.11") \
	  if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $(READY)

docs: $(READY)  ## the documentation, into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: $(READY)  ## the documentation at http://127.0.0.1:8000, built anew at changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

notebooks: $(READY)  ## run the notebooks and write docs/notebooks; ten minutes of CPU
	for name in train_and_cut_vit own_method language_model; do \
	  $(BIN)/python -m notebooks.render $$name || exit 1; done

hooks: $(READY)  ## the linter before every commit
	$(BIN)/python -m pip install --quiet pre-commit
	$(BIN)/pre-commit install

clean:  ## remove the environments and what was built
	rm -rf $(VENV) $(PEERS) build dist site *.egg-info
