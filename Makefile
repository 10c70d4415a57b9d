# `make demo` and `make test` each need nothing but Python >= 3.11 and make: they create $(VENV).
#
#   PYTHON       the interpreter that creates the environment
#   TARGET       the target that the demo compiles for (`edgepress targets list`)
#   TORCH_INDEX  a further package index, for a CPU build of torch where the usual one has only CUDA builds

PYTHON ?= python3
VENV ?= .venv
TARGET ?= host
TORCH_INDEX ?=
JOBS ?= 2

BIN := $(VENV)/bin
DEMO_CACHE := .cache/demo
DEMO_MODEL := $(DEMO_CACHE)/all-MiniLM-L6-v2
DEMO_OUT := out/minilm-$(TARGET)
TORCH := torch==2.13.0
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --quiet \
	--constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# Timing a bundle for another board on this machine would say nothing about that board.
DEMO_BENCHMARK = $(BIN)/edgepress benchmark $(DEMO_OUT) --baseline $(DEMO_MODEL) \
	--shape input_ids:1x128 --shape attention_mask:1x128 --shape token_type_ids:1x128

.PHONY: help demo test lint types tests format docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    set up, compile all-MiniLM-L6-v2 for TARGET=$(TARGET), verify and time the bundle"
	@echo "make test    set up, then lint, types and tests"
	@echo "make lint    ruff; make types: mypy; make tests: pytest; make format: ruff format"
	@echo "make docs    write docs/commands.md from the command line's definition"
	@echo "make clean   remove everything that make made"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "edgepress needs Python >= 3.11: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) $(TORCH) --editable '.[demo]'
	@touch $@

$(VENV)/.dev-installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) $(TORCH) --editable '.[dev]'
	@touch $@

$(DEMO_MODEL)/model.safetensors: demo/fetch_model.py | $(VENV)/.demo-installed
	$(BIN)/python demo/fetch_model.py $(DEMO_MODEL)

demo: $(VENV)/.demo-installed $(DEMO_MODEL)/model.safetensors
	$(BIN)/edgepress compile $(DEMO_MODEL) --target $(TARGET) --calib demo/sentences.txt -o $(DEMO_OUT) --overwrite
	$(BIN)/edgepress verify $(DEMO_OUT)
	$(if $(filter host,$(TARGET)),$(DEMO_BENCHMARK))

test: lint types tests

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev-installed
	PYTHON=$(abspath $(BIN)/python) tests/typecheck.sh

tests: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -q -n $(JOBS)

format: $(VENV)/.dev-installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.dev-installed
	$(BIN)/python docs/write_commands.py

clean:
	rm -rf $(VENV) .cache out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
