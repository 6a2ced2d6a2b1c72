# Every target sets up what it needs: a virtual environment in .venv with the pinned versions of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
KVPRESS := .venv-kvpress
PACKAGE := build/package-venv/bin

.PHONY: help compare test test-kvpress test-package fuzz models tables lint types bench gpu docs clean

help:  # this list
	@grep -E '^[a-z-]+:.*  # ' Makefile | sed -E 's/:.*  # /\t/' | expand -t 16

compare: $(STAMP)  # compares methods on the bundled model
	$(BIN)/pikv compare

test: lint types  # lint, types, tests
	$(BIN)/python -m pytest -n logical

# Random conversations for MINUTES minutes; `make test` has a short run of them.
MINUTES := 20
SEED := 0
fuzz: $(STAMP)  # random conversations for MINUTES minutes
	$(BIN)/python tests/fuzz/conversations.py --minutes $(MINUTES) --seed $(SEED)

# The table of models, from the matrix of tests.
models: $(STAMP)  # the matrix of presses and models; writes docs/models.md
	PYTHONPATH=tests $(BIN)/python -m pytest -n logical -p models_table tests/presses/test_matrix.py

tables: $(STAMP)  # writes the tables of presses in docs/
	$(BIN)/python scripts/document_methods.py

# Against kvpress, which has our oldest transformers: its presses on our cache, its choices and ours, and exactness there.
test-kvpress: $(KVPRESS)/.installed  # beside kvpress, with the oldest transformers
	$(KVPRESS)/bin/python -m pytest -n logical tests/interop tests/hf tests/presses

# The wheel in environments of its own, outside of the repository: the library alone, then with the command.
test-package: $(STAMP)  # the wheel in clean environments
	rm -rf build/dist build/package-venv
	$(BIN)/python -m build --no-isolation --wheel --outdir build/dist .
	$(PYTHON) -m venv build/package-venv
	$(PACKAGE)/pip install --quiet --disable-pip-version-check --constraint constraints.txt build/dist/*.whl
	cd build && $(CURDIR)/$(PACKAGE)/python ../tests/package/library.py
	$(PACKAGE)/pip install --quiet --disable-pip-version-check --constraint constraints.txt "$$(ls build/dist/*.whl)[cli]"
	cd build && $(CURDIR)/$(PACKAGE)/pikv compare --methods "none,duo:0.5" --num-contexts 1 --long-context-length 1024 --out package-out

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)  # decoding and prefill beside the caches of transformers
	$(BIN)/python benchmarks/decode.py

# On a GPU: exactness, generation and speed within nine minutes, as out/gpu-<time>/page.md; skipped where there is none.
# `make gpu VENV=0 PYTHON=python3` takes a Python that has torch and transformers already, and installs nothing.
ifeq ($(VENV),0)
gpu:
	$(PYTHON) benchmarks/gpu.py $(ARGS)
else
gpu: $(STAMP)  # exactness, generation and speed on CUDA in nine minutes
	$(BIN)/python benchmarks/gpu.py $(ARGS)
endif

docs: $(STAMP)  # the documentation, as build/site
	$(BIN)/mkdocs build --strict

clean:  # removes environments and what was built
	rm -rf .venv $(KVPRESS) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first and by its exact version: it decides which build (CPU or CUDA) the rest is resolved against.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

$(KVPRESS)/.installed: pyproject.toml constraints.txt
	test -x $(KVPRESS)/bin/python || $(PYTHON) -m venv $(KVPRESS)
	$(KVPRESS)/bin/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(KVPRESS)/bin/pip install --quiet --disable-pip-version-check --editable ".[kvpress]" \
		$$(grep -E '^(torch|pytest|pytest-xdist|hypothesis)==' constraints.txt)
	touch $@
