# Every target does its own set-up. It takes Python 3.11 or newer, make and pip; nothing is compiled.
# pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) are honoured.

PYTHON ?= python3
VENV   ?= .venv
# Only `demo` and `test-torch` install it. Where a plain "torch" brings gigabytes of CUDA libraries, name a
# CPU build instead, such as TORCH=torch==2.13.0+cpu, and tell pip where PyTorch keeps these.
TORCH  ?= torch==2.13.0
# More arguments for the program that a target runs: make test ARGS="-k slerp"
ARGS   ?=

BIN     := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary=:all:

.PHONY: demo test test-torch faults fuzz mutants lint types bench docs clean

demo: $(VENV)/.demo
	$(BIN)/python -m examples.demo $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

test-torch: $(VENV)/.dev $(VENV)/.torch
	$(BIN)/python -m pytest $(ARGS)

faults: $(VENV)/.dev
	$(BIN)/python -m tests.faults $(ARGS)

fuzz: $(VENV)/.dev $(VENV)/.fuzz
	$(BIN)/python -m tests.fuzz $(ARGS)

mutants: $(VENV)/.dev
	$(BIN)/python -m tests.mutants $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check $(ARGS)
	$(BIN)/ruff format --check $(ARGS)

types: $(VENV)/.dev
	$(BIN)/mypy $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.run $(ARGS)

docs: $(VENV)/.dev
	$(BIN)/python -m docs.generate $(ARGS)

clean:
	rm -rf $(VENV) build dist demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests docs benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

# --- set-up: one file in the environment says that a step is done -------------------------------------------

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "smelt needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.made
	$(INSTALL) --editable '.[dev]'
	@touch $@

$(VENV)/.torch: $(VENV)/.made
	$(INSTALL) '$(TORCH)'
	@touch $@

# There is a wheel of atheris for few Pythons; without it files are mutated by chance.
$(VENV)/.fuzz: pyproject.toml $(VENV)/.dev
	@$(INSTALL) --editable '.[fuzz]' || echo "atheris cannot be installed here: fuzzing by chance alone" >&2
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	$(INSTALL) --editable '.[hf]'
	@touch $@
