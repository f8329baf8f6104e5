# Every target sets up what it needs: .venv, and for the tests two models in a cache
# (QKVNORM_LENS_CACHE, by default qkvnorm-lens in the user's cache directory).

PYTHON ?= python3
# Another build of torch: make TORCH=torch==2.12.1 PINS=
TORCH ?= torch==2.13.0
PINS ?= -c constraints.txt
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SETUP := .venv/installed
LEGACY := .venv-legacy
NEWEST := .venv-newest
CACHES := .venv-caches
TRITON := .venv-triton
NIGHTLY := .venv-nightly
DIST := .venv-dist
# Every process would translate some 500 modules anew.
export PYTHONDONTWRITEBYTECODE :=
# A process per core, with one thread each: small models gain nothing from more.
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8

.PHONY: help setup dist probe test test-legacy test-newest test-caches test-triton nightly slow long matrix browser smoke lint format real-model \
	models benchmarks docs notebooks tutorials clean

help:
	@echo "make probe       which heads of the shipped model lose their token at which noise"
	@echo "make test        fast tests and a real-model smoke test"
	@echo "make test-legacy a HookedTransformer of TransformerLens 3.9, in its own .venv-legacy"
	@echo "make test-newest the same library on transformers 5.24, in its own .venv-newest"
	@echo "make nightly     the newest release of everything, and what breaks there, in .venv-nightly"
	@echo "make test-caches stores of ours beside quanto's and HQQ's, in their own .venv-caches"
	@echo "make test-triton kernels for CUDA under Triton's interpreter, in their own .venv-triton"
	@echo "make slow        the slow tests;  make long: thousands of fuzzed cases"
	@echo "make matrix      every architecture that TransformerLens knows"
	@echo "make browser     the report's page in the system's Chromium"
	@echo "make smoke       every experiment of the paper, in its smallest form"
	@echo "make lint        ruff and mypy;  make format rewrites"
	@echo "make real-model  fetch and convert the models that the tests read"
	@echo "make models      train what is missing of the experiments' models, for hours"
	@echo "make benchmarks  time and memory"
	@echo "make notebooks   run the tutorials;  make tutorials stores what they show"
	@echo "make dist        wheel and source archive, checked, in dist/"
	@echo "make docs        the documentation as a site, in site/"
	@echo "make clean       remove what the tools leave behind; the environment stays"

setup: $(SETUP)

$(SETUP): pyproject.toml constraints.txt
	@echo "installing into .venv: some three minutes, 2 GB"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -q $(PINS) "$(TORCH)"
	$(PIP) install -q $(PINS) -e ".[dev]"
	touch $@

probe: $(SETUP)
	HF_HUB_OFFLINE=1 $(BIN)/qkvnorm-lens probe --out runs/probe $(ARGS)

test: real-model
	$(PARALLEL) --dist loadfile --no-loadscope-reorder --durations=5 \
		-m "not slow and not long and not matrix and not browser and not notebooks" $(ARGS)

matrix: $(SETUP)
	HF_HUB_OFFLINE=1 $(PARALLEL) -m matrix --durations=5 $(ARGS)

browser: $(SETUP)
	HF_HUB_OFFLINE=1 $(BIN)/pytest -m browser --durations=5 $(ARGS)

# The main environment writes weights and results, which the other compares with its own.
test-legacy: $(SETUP) $(LEGACY)/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.legacy.reference $(LEGACY)/reference
	HF_HUB_OFFLINE=1 $(LEGACY)/bin/pytest --confcutdir=tests/legacy tests/legacy $(ARGS)

$(LEGACY)/installed: pyproject.toml constraints-legacy.txt
	test -x $(LEGACY)/bin/python || $(PYTHON) -m venv $(LEGACY)
	$(LEGACY)/bin/python -m pip --disable-pip-version-check install -q --no-compile \
		$(if $(PINS),-c constraints-legacy.txt) "$(TORCH)" transformer-lens==3.9.0 pytest -e .
	touch $@

# A later transformers than pyproject.toml allows: what is refused there is refused by name.
# Everything that `make test` runs, with NEWEST_TESTS=tests.
NEWEST_TESTS ?= tests/hooks/noise/test_caches.py tests/hooks/noise/test_noise.py \
	tests/hooks/model/test_tap.py tests/hooks/sites/test_sites.py
test-newest: $(NEWEST)/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(NEWEST)/bin/pytest $(NEWEST_TESTS) \
		-m "not slow and not long and not matrix and not browser and not notebooks" $(ARGS)

