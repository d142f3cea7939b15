# `make demo` and `make test` do all the set-up they need; the second run is quick.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Without a GPU a CPU build is enough and gigabytes smaller. It is asked for first as `+cpu`; where pip's
# configured indexes hold no such build, the plain release is taken.
TORCH  ?= 2.13.0
# Test processes; each computes on one thread.
JOBS   ?= 2
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)

.PHONY: install demo test docs lint types clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(HAS_GPU),yes)
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) torch
else
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) "torch==$(TORCH)+cpu" 2>/dev/null || $(PIP) "torch==$(TORCH)"
endif
	$(PIP) --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/hf-cka demo --output demo_output

test: install lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS)

docs: install
	$(BIN)/mkdocs build --strict --quiet

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo_output site build *.egg-info
