# Every target works in a fresh clone: the virtual environment is made when it is missing, and again when the
# dependencies change. Another Python: make PYTHON=python3.12 CONSTRAINTS= test
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help evidence quickstart test test-collections test-notebooks lint imports format pages docs package clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev]'
	touch $@

quickstart: $(INSTALLED)  ## train on a small real collection and print the table
	$(BIN)/python experiments/quickstart.py

# A process a core, each with one thread, and one for the time in which others wait for processes that they started; a
# file's tests stay together, as they share what they build. Where a process dies, all ends: what it had left to do would
# be waited for without end.
WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || echo 2); echo $$((cores < 3 ? cores + 1 : 4)))
test: $(INSTALLED)  ## run all tests that need nothing but this repository
	$(BIN)/python -m pytest tests -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		--max-worker-restart 0

test-collections: $(INSTALLED)  ## run the tests that need ../shared/data, or minutes
	$(BIN)/python -m pytest tests -m collections

test-notebooks: $(INSTALLED)  ## run all notebooks
	$(BIN)/python -m pytest tests -m notebooks

evidence: $(INSTALLED)  ## measure what each method is worth, cell by cell; SMALL=1 at toy size
	$(BIN)/python experiments/evidence/run.py $(if $(SMALL),--small)

lint: imports  ## check style, types and what imports what
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python tests/readme_types.py

imports: $(INSTALLED)  ## check only what imports what
	PYTHONPATH=. $(BIN)/lint-imports --no-logo

format: $(INSTALLED)  ## format, sort imports and mend what can be mended automatically
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

pages: $(INSTALLED)  ## write committed measurements into the pages of the documentation
	$(BIN)/python experiments/benchmarks/pages.py

docs: $(INSTALLED)  ## build the documentation into docs/_build/html, warnings are errors
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html -c docs pt_dance/pt_docs docs/_build/html

# Without build's own environment: setuptools is pinned with everything else, and nothing is downloaded.
package: $(INSTALLED)  ## build sdist and wheel into dist/, and run tests from the unpacked sdist
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	rm -rf build/sdist && mkdir -p build/sdist && tar xzf dist/*.tar.gz -C build/sdist --strip-components=1
	cd build/sdist && PYTHONPATH=. $(abspath $(BIN))/python -m pytest -q tests/test_losses.py tests/test_mining.py tests/test_docs.py

clean:  ## remove caches and builds, but neither the environment nor results
	rm -rf build dist docs/_build .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find pt_dance tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +
