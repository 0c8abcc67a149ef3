# make demo: what the backend does with a small model    make test: every check of the project    make bench: figures against peers
# Each builds .venv by itself. PYTHON picks the interpreter (3.11 or newer), TORCH the torch
# and the Triton that goes with it.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH ?= torch==2.13.0 triton==3.7.1
PYTEST ?= -m "not slow and not gpu" -n 2

BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test bench lint clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/pytest $(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/python benchmarks/attention.py && $(BIN)/python benchmarks/models.py; \
	else $(BIN)/python benchmarks/cpu_attention.py; fi
	$(BIN)/python benchmarks/tables.py

# A torch that is there already and sees a GPU is kept; any other machine gets $(TORCH).
$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Expected Python 3.11 or newer but found none: set PYTHON=/path/to/python"; exit 1; }
	@echo "Building .venv; this takes a minute or two"
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages .venv; \
	else \
		$(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet $(TORCH); \
	fi
	@$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
