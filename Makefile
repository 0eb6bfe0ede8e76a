# Two commands do everything on a fresh machine: `make demo` and `make test`. README lists the Debian packages they need.

VENV   := .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
PIP    := $(VENV)/bin/python -m pip
STAMP  := $(VENV)/.installed

# Respected by pip; a slow mirror needs patience more than speed.
export PIP_DEFAULT_TIMEOUT ?= 120
export PIP_RETRIES ?= 10
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DELETE_ON_ERROR:
.PHONY: help install demo test check doctor bench clean

help: ## this list (the default)
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'
	@echo 'PYTHON=python3.11 names the interpreter; ARGS="..." is handed on to vla or pytest.'

demo: $(STAMP) ## install, then the main job: demonstrations -> training -> evaluation in simulation
	$(VENV)/bin/vla demo $(ARGS)

test: $(STAMP) ## install, then the tests (under 10 minutes on two cores)
	$(VENV)/bin/python -m pytest -q $(ARGS)

check: $(STAMP) ## every test, the heavy laws too
	$(VENV)/bin/python -m pytest -q -m "" $(ARGS)

doctor: $(STAMP) ## what is installed, drawn and found, and what to do about the rest
	$(VENV)/bin/vla doctor $(ARGS)

bench: $(STAMP) ## benchmarks: make bench ARGS=NAME (without a name: the list)
	$(VENV)/bin/vla bench $(ARGS)

install: $(STAMP) ## only the installation (3 to 4 minutes, 11 GB)

clean: ## remove what make made: the virtual environment and caches (not REMASK_HOME)
	rm -rf $(VENV) .pytest_cache .hypothesis build dist *.egg-info
	find multimodal vla serve sim tests -name __pycache__ -prune -exec rm -rf {} +

# The stamp comes last, so an interrupted installation is taken up again by the next make. pip writes a package's RECORD
# last: a package without one was cut off, and pip would take it for whole, so it is removed first.
# The lock is complete (hence --no-deps) and its source packages are built with its own setuptools (hence no isolation).
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; got = sys.version_info[:2]; got == (3, 11) or sys.exit("requirements.lock is for Python 3.11; $(PYTHON) is %d.%d. Say make PYTHON=/path/to/python3.11, or, on a newer Python without the lock, pip install -e .[train,sim,libero]" % got)'
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@for info in $(VENV)/lib/python3.11/site-packages/*.dist-info; do [ -e "$$info/RECORD" ] || rm -rf "$$info"; done
	$(PIP) install --no-deps "$$(grep '^setuptools==' requirements.lock)"
	$(PIP) install --no-deps --no-build-isolation --use-pep517 -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation --use-pep517 -e .
	@touch $@
