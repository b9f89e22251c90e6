# Needs python3 (3.11 or newer), make and git. "make" alone lists the targets.

HIEDIT_PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=

PACKAGES := hiedit_env agents benchmarks
LINKS := .links
PYTHON := .venv/bin/python
STAMP := .venv/.setup-done
# RLlib, skrl, Tianshou and TorchRL have one of their own: RLlib wants an older Gymnasium.
LIBRARIES := .venv-libraries
LIBRARIES_PYTHON := $(LIBRARIES)/bin/python
LIBRARIES_STAMP := $(LIBRARIES)/.setup-done
# A comma would end an argument of "call".
LIBRARIES_EXTRAS := test,demo,offline,plots,sb3-contrib,libraries
# Twice quiet: pip still prints errors, but no warnings.
PIP := -m pip -q -q --disable-pip-version-check
# One thread per worker: small matrices are slower on several threads than on one.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

# $(call install,PYTHON,PINS,ARGUMENTS): pip install under the pins, once more if it fails.
define install
$(1) $(PIP) install -c $(2) $(3) || { \
	echo "setup: pip install failed; trying once more in 5 seconds" >&2; sleep 5; \
	$(1) $(PIP) install -c $(2) $(3); }
endef

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-libraries coverage lint types doctest unit docs format clean

help: ## list the targets
	@echo "make TARGET, where TARGET is one of"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: HIEDIT_PYTHON=python3.12 (setup: interpreter of a new .venv),"
	@echo "  DEMO_OUT=folder (demo), WORKERS=0 and PYTEST_ARGS='-k name' (test, doctest, unit)"

setup: $(STAMP) ## make .venv and install hiedit with its development tools

# The stamp holds the folder it was made for, since a virtual environment cannot be moved.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

$(STAMP): pyproject.toml constraints.txt
	@rm -f $(STAMP)
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || { \
		command -v "$(HIEDIT_PYTHON)" >/dev/null || { \
			echo "setup: there is no '$(HIEDIT_PYTHON)' here; name a Python 3.11 or newer:" \
				"make setup HIEDIT_PYTHON=/path/to/python" >&2; exit 1; }; \
		"$(HIEDIT_PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
			echo "setup: hiedit needs Python 3.11 or newer, but '$(HIEDIT_PYTHON)' is" \
				"$$("$(HIEDIT_PYTHON)" -V 2>&1); name another:" \
				"make setup HIEDIT_PYTHON=/path/to/python" >&2; exit 1; }; \
		echo "setup: making .venv with $$("$(HIEDIT_PYTHON)" -V)"; \
		"$(HIEDIT_PYTHON)" -m venv --clear .venv || { \
			echo "setup: '$(HIEDIT_PYTHON)' cannot make a virtual environment; its venv module" \
				"may be a package of its own (python3-venv on Debian)" >&2; exit 1; }; }
	@echo "setup: installing PyTorch, the largest part (a few minutes)"
	@$(call install,$(PYTHON),constraints.txt,torch setuptools)
	@echo "setup: installing hiedit and its other dependencies (a few minutes)"
	@$(call install,$(PYTHON),constraints.txt,--no-build-isolation -e '.[dev]')
	@$(PYTHON) -m pip check >/dev/null || { $(PYTHON) -m pip check >&2; exit 1; }
	@printf '%s\n' "$(CURDIR)" > $(STAMP)
	@echo "setup: done"

demo: setup ## edit a real language model and write the results to demo/
	@out="$(DEMO_OUT)"; \
	if [ -z "$$out" ]; then \
		out=demo; n=1; \
		while [ -e "$$out" ]; do n=$$((n + 1)); out="runs/demo-$$n"; done; \
		[ "$$n" = 1 ] || echo "demo: demo/ holds an earlier result; this one goes to $$out/"; \
	fi; \
	.venv/bin/hiedit demo --out "$$out"

test: lint types ## everything that must pass: lint, types, doctests and tests
	@$(PYTEST) tests

test-libraries: setup $(LIBRARIES_STAMP) ## train agents of the RL libraries until they beat random
	@$(PYTEST) --dist load -m libraries tests/agents/rl/test_sb3.py
	@OMP_NUM_THREADS=1 $(LIBRARIES_PYTHON) -m pytest -n $(WORKERS) $(PYTEST_ARGS) \
		-m libraries tests/agents/rl/test_library_scripts.py tests/agents/bandits

ifneq ($(shell cat $(LIBRARIES_STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(LIBRARIES_STAMP)
endif

$(LIBRARIES_STAMP): $(STAMP) constraints-libraries.txt
	@rm -f $(LIBRARIES_STAMP)
	@echo "test-libraries: installing PyTorch and the RL libraries into $(LIBRARIES) (minutes)"
	@$(LIBRARIES_PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(LIBRARIES)
	@$(call install,$(LIBRARIES_PYTHON),constraints-libraries.txt,torch setuptools)
	@$(call install,$(LIBRARIES_PYTHON),constraints-libraries.txt,--no-build-isolation -e '.[$(LIBRARIES_EXTRAS)]')
	@$(LIBRARIES_PYTHON) -m pip check >/dev/null || { $(LIBRARIES_PYTHON) -m pip check >&2; exit 1; }
	@printf '%s\n' "$(CURDIR)" > $(LIBRARIES_STAMP)

coverage: setup ## run the tests and show which lines of the packages they reach
	@$(PYTEST) --cov --cov-report=term:skip-covered tests

lint: setup ## check style and formatting
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .

types: setup ## check types
	@mkdir -p $(LINKS) && ln -sfn ../agents $(LINKS)/hiedit_agents && \
		ln -sfn ../benchmarks $(LINKS)/hiedit_benchmarks
	@$(PYTHON) -m mypy

doctest: setup ## run the examples of the docstrings only
	@$(PYTEST) tests/test_doctests.py

unit: setup ## run the tests only
	@$(PYTEST) tests

docs: setup ## build the documentation into site/, with warnings as errors
	@mkdir -p $(LINKS) && ln -sfn ../agents $(LINKS)/hiedit_agents && \
		ln -sfn ../benchmarks $(LINKS)/hiedit_benchmarks
	@$(PYTHON) docs/tools/modules.py
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet
	@echo "docs: open site/index.html"

format: setup ## format the code and fix what can be fixed safely
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

clean: ## remove caches and build leftovers; .venv and results stay
	rm -rf build dist site *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +
