# `make demo` and `make test` set up all they need: a virtual environment in this checkout, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
IMG2DATASET := $(VENV)/img2dataset
TORCHAO := $(VENV)/torchao
# Kept bytecode halves the start of every process, of which there are many; some environments switch it off.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint clean
demo: $(READY)
	$(BIN)/python -m pretrain.demo

# Three processes on two cores, as the tests wait more than they compute. Folders in order: those of the longest tests come first.
test: $(READY) $(IMG2DATASET)/.ready $(TORCHAO)/.ready
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# uv is fetched by pip; its cache lets a second clone be ready in seconds.
$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@

# img2dataset, whose tars a test encodes, wants an older webdataset than this project.
$(IMG2DATASET)/.ready: Makefile | $(READY)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(IMG2DATASET)
	$(BIN)/uv pip install --quiet --python $(IMG2DATASET)/bin/python img2dataset==1.47.0
	touch $@

# torchao stands apart: where it is installed, diffusers imports it with itself, which takes each command seconds.
$(TORCHAO)/.ready: Makefile | $(READY)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target $(TORCHAO) torchao==0.18.0
	touch $@

clean:
	rm -rf $(VENV) runs data
