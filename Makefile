# make demo and make test need Python 3.11+ with venv, and nothing else: they set up .venv by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
ARGS ?=
COMPILED := build/compiled
BESIDE := .dockerignore CHANGELOG.md LICENSE Makefile README.md benchmarks certs compose docs hatch_build.py pyproject.toml tests
# By worksteal each worker has tests that are neighbours: what a module starts for its tests is seldom started twice.
QUICK := -n 2 --dist worksteal

# The tests and the processes that they start would compile every module again and again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-compiled check format fuzz bench clean

help:
	@echo 'make demo      try the tunnel on this machine: server, client and a small backend, until Ctrl-C'
	@echo 'make test      the quick tests, on both QUIC engines'
	@echo 'make test-all  every test, the slow ones too'
	@echo 'make test-compiled  the quick tests again, as the compiled package of an installation'
	@echo 'make fuzz      random bytes for all that reads from outside (ARGS="--seconds 600 door")'
	@echo 'make bench     this and other tunnels and proxies side by side (ARGS=--help tells more; ARGS=--quick: a few minutes)'
	@echo 'make check     lint, format, types, and which module may import which'
	@echo 'make format    let ruff put the format right'
	@echo 'make clean     remove .venv and what tools left behind'
	@echo 'Another Python: make demo PYTHON=/path/to/python3.12. More flags: make demo ARGS=--once'

demo: $(VENV)/.installed
	@$(BIN)/quictunnel demo $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/pytest $(QUICK) -m 'not slow' $(ARGS)

# The slow ones measure time and memory: nothing may run beside them. Here every process starts as a user's does;
# the quick tests fork most of them from one that has loaded its modules already.
test-all: $(VENV)/.installed-dev
	$(BIN)/pytest $(QUICK) -m 'not slow' --cold $(ARGS)
	$(BIN)/pytest --cold -m slow --timeout 600 $(ARGS)

# What is installed is compiled where it can be (hatch_build.py): the same tests run it, save those whose stand-ins are not
# of the classes that compiled code asks for.
test-compiled: $(COMPILED)/.made
	for each in $(BESIDE); do rm -rf $(COMPILED)/$$each; cp -r $$each $(COMPILED)/; done
	cd $(COMPILED) && '$(CURDIR)/$(BIN)/pytest' $(QUICK) -m 'not slow and not interpreted' $(ARGS)

$(COMPILED)/.made: hatch_build.py pyproject.toml $(shell find quictunnel -name '*.py') | $(VENV)/.installed-dev
	$(BIN)/python hatch_build.py $(COMPILED)
	@touch $@

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/unit/test_floors.py

fuzz: $(VENV)/.installed-dev
	@$(BIN)/python -c 'import atheris' 2>/dev/null || echo 'without atheris: blind (pip install atheris into $(VENV) to be guided by coverage)'
	$(BIN)/python -m tests.fuzz $(ARGS)

bench: $(VENV)/.installed-bench
	@$(MAKE) --quiet $(COMPILED)/.made || echo 'quictunnel cannot be compiled here: it is measured as plain Python'
	@$(BIN)/python -m benchmarks.sidebyside $(ARGS)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find quictunnel tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The fast extra has native code: where it cannot be had, the tunnel runs without it.
$(VENV)/.installed: pyproject.toml | $(VENV)/.made
	@echo 'installing quictunnel into $(VENV)'
	@$(INSTALL) --editable '.[fast]' || { \
	    echo 'the fast extra (qh3, uvloop) cannot be installed here: going on without it'; \
	    $(INSTALL) --editable .; }
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.made
	@echo 'installing quictunnel and its development tools into $(VENV)'
	@$(INSTALL) --editable '.[dev,fast]' || { \
	    echo 'the fast extra (qh3, uvloop) cannot be installed here: going on without it'; \
	    $(INSTALL) --editable '.[dev]'; }
	@touch $@ $(VENV)/.installed

# Without matplotlib there are tables and no plots.
$(VENV)/.installed-bench: pyproject.toml | $(VENV)/.installed
	@echo 'installing what make bench plots with into $(VENV)'
	@$(INSTALL) --editable '.[bench]' || echo 'the bench extra (matplotlib) cannot be installed here: going on without plots'
	@touch $@

$(VENV)/.made:
	@for python in '$(PYTHON)' python3 python3.14 python3.13 python3.12 python3.11; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        "$$python" -c 'import ensurepip, venv' 2>/dev/null || { \
	            echo "quictunnel: $$python has no venv module (on Debian: apt install python3-venv)" >&2; exit 1; }; \
	        rm -rf $(VENV) && "$$python" -m venv $(VENV) && touch $@ && exit 0; \
	        exit 1; \
	    fi; \
	done; \
	echo 'quictunnel: Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3' >&2; exit 1
