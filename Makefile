# `make demo` and `make test` are all a new user needs. Everything lives in .venv; delete it to start over.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA := $(wildcard ../shared/data)
export CUPEL_DATA ?= $(if $(DATA),$(abspath $(DATA)),)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo extras test lint claims bench docs clean

demo: $(VENV)/ready
	$(BIN)/cupel run

# Everything optional: `cupel ui`, ONNX, tables, images, Ray, Lightning Fabric, tracking.
extras: $(VENV)/ready-extras

test: $(VENV)/ready-test
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/ready-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

claims: $(VENV)/ready
	$(BIN)/cupel claim --jobs 2 --record
	$(BIN)/python -m cupel.testing.docs

docs: $(VENV)/ready
	$(BIN)/python -m cupel.testing.docs

bench: $(VENV)/ready-bench
	$(BIN)/python benchmarks/fit.py
	$(BIN)/python benchmarks/evasion.py
	$(BIN)/python benchmarks/jobs.py
	$(BIN)/python benchmarks/compressors.py --workload fashion-mnist-cnn

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cupel needs Python 3.11 or newer; '$(PYTHON)' is older. Run: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing. On Debian or Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# torch comes first and pinned: left to itself, pip may choose another build of it.
$(VENV)/ready: requirements.lock pyproject.toml | $(VENV)/bin/pip
	@echo "Installing the locked dependencies into $(VENV)"
	@$(BIN)/pip install --quiet "$$(grep '^torch==' requirements.lock)"
	@$(BIN)/pip install --quiet --no-deps -r requirements.lock
	@$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

$(VENV)/ready-extras: $(VENV)/ready requirements-extras.lock
	@$(BIN)/pip install --quiet --no-deps -r requirements-extras.lock
	@touch $@

$(VENV)/ready-test: $(VENV)/ready-extras requirements-test.lock
	@$(BIN)/pip install --quiet --no-deps -r requirements-test.lock
	@touch $@

$(VENV)/ready-bench: $(VENV)/ready-test requirements-bench.lock
	@$(BIN)/pip install --quiet --no-deps -r requirements-bench.lock
	@touch $@

clean:
	rm -rf $(VENV)
