# `make demo` and `make test` set up all they need: a virtual environment in this checkout, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Kept bytecode halves the start of every process, of which there are many; some environments switch it off.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint clean
demo: $(READY)
	$(BIN)/python -m pretrain.demo

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# uv is fetched by pip; its cache lets a second clone be ready in seconds.
$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs data
