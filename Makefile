# Every verb builds the environments it needs, and only what is missing of them.

PYTHON ?= python3
# What `make demo` shows: vllm, sglang, or nothing for both.
ENGINE ?=
CASES ?= 1000000
JOBS ?= 2
# Of `make mutants`: so many of them, chosen by SEED, or all; those of some files; KEEP=1 after a change of tests.
SAMPLE ?=
SEED ?= 1
ONLY ?=
KEEP ?=
# Of `make releases`: write what it finds.
WRITE ?=
# Parts of `make test-all`, or nothing for all that have not passed; python3 ci/test_all.py --list names them.
PART ?=

.PHONY: help envs demo releases test test-all test-core test-vllm test-sglang test-kernels test-faults fuzz mutants lint format \
	wheel docs

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

envs: ## build the environments of `make test` under .venvs/ (resumes where it stopped)
	@$(PYTHON) ci/envs.py

demo: ## tiny models of four families, stock against fused, in both engines (or ENGINE=vllm, ENGINE=sglang)
	@$(PYTHON) ci/demo.py $(ENGINE)

releases: ## every listed release, and the newest, as the package index has them, against patches/ (WRITE=1 writes)
	@$(PYTHON) ci/envs.py core
	@.venvs/core/bin/python ci/releases.py $(if $(WRITE),--write)

test: envs ## lint, core tests, one release of each engine in whole, the others in short: half an hour on two cores
	@$(PYTHON) ci/testing.py

test-all: ## every test on every release, in parts; what passed on the same tree is not run again (or PART=NAME)
	@$(PYTHON) ci/envs.py --all
	@$(PYTHON) ci/test_all.py $(PART)

test-core: ## the tests that need no engine
	@$(PYTHON) ci/envs.py core
	@$(PYTHON) ci/testing.py core

test-vllm: ## those of `make test` on the real vLLM, every release of the matrix
	@$(PYTHON) ci/envs.py --engine vllm
	@$(PYTHON) ci/testing.py vllm

test-sglang: ## those of `make test` on the real SGLang, every release of the matrix
	@$(PYTHON) ci/envs.py --engine sglang
	@$(PYTHON) ci/testing.py sglang

fuzz: ## CASES (a million) random checkpoints and policies through the decision
	@$(PYTHON) ci/envs.py core
	@.venvs/core/bin/python -m tests.core.fuzz --cases $(CASES) --seconds 86400 --jobs $(JOBS)

mutants: ## small changes of the core that a test must notice: all, or SAMPLE=200 SEED=1, or ONLY='decision/*'
	@$(PYTHON) ci/envs.py core
	@.venvs/core/bin/python ci/mutants.py --seed $(SEED) --jobs $(JOBS) $(if $(SAMPLE),--sample $(SAMPLE)) \
		$(if $(ONLY),--only '$(ONLY)') $(if $(KEEP),--keep)

test-kernels: ## the Triton kernels, in Triton's interpreter
	@$(PYTHON) ci/envs.py --engine sglang
	@$(PYTHON) ci/testing.py kernels

test-faults: ## every planted fault and every clean model, on one release of each engine
	@$(PYTHON) ci/envs.py
	@$(PYTHON) ci/testing.py faults

lint: ## ruff, mypy (python ci/staged.py mypy -p fse_patch) and the import contracts
	@$(PYTHON) ci/envs.py core
	@$(PYTHON) ci/testing.py lint

format: ## let ruff rewrite what it can
	@$(PYTHON) ci/envs.py core
	@.venvs/core/bin/ruff check --fix . && .venvs/core/bin/ruff format .

wheel: ## build the sdist and the wheel into dist/, and check what they hold
	@$(PYTHON) ci/envs.py core
	@.venvs/core/bin/python ci/make_wheel.py

docs: ## the pages as a site in .cache/site; a link that leads nowhere is an error
	@$(PYTHON) ci/envs.py core
	@.venvs/core/bin/python ci/make_docs.py