$(NEWEST)/installed: pyproject.toml constraints.txt
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip --disable-pip-version-check install -q $(PINS) "$(TORCH)"
	$(NEWEST)/bin/python -m pip --disable-pip-version-check install -q $(PINS) -e ".[plots,test,tutorials]"
	$(NEWEST)/bin/python -m pip --disable-pip-version-check install -q --no-deps transformers==5.24.0
	touch $@

# The newest release of everything, whatever pyproject.toml allows, made anew each time. TORCH=torch
# takes torch's own newest (gigabytes of CUDA); PYTHON=python3.13 another Python. What broke, and
# beside which versions, is in runs/newest/newest.md.
nightly: real-model
	rm -rf $(NIGHTLY)
	$(PYTHON) -m venv $(NIGHTLY)
	$(NIGHTLY)/bin/python -m pip --disable-pip-version-check install -q "$(TORCH)"
	$(NIGHTLY)/bin/python -m pip --disable-pip-version-check install -q --upgrade --upgrade-strategy eager \
		-e ".[plots,test,tutorials]" "$(TORCH)"
	$(NIGHTLY)/bin/python -m pip --disable-pip-version-check install -q --upgrade --no-deps \
		transformers transformer-lens
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(NIGHTLY)/bin/python -m tests.support.newest $(ARGS)

# Where hqq is installed, transformers loads torch's compiler with every model, so not in .venv.
test-caches: $(CACHES)/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(CACHES)/bin/python -m pytest --confcutdir=tests/caches -W ignore tests/caches $(ARGS)

$(CACHES)/installed: $(SETUP)
	test -x $(CACHES)/bin/python || $(PYTHON) -m venv $(CACHES)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(CACHES)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	$(CACHES)/bin/python -m pip --disable-pip-version-check install -q --no-deps \
		optimum-quanto==0.2.7 hqq==0.2.8.post1 termcolor ninja
	touch $@

# Triton's kernels under its interpreter, and compiled for an H200, which needs none.
test-triton: $(TRITON)/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(TRITON)/bin/python -m pytest -n 2 --confcutdir=tests/triton -W ignore \
		tests/triton $(ARGS)

$(TRITON)/installed: $(SETUP)
	test -x $(TRITON)/bin/python || $(PYTHON) -m venv $(TRITON)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(TRITON)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	$(TRITON)/bin/python -m pip --disable-pip-version-check install -q --no-deps triton==3.9.0
	touch $@

slow: real-model
	$(PARALLEL) -m slow --durations=10 $(ARGS)

# Thousands of fuzzed inputs, arguments, damaged files and pairs of threads; in no CI.
long: real-model
	$(PARALLEL) -m long --durations=10 $(ARGS)

smoke: real-model
	HF_HUB_OFFLINE=1 $(BIN)/qkvnorm-lens experiment all --smoke --out runs/smoke
	HF_HUB_OFFLINE=1 $(BIN)/qkvnorm-lens experiment all --smoke --out runs/smoke/smollm2 \
		--model "$$($(BIN)/python -c 'from tests.support.real_models import *; print(smollm2_path())')"

lint: $(SETUP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(SETUP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

real-model: $(SETUP)
	$(BIN)/python -m tests.support.real_models

# Those that are there stay; a stopped run goes on. The wheel has none of them.
models: $(SETUP)
	$(BIN)/python -m qkvnorm_lens.training.texts.make
	$(BIN)/python -m qkvnorm_lens.experiments.train $(ARGS)

benchmarks: real-model
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks $(ARGS)

notebooks: real-model
	HF_HUB_OFFLINE=1 $(BIN)/pytest -m notebooks --durations=10 $(ARGS)

# ARGS="01 05": these alone.
tutorials: real-model
	$(BIN)/python tutorials/build.py $(ARGS)

# Offline, and every warning is an error (mkdocs.yml: strict).
docs: $(SETUP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build $(ARGS)

# What a release uploads; the slow tests install the wheel.
dist: $(DIST)/installed
	rm -rf dist
	$(DIST)/bin/python -m build
	$(DIST)/bin/twine check --strict dist/*

$(DIST)/installed:
	test -x $(DIST)/bin/python || $(PYTHON) -m venv $(DIST)
	$(DIST)/bin/python -m pip --disable-pip-version-check install -q build twine
	touch $@

clean:
	rm -rf site .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
