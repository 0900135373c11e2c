# One environment in $(VENV), made by the best Python present (see find_python.sh) and remade when pyproject.toml changes.
# Another Python: make test PYTHON=python3.11 VENV=.venv311

VENV ?= .venv
PYTHON ?= $(shell sh ./find_python.sh)
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench clean

help:
	@echo "make demo       environment, default model, two questions of a text seven times longer than its context"
	@echo "make test       environment and the test suite, in $(WORKERS) processes"
	@echo "make test-all   the same with every exhaustive test"
	@echo "make lint       style, formatting and types"
	@echo "make bench      full attention against GemFilter on this device"
	@echo "make clean      remove the environment"

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 with venv found; name one: make PYTHON=..." >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version); the first time takes a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade --progress-bar=on "pip>=24"
	$(BIN)/python -m pip install --progress-bar=on --editable ".[dev]"
	$(BIN)/gemfilter fetch smollm2
	@touch $(READY)

demo: $(READY)
	@sh ./demo.sh $(BIN)

# libtpu compiles for TPU anywhere. JAX says which it wants; in a folder of its own no other process meets it.
LIBTPU := $(VENV)/libtpu
$(LIBTPU): $(READY)
	@echo "Fetching the compiler of the TPU tests, about 200 MB"
	@rm -rf $@ $@.part
	@$(BIN)/python -m pip install --progress-bar=on --no-deps --target $@.part "$$($(BIN)/python -c 'import importlib.metadata as m; print(next(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))')" \
		&& mv $@.part $@ || echo "libtpu does not install here: programs are not compiled for TPU"

# Tests of a file share what its fixtures made, and so a worker.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder

test: $(READY) $(LIBTPU)
	$(PYTEST)

test-all: $(READY) $(LIBTPU)
	$(PYTEST) -m ""

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

bench: $(READY)
	$(BIN)/gemfilter bench --lengths=1024,2048,4096,7900 --keep=512 --output=bench.json

clean:
	rm -rf $(VENV)
