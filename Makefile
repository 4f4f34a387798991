# The commands of this project. Every target sets itself up first; `make` alone says what there is.

SHELL := /bin/sh
BIN   := .venv/bin
PYTEST := $(BIN)/python -m pytest
# Two workers suit the smallest machine that we care for; `make test JOBS=8` for a larger one.
JOBS  ?= 2
STATE_DIR ?= .tagmem

# Directories come as the parts that they test do.
TYPED := $(wildcard src tests bench)
FAST  := $(wildcard tests/test_*.py \
	$(addprefix tests/,unit property vectors contract scenarios docs))

.DEFAULT_GOAL := help
.PHONY: help setup static check test test-vm test-fast sim scenario demo demo-vm bench up down \
	docs format lock clean distclean

help: ## what there is
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## Debian packages, .venv, locked packages; quick when nothing changed
	@scripts/setup.sh

static: setup
	$(BIN)/ruff format --check $(TYPED)
	$(BIN)/ruff check $(TYPED)
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy $(TYPED)

check: static ## format, lint, types, import contracts, tidy and the fast tests; under a minute
	$(PYTEST) -q -n $(JOBS) $(FAST)

test-fast: check ## the same as check: no guests

test: static ## everything: check, simulator, real processes, the demo, documents, real guests
	$(PYTEST) -n $(JOBS) tests

test-vm: setup ## only real guests, on both QEMUs (200 MB of Debian packages are brought once)
	$(PYTEST) tests/vm

sim: setup ## simulated worlds; SEED=123 for that one
	$(PYTEST) $(if $(SEED),-s --seed $(SEED),-n $(JOBS)) tests/sim

scenario: setup ## scenario transcripts; FILE=name for one, REWRITE=1 to write them anew
	$(PYTEST) tests/scenarios $(if $(FILE),-k $(basename $(notdir $(FILE)))) $(if $(REWRITE),--rewrite)

demo: setup ## the seven steps with a real memcached, told as they happen
	$(BIN)/tagmem demo

demo-vm: setup ## the same with memcached in a virtual machine
	$(BIN)/tagmem demo --vm

bench: setup ## every benchmark against its floor; ARGS="codec placement" for some
	$(BIN)/python -m bench $(ARGS)

up: setup ## leave the demo's system running; STATE_DIR=… for its state
	$(BIN)/tagmem up --state-dir $(STATE_DIR)

down: setup ## end what `make up` left running
	$(BIN)/tagmem down --state-dir $(STATE_DIR)

docs: setup ## links, promises and examples of the documents
	$(PYTEST) -q tests/docs

format: setup ## format and fix what a tool can fix
	$(BIN)/ruff format $(TYPED)
	$(BIN)/ruff check --fix-only $(TYPED)

lock: ## resolve the dependencies anew into requirements.lock
	@scripts/lock.sh

clean: ## remove what the tools left behind, not the state of a running system
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .cache build dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## and the virtual environment
	rm -rf .venv
