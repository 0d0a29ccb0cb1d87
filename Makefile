# Every target sets itself up: a virtual environment in .venv with this project in it.
# Needs Python >= 3.11 (make PYTHON=python3.12 for another one) and make.
#
# test       all but the slow ones, a fourteenth of the contract tables; 2 workers, 5 GiB each
# test-fast  for every save: no training, no binaries, no comparison with references
# test-slow  whole recipes, minutes each, and the rest of the tables
# faults     206 small runs, killed and damaged, until all are done; half an hour
# benchmark  every table of benchmarks/ into docs/results.md, on an idle machine; long
# peers      the one against PyTorch, which it installs into .venv-peers
#
# What the tests compile is kept in ~/.cache/lowrank_jax: the second run is faster.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PEERS := .venv-peers
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: quickstart test test-fast test-slow faults lint benchmark peers clean

quickstart: $(READY)
	$(BIN)/python -m train.quickstart --config=configs/digits_mlp.py \
	  --workdir=runs/quickstart

test: $(READY)
	$(PYTEST)

test-fast: $(READY)
	$(PYTEST) -m 'not slow and not long'

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

faults: $(READY)
	$(BIN)/python -W ignore -m tests.faults.campaign --runs=206 --jobs=2 \
	  --report=docs/faults.md

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

benchmark: $(READY)
	for name in step_time inference scaling host_time penalty_time latency elastic; do \
	  $(BIN)/python -m benchmarks.$$name --docs=docs/results.md || exit 1; done
	$(MAKE) peers

peers: $(READY) $(PEERS)/ready
	$(BIN)/python -m benchmarks.peers --docs=docs/results.md

$(PEERS)/ready: benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --requirement benchmarks/peers.txt
	touch $@

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, this is " \
	  + sys.version.split()[0] + "; use make PYTHON=python3.11") \
	  if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $(READY)

clean:
	rm -rf $(VENV) $(PEERS)

.PHONY: notebooks hooks

notebooks: $(READY)  ## run the notebooks and write docs/notebooks; ten minutes of CPU
	for name in train_and_cut_vit own_method language_model; do \
	  $(BIN)/python -m notebooks.render $$name || exit 1; done

hooks: $(READY)  ## the linter before every commit
	$(BIN)/python -m pip install --quiet pre-commit
	$(BIN)/pre-commit install
