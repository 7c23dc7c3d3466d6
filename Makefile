# mgpu-llm: `make run` tries it with the real vLLM on this machine's CPU, `make test` runs every test.
SHELL := /bin/bash
PYTHON ?= python3.11
PREFIX ?= /usr/local
DESTDIR ?=
VENV := .venv
PY := $(VENV)/bin/python
DEV_STAMP := $(VENV)/.complete
# Tests that share nothing with each other, so that several run at once; but for the threads of one process, which those of adapters count.
# Those of whole daemons look into one /dev/shm.
APART := tests/adapters tests/ctl tests/doctor tests/share tests/system

.PHONY: help dev run demo demo-ladder check bench-heartbeat bench-diagnosis test deb install uninstall clean
.DELETE_ON_ERROR:

help:
	@echo 'make run        the daemon with a toy model on the real vLLM (CPU, tensor parallel 2), until Ctrl-C; PORT=8000'
	@echo 'make demo       the same with an engine that hangs as broken peer-to-peer does, until it is cured'
	@echo 'make demo-ladder   three faults, three rungs, and a second start that remembers: six minutes; writes docs/demo-ladder.md'
	@echo 'make dev        what both need: .venv (mgpud, mgpuctl) and .engine (vLLM for CPU)'
	@echo 'make check      format, lint, types, layers, core and config tests: about a minute'
	@echo 'make test       every test, the real vLLM and a real systemd included (root)'
	@echo 'make bench-heartbeat   how soon stalls are noticed, beside other rules, over recorded starts; writes docs/heartbeat.md'
	@echo 'make bench-diagnosis   what failures are called, and in how many attempts they are cured; writes docs/diagnosis.md'
	@echo 'make deb       dist/mgpu-llm_VERSION_ARCHITECTURE.deb, for the Debian or Ubuntu it is built on'
	@echo 'make install    PREFIX=$(PREFIX) DESTDIR=$(DESTDIR) PYTHON=python3   make uninstall   PURGE=1 removes the config too'

$(DEV_STAMP): packaging/requirements/dev.txt packaging/requirements/daemon.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r packaging/requirements/dev.txt
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

dev: $(DEV_STAMP)
	@$(PY) tests/support/make_engine_env.py

run: dev
	@$(PY) tests/support/try_it.py

demo: dev
	@$(PY) tests/support/try_it.py --fault p2p-hang

demo-ladder: dev
	@$(PY) -m tests.support.demo_ladder --write docs/demo-ladder.md

check: $(DEV_STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/coverage run -m pytest -q tests/core tests/config
	$(VENV)/bin/coverage report --fail-under=100

bench-heartbeat: $(DEV_STAMP)
	$(PY) -m tests.bench.heartbeat --write docs/heartbeat.md

bench-diagnosis: $(DEV_STAMP)
	$(PY) -m tests.bench.diagnosis --write docs/diagnosis.md

test: dev check
	for tests in $(APART); do $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile $$tests || exit; done
	$(PY) -m pytest --ignore=tests/core --ignore=tests/config $(APART:%=--ignore=%)

deb:
	@packaging/deb/build

install:
	@DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' PYTHON='$(if $(filter command environment,$(firstword $(origin PYTHON))),$(PYTHON))' packaging/install install

uninstall:
	@DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' PURGE='$(PURGE)' packaging/install uninstall

clean:
	rm -rf $(VENV) .engine build dist daemon/*.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage
