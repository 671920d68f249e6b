# Everything here works on a machine with Python 3.11 and nothing else: the environments are made on the first call, and a later
# call installs only what changed.
#
#   make demo RECIPE=configs/recipes/vit.yaml        another recipe
#   make bench CONFIG=configs/compare/smoke.yaml BENCH=runs/bench      whether the comparison runs, in two minutes
#   make bench-step FLAGS='--models bert --rounds 3' some of the measurements of a step
#   make test TESTS=tests/test_optimizer.py          some of the tests
#   make test PYTHON=python3.13                      another Python, for a new environment

PYTHON  ?= python3
VENV    ?= .venv
LOW     ?= .venv-lowest
# Installed before everything else, so that no package chooses another build of torch.
TORCH   ?= torch==2.13.0
# The lowest versions that pyproject.toml admits, for `make test-lowest`.
LOWEST  ?= accelerate==1.4.0 peft==0.18.0 transformers==5.6.0

TESTS   ?= tests
# What meets transformers and accelerate, for `make test-lowest`.
LOWEST_TESTS ?= $(wildcard tests/test_imports.py tests/test_registration.py tests/test_callbacks.py tests/test_*trainer*.py \
                           tests/test_model_card.py tests/test_main.py tests/scripts/test_finetune*.py tests/equivalence)
WORKERS ?= 2

CONFIG  ?= configs/compare/cpu.yaml
BENCH   ?= benchmarks
FLAGS   ?=
RECIPE  ?= configs/recipes/bert.yaml
OUTPUT  ?= runs/demo
LAUNCH  ?= configs/accelerate/auto_1.yaml
# accelerate gives one thread to a single process that may use a GPU, unless told otherwise. Threads that wait sleep: spinning
# makes a training several times slower as soon as something else wants a core.
THREADS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)

BIN     := $(VENV)/bin
PIP     := -m pip --disable-pip-version-check
# An environment is up to date when its stamp carries the sum of all that decides its contents.
KEY     := $(shell { cat pyproject.toml; grep __version__ hf_eva/__init__.py; echo '$(TORCH) $(LOWEST) $(CURDIR)'; } \
                   2>/dev/null | cksum | cut -d' ' -f1)
DEV     := $(VENV)/.stamps/dev-$(KEY)
EMBEDDED := $(VENV)/.stamps/embedded-$(KEY)
LOW_DEV := $(LOW)/.stamps/dev-$(KEY)
# No test reaches for a network, and no two processes fight for the cores.
QUIET   := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
PYTEST  := -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help env demo bench bench-step test test-slow test-lowest lint format docs build clean clean-env

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(if $(wildcard $(DEV)),$(DEV),$(EMBEDDED))  ## fine-tune a real BERT with Eva: a table, a plot and a model card in runs/demo
	OMP_NUM_THREADS=$(THREADS) OMP_WAIT_POLICY=passive $(BIN)/accelerate launch --config_file $(LAUNCH) \
		scripts/finetune.py $(RECIPE) --output_dir $(OUTPUT) --overwrite_output_dir true

bench: $(DEV)  ## compare optimizers as CONFIG says, with the FLAGS of scripts/compare.py: benchmarks/REPORT.md
	$(BIN)/python scripts/compare.py $(CONFIG) $(FLAGS) --output $(BENCH)

bench-step: $(DEV)  ## what a step of each optimizer costs, with the FLAGS of scripts/bench_step.py: benchmarks/step.md
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python scripts/bench_step.py $(FLAGS) \
		--output $(BENCH)/step.md $(BENCH)/step.csv

env: $(DEV)  ## the environment for all that follows; every other target makes it by itself

test: $(DEV)  ## all tests but the slow ones
	$(QUIET) $(BIN)/python $(PYTEST) -m "not slow" $(TESTS)

test-slow: $(DEV)  ## the slow tests
	@echo '$(BIN)/python $(PYTEST) -m slow $(TESTS)'
	@$(QUIET) $(BIN)/python $(PYTEST) -m slow $(TESTS) || { code=$$?; [ $$code -eq 5 ] && echo "no test is marked slow" || exit $$code; }

test-lowest: $(LOW_DEV)  ## the tests of the trainer side, on the lowest versions that are supported
	$(QUIET) $(LOW)/bin/python $(PYTEST) -m "not slow" $(or $(LOWEST_TESTS),$(TESTS))

lint: $(DEV)  ## ruff, its formatter and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(DEV)  ## what ruff can mend by itself
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: $(DEV)  ## the documentation, in build/docs; a dead link is an error
	$(BIN)/python -m zensical build --strict --clean

build: $(DEV)  ## the wheel and the source archive, in dist/, and an import of that wheel
	rm -rf build dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	@rm -rf build/wheel && $(BIN)/python $(PIP) install --quiet --no-deps --target build/wheel dist/*.whl
	@cd build/wheel && PYTHONPATH=$(CURDIR)/build/wheel $(abspath $(BIN))/python -c \
		'import hf_eva; assert "build/wheel" in hf_eva.__file__, hf_eva.__file__; print("imports hf_eva", hf_eva.__version__)'

clean:  ## remove what builds and tools left behind; environments and runs stay
	rm -rf build dist *.egg-info .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find hf_eva scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

clean-env:  ## remove the environments
	rm -rf $(VENV) $(LOW)

# Environments -------------------------------------------------------------------------------------------------------------

# A package whose installation was cut off has no INSTALLER file: pip would take it for installed. Forgetting it makes pip put all
# of it back.
define mend
	@for info in $(1)/lib/python3*/site-packages/*.dist-info; do \
		if [ -d "$$info" ] && [ ! -e "$$info/INSTALLER" ]; then echo "mending $$info"; rm -rf "$$info"; fi; \
	done
endef

# $(1): environment, $(2): requirements. torch is named twice, so that the second call cannot move it.
define fill
	$(call mend,$(1))
	@echo "installing $(TORCH) into $(1)"
	@$(1)/bin/python $(PIP) install --quiet '$(TORCH)'
	@echo "installing $(2) into $(1)"
	@$(1)/bin/python $(PIP) install --quiet '$(TORCH)' $(2)
	@rm -f $(1)/.stamps/dev-* $(1)/.stamps/embedded-*
	@touch $@
endef

%/.stamps/venv:
	@$(PYTHON) -c 'import sys; sys.exit("hf_eva needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] \
		+ ": run make with PYTHON=python3.11 or the path of another one" if sys.version_info < (3, 11) else 0)'
	$(call mend,$*)
	@$*/bin/python -c '' 2>/dev/null || { echo "making $* with $(PYTHON)"; rm -rf $*; }
	@$*/bin/python -c 'import importlib.metadata as m; m.version("pip")' 2>/dev/null || $(PYTHON) -m venv $*
	@mkdir -p $*/.stamps && touch $@

$(DEV): | $(VENV)/.stamps/venv
	$(call fill,$(VENV),-e '.[dev]')

$(EMBEDDED): | $(VENV)/.stamps/venv
	$(call fill,$(VENV),-e '.[embedded]')

$(LOW_DEV): | $(LOW)/.stamps/venv
	$(call fill,$(LOW),-e '.[dev]' $(LOWEST))
