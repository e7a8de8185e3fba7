# `make demo` and `make test` need Python 3.11 to 3.13 and a C++ compiler, and set up the rest in $(VENV).
#
#   make demo       complete a prompt with the stored model: eager, Inductor, kvbuffer
#   make test       the tests                    make test ARGS="-k packaging"   some of them
#   make nightly    the slow sweeps              make lint      ruff and mypy
#   make docs       the manual, into build/manual (make docs ARGS=serve shows it while it is written)
#   make sanitize   generated C++ kernels under AddressSanitizer and UBSan
#   make release-check   build the package, install it on each Python here, try it
#   make clean      remove the environment and everything built
#
# Variables: PYTHON (interpreter that creates the environment), VENV (its folder), WORKERS (test
# processes), ARGS (further arguments of the demo or of pytest), TORCH_REQUIREMENTS (pip arguments that
# choose the torch wheel).

VENV    ?= .venv
WORKERS ?= 2
ARGS    ?=

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
FIND_PYTHON = for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $$p && break; done
PYTHON ?= $(or $(shell $(FIND_PYTHON)),python3)

# On Linux, PyPI's wheel of torch is the CUDA one. For a smaller CPU wheel point pip at PyTorch's CPU index
# first (pip config, PIP_EXTRA_INDEX_URL) or give other arguments here.
TORCH_REQUIREMENTS ?= -c constraints.txt torch==2.13.0

BIN       := $(VENV)/bin
# Each worker begins with one half of the tests, file by file, and takes from the other's when it has none left.
SHARED    := -n $(WORKERS) --dist worksteal
PIP       := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
DEVELOP   := $(VENV)/.installed-dev
MANUAL    := $(VENV)/.installed-docs

.PHONY: demo test nightly docs sanitize lint release-check install clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(SHARED) $(ARGS)

nightly: $(INSTALLED)
	$(BIN)/python -m pytest $(SHARED) -m nightly $(ARGS)

docs: $(MANUAL)
	$(BIN)/python docs/figures/draw.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs $(or $(ARGS),build)

sanitize: $(INSTALLED)
	$(BIN)/python -m pytest -m nightly -k sanitizers $(ARGS)

lint: $(DEVELOP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

release-check: $(DEVELOP)
	VENV=$(VENV) .ci/release_check

install: $(INSTALLED)

$(BIN)/python:
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { \
	  echo "error: Python 3.11 to 3.13 is needed, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | head -n 1)." >&2; \
	  echo "       Name one with: make $(firstword $(MAKECMDGOALS) demo) PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null 2>&1 || \
	  echo "warning: no C++ compiler '$(firstword $(CXX))': torch.compile cannot build kernels for the CPU. Install g++." >&2
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  echo "warning: Python.h is missing: torch.compile cannot build kernels for the CPU. Install python3-dev." >&2
	@echo "== environment: $(VENV), with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu, install python3-venv." >&2; exit 1; }

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "== torch"
	$(PIP) install $(TORCH_REQUIREMENTS)
	@echo "== kvbuffer_compile, and what its tests and plots need"
	$(PIP) install -c constraints.txt -e ".[test,plot]"
	@touch $@

$(DEVELOP): $(INSTALLED)
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@

$(MANUAL): $(INSTALLED)
	$(PIP) install -c constraints.txt -e ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find kvbuffer_compile passes codegen tests examples benchmarks -name __pycache__ -type d \
	  -prune -exec rm -rf {} + 2>/dev/null || true
