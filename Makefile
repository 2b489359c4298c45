# Each task is one command, and CI runs the same commands. Packages are installed into .venv.
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

demo: .venv/demo ## load, change and verify real airports through the whole system, in a few minutes
	$(BIN)/python examples/demo.py

up: .venv/demo ## run the embedded AWS, a worker and the HTTP API in the foreground
	$(BIN)/mdstore up

test: .venv/dev ## run all tests, or one tier of them with TIER=unit; ARGS='-k word' gives pytest more arguments
	$(if $(filter-out $(TIERS),$(TIER)),$(error TIER=$(TIER): expected one of $(TIERS)))
	$(if $(filter browser,$(or $(TIER),browser)),$(BIN)/python -m tests.browser.chromium)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(addprefix tests/,$(TIER)) $(ARGS)

conformance: .venv/dev ## test that the emulators behave like DynamoDB; ENDPOINT=url tests another endpoint, AWS=1 tests AWS
	$(BIN)/python -m pytest tests/conformance $(if $(ENDPOINT),--endpoint $(ENDPOINT)) $(if $(AWS),--aws)

check: .venv/dev ## check format, lint, types and imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/dev ## format the code and fix lint findings where possible
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/bench ## measure speed side by side with other tools (one hour; QUICK=1: two minutes, only to show that it works)
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick,--out docs/benchmarks)

clean: ## remove .venv and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
