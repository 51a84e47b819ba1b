# Needs GNU make and Python >= 3.11 with pip; everything else goes into .venv.

# The Python that .venv is made of: the first of these that is new enough, or the one
# that is named: make test PYTHON=python3.12
ifeq ($(origin PYTHON),undefined)
PYTHONS := python3 python3.13 python3.12 python3.11
else
PYTHONS := $(PYTHON)
endif
ARGS ?=
BENCH ?= memories

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
PIP := $(PY) -m pip --disable-pip-version-check --no-input

TESTING := JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu}
# Compiling, most of the time, uses one core. A process may take 4 GB, so there are few.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help train test lint format typecheck prove bench lock clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(READY) ## train the quickstart model (options: ARGS="...")
	$(PY) -m cached_tx.main train --config configs/quickstart.py --workdir runs/quickstart $(ARGS)

test: $(READY) ## run the tests (options: ARGS="-k name")
	$(TESTING) $(PY) -m pytest $(PARALLEL) $(ARGS)

prove: $(READY) ## run the long proofs that `make test` leaves out
	$(TESTING) $(PY) -m pytest -m prove $(PARALLEL) $(ARGS)

lint: typecheck ## check style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

typecheck: $(READY) ## check types
	$(PY) -m mypy

format: $(READY) ## put the code into its form
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

bench: $(READY) ## run a benchmark: BENCH=memories (if not said), xl_speed, profile, recall, features, attention, streaming, lra, lra_results or favor_gpu
	$(PY) -m benchmarks.$(BENCH) $(ARGS)

# Both locks hold for every supported Python and for Linux and macOS, by markers.
COMPILE = $(PY) -m uv --no-config pip compile --quiet --universal --python-version 3.11 \
	--upgrade --generate-hashes --custom-compile-command 'make lock'

lock: $(READY) ## move the locked versions in requirements/ to the newest allowed
	$(PIP) install --quiet 'uv>=0.13,<0.14'
	$(COMPILE) requirements/build.in -o requirements/build.lock
	$(COMPILE) setup.py --extra test -o requirements/dev.lock

clean: ## remove .venv, caches and build products (runs/ stays)
	rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find cached_tx configs tests benchmarks launch -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A version manager's command may exist and still not run, so each one is tried.
$(PY):
	@for python in $(PYTHONS); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Making $(VENV) with $$("$$python" --version)"; \
	    exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo "cached_tx needs Python 3.11 or newer, and none of these is: $(PYTHONS)." \
	  "Name one: make PYTHON=/path/to/python3.12" >&2; \
	exit 1

# The build lock comes first: one dependency is source only, and is built without a
# second, unlocked environment.
$(READY): requirements/build.lock requirements/dev.lock setup.py | $(PY)
	@echo "Installing the locked packages into $(VENV) (1 GB, about a minute)"
	$(PIP) install -qq --require-hashes -r requirements/build.lock
	$(PIP) install -qq --require-hashes --no-build-isolation -r requirements/dev.lock
	$(PIP) install -qq --no-index --no-deps --no-build-isolation -e .
	@touch $@
