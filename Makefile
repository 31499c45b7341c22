# Every target installs what it needs on its first run and reuses it afterwards.
# Others than the defaults: make test PYTHON=python3.12 VENV=/tmp/venv
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALL_OPTIONS ?=
PYTHONS := 3.10 3.11 3.12 3.13 3.14
OLDEST ?= python3.10
export NO_MKDOCS_2_WARNING := 1  # docs/design.md says why MkDocs 1
RELEASE := .venv-release

.PHONY: demo test coverage check lint types imports format bench docs docs-serve lowest matrix dist sdist-test release clean
.DEFAULT_GOAL := check

demo: $(VENV)/.demo  ## find the wrong labels among 700 digits while training on them
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

# An environment of its own for each; with torch one takes 6 GB, so it is removed when its tests have passed.
lowest:  ## the default test suite on the oldest releases that pyproject.toml allows, with the oldest Python
	$(MAKE) test VENV=.venv-lowest PYTHON=$(OLDEST) INSTALL_OPTIONS="--constraint constraints/lowest.txt"
	rm -rf .venv-lowest

matrix:  ## the default test suite on every Python that is supported and found here
	set -e; for version in $(PYTHONS); do \
		if ! python$$version -c '' 2>/dev/null; then echo "== python$$version: not found, skipped"; continue; fi; \
		echo "== python$$version"; $(MAKE) test VENV=.venv-$$version PYTHON=python$$version; rm -rf .venv-$$version; \
	done

# The date of the last commit, so that a commit has one wheel, to the bit.
dist: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)
dist: $(VENV)/.release  ## source archive and wheel into dist/, built twice and compared, their description checked
	rm -rf build dist
	$(BIN)/python -m build --outdir dist/second
	$(BIN)/python -m build --outdir dist
	cmp dist/*.whl dist/second/*.whl
	rm -rf dist/second build
	$(BIN)/python -m twine check --strict dist/*

sdist-test: $(INSTALLED)  ## the default test suite in the unpacked source archive that make dist has left
	rm -rf build/sdist
	mkdir -p build/sdist
	tar xzf dist/*.tar.gz -C build/sdist --strip-components=1
	cd build/sdist && $(abspath $(BIN))/python -m pytest -n 2 --dist worksteal
	rm -rf build

# Nothing is uploaded. The main job runs outside the tree, so that it is the wheel that is imported.
release: dist  ## the release checklist: also installs the wheel in an empty environment, and runs the main job there
	rm -rf $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)
	set -e; wheel=$$(echo $(CURDIR)/dist/*.whl); $(RELEASE)/bin/python -m pip install "$$wheel[cli,digits,figures]"
	cd $(RELEASE) && bin/lightning-nested --version && bin/lightning-nested fit --config clean_digits
	rm -rf $(RELEASE)

clean:
	rm -rf $(VENV) .venv-lowest $(addprefix .venv-,$(PYTHONS)) $(RELEASE) site build dist *.egg-info .coverage coverage.xml htmlcov
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# The stamp is written last, so an interrupted installation is taken up again by the next run.
$(VENV)/.pip:
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "pip>=21.3"  # the first that installs a pyproject.toml project editable
	touch $@

$(INSTALLED): pyproject.toml $(VENV)/.pip
	$(BIN)/python -m pip install $(INSTALL_OPTIONS) --editable ".[dev]"
	touch $@

# What the demo needs, and no more.
$(VENV)/.demo: pyproject.toml $(VENV)/.pip
	$(BIN)/python -m pip install $(INSTALL_OPTIONS) --editable ".[cli,digits,figures]"
	touch $@

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --editable ".[docs]"
	touch $@

$(VENV)/.release: $(VENV)/.pip
	$(BIN)/python -m pip install "build>=1.2" "twine>=6"
	touch $@
