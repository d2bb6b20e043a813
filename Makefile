# make quickstart   the whole journey on this machine, on real clips
# make test         the tests, except those on a SLURM cluster
# make test-cluster those on a SLURM cluster of four nodes, which they bring up on this machine (root, Debian packages)
# make test-all     all tests
# All set up a virtual environment first, where it is missing.

PYTHON ?= python3
VENV ?= .venv
WHERE ?= quickstart
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: quickstart test test-cluster test-all check docs clean help

help:
	@sed -n 's/^# //p' Makefile

quickstart: $(READY)
	$(BIN)/cosmos-hpc quickstart --out $(WHERE)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-cluster: $(READY)
	$(BIN)/python -m pytest -m slurm tests/cluster

test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m ""

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
