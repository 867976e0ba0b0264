# make demo   a fresh machine, no root: installs into .venv and runs the main job on scikit-learn's digits
# make test   a fresh machine: installs what it needs (system packages too where it may) and runs every test
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The data of the tests marked `data`: found beside the checkout when THRIFTY_DATA is not set.
ifndef THRIFTY_DATA
ifneq ($(wildcard ../shared/data/README.md),)
export THRIFTY_DATA := $(abspath ../shared/data)
endif
endif

.PHONY: help install demo test lint docs experiments clean

help:
	@sed -n 's/^# make/make/p' Makefile

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade 'pip>=24'
	$(PY) -m pip install --quiet --constraint constraints.txt 'torch' 'numpy'
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(PY) examples/01_digits_to_cortex_m4.py --out demo

system:
	sh scripts/system_packages.sh

test: system $(VENV)/.installed lint
	$(PY) -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check src tests examples experiments
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: $(VENV)/.installed
	$(VENV)/bin/sphinx-build --quiet --fail-on-warning docs docs/_build

clean:
	rm -rf $(VENV) demo build dist docs/_build
