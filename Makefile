# One command each; CI calls the same. Everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: help demo up test check format bench clean

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

.venv/demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e '.[demo]'
	touch $@

.venv/dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e '.[dev]'
	touch $@ .venv/demo

demo: .venv/demo ## the whole way of the data, on real airports, in a few minutes
	$(BIN)/python examples/demo.py

up: .venv/demo ## embedded AWS, worker and front door, in the foreground
	$(BIN)/mdstore up

test: .venv/dev ## all tests
	$(BIN)/python -m pytest

check: .venv/dev ## format, lint, types, imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/dev ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/dev ## measure; results and plots go to benchmarks/results
	$(BIN)/python -m benchmarks

clean: ## remove what make made
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
