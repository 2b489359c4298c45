# One command each; CI calls the same. Everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

# A tier of tests is a directory of them.
TIERS := $(sort $(patsubst tests/%/,%,$(dir $(wildcard tests/*/test_*.py))))

.PHONY: help demo up test conformance check format bench clean

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

.venv/demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e '.[demo]'
	touch $@

.venv/dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e '.[dev]'
	touch $@ .venv/demo

.venv/bench: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e '.[bench]'
	touch $@ .venv/dev .venv/demo

demo: .venv/demo ## the whole way of the data, on real airports, in a few minutes
	$(BIN)/python examples/demo.py

up: .venv/demo ## embedded AWS, worker and front door, in the foreground
	$(BIN)/mdstore up

test: .venv/dev ## all tests, in several processes; TIER=unit: one tier; ARGS='-k word': more arguments for pytest
	$(if $(filter-out $(TIERS),$(TIER)),$(error TIER=$(TIER): expected one of $(TIERS)))
	$(if $(filter browser,$(or $(TIER),browser)),$(BIN)/python -m tests.browser.chromium)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(addprefix tests/,$(TIER)) $(ARGS)

conformance: .venv/dev ## what DynamoDB must do, of the emulators; of another with ENDPOINT=url, of AWS with AWS=1
	$(BIN)/python -m pytest tests/conformance $(if $(ENDPOINT),--endpoint $(ENDPOINT)) $(if $(AWS),--aws)

check: .venv/dev ## format, lint, types, imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/dev ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/bench ## measure speed, side by side with others (an hour; QUICK=1: two minutes, shows only that all of it works)
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick,--out docs/benchmarks)

clean: ## remove what make made
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
