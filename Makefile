# `make help` lists the targets. Everything runs in .venv, which is made on first use.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint format bench clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# A virtual environment is complete when its stamp is newer than what it was made from.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/.installed ## make .venv and install wina with all that its tests need

demo: install ## dense, TEAL and WINA on a real model: quality, speed, text and out/demo.png
	@$(BIN)/wina demo

test: install ## all quick tests (no downloads of models)
	$(BIN)/python -m pytest -m 'not slow and not gpu'

test-slow: install ## tests on the real demo models, fetched on first use
	$(BIN)/python -m pytest -m 'slow and not gpu'

lint: install ## what CI checks: ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## operator and decode speed on this machine (leave it alone meanwhile)
	$(BIN)/wina bench kernels
	$(BIN)/wina bench decode --model demo
	$(BIN)/wina bench decode --shape llama-3.2-1b
	$(BIN)/wina bench decode --shape llama-3.2-1b --dtype bfloat16

clean: ## remove the virtual environment and caches of tools
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info out
