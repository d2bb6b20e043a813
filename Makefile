# make install      the virtual environment, .venv
# make quickstart   the whole journey on this machine, on real clips
# make test         the tests, except those on a SLURM cluster and those that train for minutes
# make test-cluster those on a SLURM cluster of four nodes, which they bring up on this machine (root, Debian packages)
# make test-training  trains narrow networks on the quickstart's films, and compares losses and validation
# make test-faults  kills a run 25 times, wherever it can be hit, and compares it with the unbroken one (root)
# make test-faults-all  the same, 200 times
# make test-all     all tests but those of make test-training
# All set up the virtual environment first, where it is missing.

PYTHON ?= python3
VENV ?= .venv
WHERE ?= quickstart
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: install quickstart test test-cluster test-training test-faults test-faults-all test-all check docs clean help

help:
	@sed -n 's/^# //p' Makefile

install: $(READY)

quickstart: $(READY)
	$(BIN)/cosmos-hpc quickstart --out $(WHERE)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-cluster: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slurm tests/cluster

test-training: $(READY)
	$(BIN)/python -m pytest -m training tests/training

test-faults: $(READY)
	COSMOS_HPC_FAULTS=25 $(BIN)/python -m pytest -s tests/faults

test-faults-all: $(READY)
	COSMOS_HPC_FAULTS=200 $(BIN)/python -m pytest -s tests/faults

test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not training"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m cosmos_hpc.config.reference README.md

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[quickstart,dev]'
	touch $(READY)

clean:
	rm -rf $(VENV)
