# `make bench` and `make test` do all the set-up: an environment in .venv, the build, the run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUT ?= skillfast-report
ARGS ?=
EXTRAS ?=
# uv, where there is one, resolves and installs in seconds what takes pip minutes. It leaves out what pip does by
# itself, to compile the modules: imports are then compiled in each run, for 8 of its seconds.
UV := $(shell command -v uv)
PIP_INSTALL = $(if $(UV),$(UV) pip install --quiet --compile-bytecode --python $(1)/bin/python,$(1)/bin/pip install --quiet --disable-pip-version-check)
INSTALL := $(call PIP_INSTALL,$(VENV))
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc kernels skillfast -type f -not -path '*/__pycache__/*')

.PHONY: bench test lint format docs mutants fuzz fuzz-coverage oldest plotly clean

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

# The site of docs/ and examples/, with the docstrings and the commands' help, into site/; a warning is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/pip $(SOURCES)
	$(INSTALL) .
	@touch $@

# Each is one install with all that it needs: pip builds the package anew every time.
$(VENV)/.installed-test: $(BIN)/pip $(SOURCES)
	$(INSTALL) '.[test$(EXTRAS)]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-lint: $(BIN)/pip $(SOURCES)
	$(INSTALL) '.[test,lint$(EXTRAS)]'
	@touch $(VENV)/.installed $(VENV)/.installed-test $@

$(VENV)/.installed-docs: $(BIN)/pip $(SOURCES)
	$(INSTALL) '.[docs]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-mutants: $(BIN)/pip $(SOURCES)
	$(INSTALL) '.[test,mutants]'
	@touch $(VENV)/.installed $(VENV)/.installed-test $@

# Mutation testing; `make mutants CHANGED=origin/main` only tries changed lines, 40 mutants or as many as two minutes allow.
N ?= 300
SEED ?= 0
mutants: $(VENV)/.installed-mutants
	$(BIN)/python tests/mutants/run.py --seed $(SEED) \
		$(if $(CHANGED),-n 40 --changed $(CHANGED) --seconds 120 --budget 15,-n $(N)) $(ARGS)

# Files of every kind that the package reads, each changed in 10,000 ways: refused in one line or read, never a traceback.
FUZZ ?= 10000
fuzz: $(VENV)/.installed-test
	$(BIN)/python tests/fuzz.py -n $(FUZZ) $(ARGS)

# The same by atheris, which changes further what reached new lines; FUZZ_SECONDS on each kind.
FUZZ_SECONDS ?= 60
fuzz-coverage: $(VENV)/.installed-test
	$(INSTALL) '.[test,fuzz]'
	$(BIN)/python tests/fuzz.py --coverage $(FUZZ_SECONDS) $(ARGS)

# The oldest versions that pyproject.toml declares; CI runs the core tests on them.
oldest:
	PYENV_VERSION=3.10 python3.10 -m venv .oldest || $(PYTHON) -m venv .oldest
	$(call PIP_INSTALL,.oldest) -c .ci/oldest.txt pybind11 scikit-build-core cmake ninja
	SKILLFAST_CUDA=OFF $(call PIP_INSTALL,.oldest) -c .ci/oldest.txt --no-build-isolation '.[test]'

# What pages draw with: plotly.js with the kinds of traces that they have, a quarter of the whole. Kept in the repository,
# so that nobody who installs needs npm. Text on a colour is black or white: plotly.js takes a dark grey, which on middle
# blues has a contrast of 3.
PLOTLY ?= 4.1.1
plotly:
	mkdir -p build/plotly
	cd build/plotly && npm install --silent --no-save --prefix . plotly.js@$(PLOTLY) esbuild@0.28.2
	printf '%s\n' "const Plotly = require('plotly.js/lib/core');" \
		"const color = require('plotly.js/src/components/color');" \
		"const { contrast } = color;" \
		"const text = (of) => color.mostReadable(color.opacity(of) < 1 ? color.combine(of, color.background) : of);" \
		"color.contrast = (of, ...amounts) => (amounts.length ? contrast(of, ...amounts) : text(of));" \
		"Plotly.register([require('plotly.js/lib/bar'), require('plotly.js/lib/heatmap')]);" \
		"module.exports = Plotly;" >build/plotly/index.js
	cd build/plotly && npx esbuild index.js --bundle --minify --format=iife --global-name=Plotly --target=es2017 \
		--define:global=window --legal-comments=eof --log-level=error \
		--banner:js="/*! plotly.js v$(PLOTLY), scatter, bar and heatmap alone. Copyright Plotly, Inc. MIT licence. */" \
		--outfile=../../skillfast/report/plotly.min.js
	rm skillfast/report/plotly.min.css

clean:
	rm -rf $(VENV) .oldest build dist site
