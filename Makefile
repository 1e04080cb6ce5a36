# `make` alone prints the targets. Each one sets up what it needs: a virtual environment in $(VENV), with ftray installed
# from this tree. PYTHON=/path/to/python names the interpreter (3.11 or later); without it `.ci/find-python` looks for one.

VENV ?= .venv
PYTEST_ARGS ?=
SIM_ARGS ?= --seeds 0..999
BENCH_ARGS ?= --against ray --write docs/benchmarks.md

PIP_INSTALL := -m pip --disable-pip-version-check install --quiet
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev
LOWER := .venv-lower

.DEFAULT_GOAL := help
.PHONY: help demo test lint sim bench test-all test-lower-bounds clean
# A recipe that fails half-way leaves no stamp that looks finished.
.DELETE_ON_ERROR:
# Two targets asked for at once would make the same environment at the same time.
.NOTPARALLEL:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-26s%s\n", $$1, $$2}'

demo: $(RUNTIME) ## a guided tour of what ftray does
	$(VENV)/bin/python -m ftray.demo

test: $(DEV) ## all tests (PYTEST_ARGS='-k name' selects)
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(DEV) ## ruff, mypy --strict, and the rules of who may import whom
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy --strict ftray chaos
	$(VENV)/bin/python -m pytest -q tests/unit/test_layers.py

sim: $(DEV) ## a longer search in the simulator (SIM_ARGS='--seeds 0..999 --heads 5')
	$(VENV)/bin/ftray sim run $(SIM_ARGS)

bench: $(RUNTIME) ## the microbenchmark, on Ray too; writes docs/benchmarks.md (BENCH_ARGS= for ours alone)
	@$(VENV)/bin/python $(COMPILE)
	$(VENV)/bin/ftray microbenchmark $(BENCH_ARGS)

test-all: ## all tests on each supported Python that is installed
	@found=; failed=; \
	for version in 3.11 3.12 3.13; do \
	    python=$$(.ci/find-python $$version) || continue; \
	    found="$$found $$version"; \
	    echo "== Python $$version: $$python"; \
	    $(MAKE) --no-print-directory test VENV=.venv-$$version PYTHON="$$python" || failed="$$failed $$version"; \
	done; \
	[ -n "$$found" ] || { echo "no supported Python found" >&2; exit 1; }; \
	[ -z "$$failed" ] || { echo "failed on Python$$failed (ran on$$found)" >&2; exit 1; }; \
	echo "passed on Python$$found"

test-lower-bounds: $(LOWER)/.installed-lower ## all tests with the oldest dependencies that pyproject.toml allows
	$(LOWER)/bin/python -m pytest $(PYTEST_ARGS)

clean: ## remove the environments and caches that these targets made
	rm -rf .venv .venv-3.11 .venv-3.12 .venv-3.13 $(LOWER) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find ftray chaos tests property_tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Makes the environment $(1), unless it is there and its interpreter still runs, with the Python that the command $(2) prints.
define make_venv
	@if ! $(1)/bin/python -m pip --version >/dev/null 2>&1; then \
	    python=$$($(2)) || exit 1; \
	    echo "$(1): new environment with $$python"; \
	    "$$python" -m venv --clear $(1); \
	fi
endef

# Compiled here, because a node starts twice as fast with compiled modules, and some environments forbid writing them when
# they are first imported.
COMPILE := -m compileall -q ftray chaos

# The stamps are older than pyproject.toml after a change to it, and the installation is then done again.
$(RUNTIME): pyproject.toml
	$(call make_venv,$(VENV),PYTHON='$(PYTHON)' .ci/find-python)
	$(VENV)/bin/python $(PIP_INSTALL) -e .
	@$(VENV)/bin/python $(COMPILE)
	@touch $@

$(DEV): pyproject.toml
	$(call make_venv,$(VENV),PYTHON='$(PYTHON)' .ci/find-python)
	$(VENV)/bin/python $(PIP_INSTALL) -e '.[dev]'
	@$(VENV)/bin/python $(COMPILE)
	@touch $@ $(RUNTIME)

# On the oldest Python, whose wheels every oldest version has.
$(LOWER)/.installed-lower: pyproject.toml .ci/lower_bounds.py
	$(call make_venv,$(LOWER),.ci/find-python 3.11 2>/dev/null || PYTHON='$(PYTHON)' .ci/find-python)
	$(LOWER)/bin/python .ci/lower_bounds.py pyproject.toml > $(LOWER)/constraints.txt
	$(LOWER)/bin/python $(PIP_INSTALL) -c $(LOWER)/constraints.txt -e '.[test]'
	@touch $@
