# Every verb builds the environments it needs, and only what is missing of them.

PYTHON ?= python3
# What `make demo` shows: vllm, sglang, or nothing for both.
ENGINE ?=
CASES ?= 1000000
JOBS ?= 2

.PHONY: help envs demo test test-core test-vllm test-sglang test-kernels test-faults fuzz lint format

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

envs: ## build every environment of ci/matrix.yaml under .venvs/ (resumes where it stopped)
	@$(PYTHON) ci/envs.py

demo: ## tiny models of four families, stock against fused, in both engines (or ENGINE=vllm, ENGINE=sglang)
	@$(PYTHON) ci/demo.py $(ENGINE)

test: envs ## everything: lint, core tests, every engine release
	@$(PYTHON) ci/testing.py

test-core: ## the tests that need no engine
	@$(PYTHON) ci/envs.py core
	@$(PYTHON) ci/testing.py core

test-vllm: ## the tests on the real vLLM, every release of the matrix
	@$(PYTHON) ci/envs.py --engine vllm
	@$(PYTHON) ci/testing.py vllm

test-sglang: ## the tests on the real SGLang, every release of the matrix
	@$(PYTHON) ci/envs.py --engine sglang
	@$(PYTHON) ci/testing.py sglang

fuzz: ## CASES (a million) random checkpoints and policies through the decision
	@$(PYTHON) ci/envs.py core
	@.venvs/core/bin/python -m tests.core.fuzz --cases $(CASES) --seconds 86400 --jobs $(JOBS)

test-kernels: ## the Triton kernels, in Triton's interpreter
	@$(PYTHON) ci/envs.py --engine sglang
	@$(PYTHON) ci/testing.py kernels

test-faults: ## every planted fault and every clean model, in the releases that the demo shows
	@$(PYTHON) ci/envs.py
	@$(PYTHON) ci/testing.py faults

lint: ## ruff, mypy (python ci/staged.py mypy -p fse_patch) and the import contracts
	@$(PYTHON) ci/envs.py core
	@$(PYTHON) ci/testing.py lint

format: ## let ruff rewrite what it can
	@$(PYTHON) ci/envs.py core
	@.venvs/core/bin/ruff check --fix . && .venvs/core/bin/ruff format .
