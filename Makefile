# Every verb builds the environments it needs, and only what is missing of them.

PYTHON ?= python3
DEMO_ENV ?= vllm-0.32.0
CASES ?= 1000000
JOBS ?= 2

.PHONY: help envs demo test test-core test-vllm fuzz lint format

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

envs: ## build every environment of ci/matrix.yaml under .venvs/ (resumes where it stopped)
	@$(PYTHON) ci/envs.py

demo: ## serve tiny checkpoints of the four families with stock and fused vLLM, and compare
	@$(PYTHON) ci/envs.py $(DEMO_ENV)
	@.venvs/$(DEMO_ENV)/bin/python ci/demo.py

test: envs ## everything: lint, core tests, every engine release
	@$(PYTHON) ci/testing.py

test-core: ## the tests that need no engine
	@$(PYTHON) ci/envs.py core
	@$(PYTHON) ci/testing.py core

test-vllm: ## the tests on the real vLLM, every release of the matrix
	@$(PYTHON) ci/envs.py --engine vllm
	@$(PYTHON) ci/testing.py vllm

fuzz: ## CASES (a million) random checkpoints and policies through the decision
	@$(PYTHON) ci/envs.py core
	@.venvs/core/bin/python -m tests.core.fuzz --cases $(CASES) --seconds 86400 --jobs $(JOBS)

lint: ## ruff, mypy (python ci/staged.py mypy -p fse_patch) and the import contracts
	@$(PYTHON) ci/envs.py core
	@$(PYTHON) ci/testing.py lint

format: ## let ruff rewrite what it can
	@$(PYTHON) ci/envs.py core
	@.venvs/core/bin/ruff check --fix . && .venvs/core/bin/ruff format .
