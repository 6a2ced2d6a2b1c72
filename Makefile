# Every target sets up what it needs: a virtual environment in .venv with the pinned versions of constraints.txt.

SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
KVPRESS := .venv-kvpress
PACKAGE := build/package-venv/bin

.PHONY: help compare test test-kvpress test-wheel test-package fuzz models tables lint types bench gpu docs picture measure-picture \
	screenshots vendor clean

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

# The wheel in an environment of its own, outside of the repository: the library alone, then with the command.
test-wheel: $(STAMP)  # the wheel in a clean environment
	rm -rf build/dist build/package-venv
	$(BIN)/python -m build --no-isolation --wheel --outdir build/dist . > /dev/null
	$(PYTHON) -m venv build/package-venv
	$(PACKAGE)/pip install --quiet --disable-pip-version-check --constraint constraints.txt build/dist/*.whl
	cd build && $(CURDIR)/$(PACKAGE)/python ../tests/package/library.py
	$(PACKAGE)/pip install --quiet --disable-pip-version-check --constraint constraints.txt "$$(ls build/dist/*.whl)[cli]"
	cd build && $(CURDIR)/$(PACKAGE)/pikv compare --methods "none,duo:0.5" --num-contexts 1 --long-context-length 1024

# The same, then with lm-evaluation-harness.
test-package: test-wheel  # the wheel in clean environments, with all that it can be used with
	$(PACKAGE)/pip install --quiet --disable-pip-version-check --constraint constraints.txt "$$(ls build/dist/*.whl)[eval]"
	cd build && HF_HUB_OFFLINE=1 $(CURDIR)/$(PACKAGE)/python ../tests/documents.py ../docs/recipes/lm-eval.md

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

# The picture of accuracy against bytes, from figures that were measured before; measure-picture measures them again (5 minutes).
PICTURE := $(BIN)/python -m pikv.evaluation.report.picture
RATIOS := 0.5 0.75 0.9 0.95
PICTURED := $(foreach press,eplb duo keydiff kvzip snapkv h2o streaming,$(foreach ratio,$(RATIOS),$(press):$(ratio)))
EMPTY :=
COMMA := ,

picture: $(STAMP)  # draws docs/frontier.svg from what was measured
	$(PICTURE) docs/data/frontier.json docs/frontier.svg

measure-picture: $(STAMP)  # measures what the picture shows
	rm -rf build/frontier
	$(BIN)/pikv compare --methods "$(subst $(EMPTY) $(EMPTY),$(COMMA),$(PICTURED))" --context-length 1024 \
		--long-context-length 1024 --repeats 1 --num-new-tokens 2 --out build/frontier
	$(PICTURE) build/frontier/results.json docs/frontier.svg --keep docs/data/frontier.json

# Screenshots of reports, picture and documentation, narrow and wide, light and dark, in build/screenshots; fails on errors of
# the console, requests, overlapping labels and pages wider than the window. Needs Chromium; PAGES="NAME=FILE ..." adds pages.
screenshots: docs  # of reports, picture and documentation, checked
	$(BIN)/pip install --quiet --editable ".[browser]"
	rm -rf build/shown
	$(BIN)/pikv compare --context-length 512 --long-context-length 2048 --num-contexts 2 --repeats 1 --out build/shown/compare
	$(BIN)/pikv experiment combos --data demo --num-tokens 512 --num-contexts 2 --repeats 2 --out build/shown/study
	$(BIN)/python tests/browser/pages.py --out build/screenshots compare=build/shown/compare/report.html \
		study=build/shown/study/report.html docs/frontier.svg home=site:index.html methods=site:methods/index.html $(PAGES)

# The libraries that reports carry, as they are published.
VENDOR := src/pikv/evaluation/report/vendor
vendor:  # fetches the libraries that reports carry
	for package in d3@7.9.0:d3:d3.min.js @observablehq/plot@0.6.17:plot:plot.umd.min.js; do \
		IFS=: read -r name short file <<< "$$package"; \
		folder=$$(mktemp -d) && (cd $$folder && npm pack --silent "$$name" && tar xzf ./*.tgz) && \
		cp $$folder/package/dist/$$file $(VENDOR)/ && cp $$folder/package/LICENSE $(VENDOR)/LICENSE.$$short && rm -r $$folder || exit 1; \
	done
	cd $(VENDOR) && sha256sum --check SHA256SUMS

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
