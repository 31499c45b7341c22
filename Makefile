# Every target installs what it needs on its first run and reuses it afterwards.
# Others than the defaults: make test PYTHON=python3.12 VENV=/tmp/venv
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test coverage check lint types imports format bench docs docs-serve clean
.DEFAULT_GOAL := check

demo: $(INSTALLED)  ## find the wrong labels among 700 digits while training on them
	$(BIN)/lightning-nested fit --config clean_digits

# Two processes of one thread each. worksteal gives each a run of neighbouring tests and moves the rest of one to the other
# when that is out of work, so what a file's tests share is mostly made once; loadgroup would deal a file's tests to both.
test: $(INSTALLED)  ## the default test suite (slow and gpu tests: add -m slow by hand)
	$(BIN)/python -m pytest -n 2 --dist worksteal

coverage: $(INSTALLED)  ## the same, and the lines and branches that no test reaches; takes half as long again
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term

check: lint types imports test  ## all that a change must pass

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy lightning_nested $(wildcard scripts/*.py)

imports: $(INSTALLED)
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)  ## every benchmark, one after the other: they time each other out when run side by side
	$(BIN)/python -m pip install --no-deps --ignore-requires-python --requirement benchmarks/requirements.txt
	set -e; for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python $$script; done

docs: $(VENV)/.docs  ## the documentation site, into site/; warnings and broken links are errors
	$(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/.docs  ## the same at http://127.0.0.1:8000, built again whenever a page changes
	$(BIN)/python -m mkdocs serve

clean:
	rm -rf $(VENV) site build dist *.egg-info .coverage coverage.xml htmlcov
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# The stamp is written last, so an interrupted installation is taken up again by the next run.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "pip>=21.3"  # the first that installs a pyproject.toml project editable
	$(BIN)/python -m pip install --editable ".[dev]"
	touch $@

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --editable ".[docs]"
	touch $@
