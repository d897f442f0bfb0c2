# `make bench` and `make test` do all the set-up: an environment in .venv, the build, the run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUT ?= skillfast-report
ARGS ?=
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc kernels skillfast -type f -not -path '*/__pycache__/*')

.PHONY: bench test lint format docs mutants clean

bench: $(VENV)/.installed
	$(BIN)/skillfast bench --output $(OUTPUT) $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

$(VENV)/.installed-mutants: $(VENV)/.installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check '.[mutants]'
	@touch $@

# The site of docs/ and examples/, with the docstrings and the commands' help, into site/; a warning is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/pip $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check .
	@touch $@

# The package is installed once; the extras only add to it.
$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check '.[test]'
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check '.[lint]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check '.[docs]'
	@touch $@

# Mutation testing, in about half an hour; `make mutants CHANGED=origin/main` only tries changed lines, in 3 minutes.
N ?= 300
SEED ?= 0
mutants: $(VENV)/.installed-mutants
	$(BIN)/python tests/mutants/run.py --seed $(SEED) \
		$(if $(CHANGED),-n 40 --changed $(CHANGED) --map-seconds 60 --seconds 90,-n $(N)) $(ARGS)

clean:
	rm -rf $(VENV) build dist site
