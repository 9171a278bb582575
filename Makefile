# Everything installs itself into .venv; a new machine needs Python 3.11+, a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.edgeft-installed
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.DEFAULT_GOAL := help

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

install: $(STAMP) ## Install edgeft with all extras into .venv (builds llama-cpp-python once, about 6 minutes).

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all,dev]'
	@touch $@

demo: install ## From adapter to bill on a real model; 16 minutes after installing, on two cores.
	$(BIN)/python examples/demo.py

test: install ## All tests, two files at a time.
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 40

test-deps: ## Install what some tests use from Debian (they skip without it).
	$(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq chromium redis-server openssh-server iproute2 >/dev/null

lint: install ## ruff, lint and format.
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: install ## Let ruff format the code.
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: install ## mypy.
	$(BIN)/mypy -p edgeft

docs: install ## Write docs/cli.md from --help.
	$(BIN)/python docs/make_cli.py

wheel: install ## Build the wheel and import it in an empty directory.
	$(BIN)/python tests/check_wheel.py

check: lint types test wheel ## All that CI runs.

clean: ## Remove the demo's output and caches; .venv stays.
	rm -rf demo-out build .pytest_cache .mypy_cache .ruff_cache *.egg-info

.PHONY: help install demo test test-deps lint format types docs wheel check clean
