# Needs nothing but make and Python 3.11 or newer. `make` alone says what there is.

PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	"$$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && { echo "$$name"; break; }; done)
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

# What an activated environment or a user's pip configuration would do to this one. Indexes and proxies stay as they are set.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME PYTHONSTARTUP PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV PIP_REQUIRE_HASHES

.DEFAULT_GOAL := help
.PHONY: help install run test check format lock clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo 'make install   make .venv with everything pinned'
	@echo 'make run       run all of Chatkeep on this machine (ARGS="--port 8080" for another port)'
	@echo 'make test      all tests, on real servers (ARGS="tests/worker -k flush" for some)'
	@echo 'make check     lint, types, schema drift'
	@echo 'make crash     two minutes of kills, cuts and losses (ARGS="--seed 7 --minutes 60 --faults kill-storm"; --faults list: which)'
	@echo 'make mutants   plant known bugs one at a time, and see that the crash suite finds each (ARGS="everysec trim-by-count"; --list)'
	@echo 'make bench     measure it beside what it replaces, on a quiet machine (ARGS="--rows 1,6"); make bench-long: the long rows too'
	@echo 'make outage    an hour without Postgres at 50 messages a second, and the way back'
	@echo 'make format    put the code into the form that check asks for'
	@echo 'make lock      pin again what pyproject.toml asks for (needs uv)'
	@echo 'make audit     look for known vulnerabilities in what is pinned (needs a network, so it is no part of make check)'
	@echo 'make clean     remove .venv and what tools leave behind; data in .chatkeep stays'

install: $(INSTALLED)

$(INSTALLED): requirements.txt
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
		if [ -z "$(PYTHON)" ]; then \
			echo 'Chatkeep needs Python 3.11 to 3.14 with venv, and none was found.' >&2; \
			echo 'Debian and Ubuntu: apt install python3-venv. Another one: make PYTHON=/path/to/python3' >&2; \
			exit 1; \
		fi; \
		echo 'Making $(VENV) with $(PYTHON)'; \
		"$(PYTHON)" -m venv --clear $(VENV); \
	fi
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.txt
	@touch $@

run: $(INSTALLED)
	@exec $(PY) -m api $(ARGS)

test: $(INSTALLED)
	$(PY) -m pytest $(ARGS)

check: $(INSTALLED)
	$(PY) -m ruff check --output-format concise .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m tests.schema

.PHONY: crash mutants
crash: $(INSTALLED)
	$(PY) -m tests.crash $(ARGS)

mutants: $(INSTALLED)
	$(PY) -m tests.crash.mutants $(ARGS)

# Every message of an hour at 50 a second, and their way into a Postgres that fsyncs; `make test` has two minutes' worth of it.
.PHONY: outage
outage: $(INSTALLED)
	OUTAGE_MESSAGES=180000 $(PY) -m pytest tests/test_outage.py --capture=no --timeout=3600 $(ARGS)

.PHONY: bench bench-long
bench: $(INSTALLED)
	$(PY) -m benchmarks $(ARGS)

bench-long: $(INSTALLED)
	$(PY) -m benchmarks --long $(ARGS)

format: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# --universal: one file for every system and every Python from 3.11 on. No index address gets into it.
lock:
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH"; command -v uv >/dev/null || { echo 'make lock needs uv (pip install uv); nothing else does.' >&2; exit 1; }; \
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		--quiet --output-file requirements.txt $(ARGS)

# A tool of its own, in an environment of its own. --strict: what could not be looked up is a failure, and not silently left out.
AUDIT := .audit
.PHONY: audit
audit:
	@test -x $(AUDIT)/bin/pip-audit || { "$(PYTHON)" -m venv $(AUDIT) && \
		$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.10,<3'; }
	$(AUDIT)/bin/pip-audit --strict --disable-pip --require-hashes --requirement requirements.txt $(ARGS)

clean:
	rm -rf $(VENV) $(AUDIT) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
