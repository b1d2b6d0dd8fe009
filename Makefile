# The two commands a newcomer needs: `make demo` and `make test`. Both make .venv themselves, work a second time without
# network, and install again when a source file has changed.
.DELETE_ON_ERROR:
.PHONY: demo test lint bench bench-render clean help

# The first of these that is Python 3.11 to 3.14; `make PYTHON=/path/to/python demo` chooses another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null && { echo $$p; break; }; done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
requirements = $(BIN)/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p$(1), sep='\n')"
SOURCES := $(shell find src -type f -not -path '*/__pycache__/*' -not -name '*.so' -not -name '*.dylib') \
  pyproject.toml CMakeLists.txt README.md

demo: $(VENV)/.installed
	$(BIN)/handhold assets
	$(BIN)/handhold demo --out runs/demo

test: $(VENV)/.installed $(VENV)/.dev
	$(BIN)/handhold assets
	$(BIN)/python -m pytest --timeout=240 $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .

# make bench HANDHOLD_BENCH=/path/to/clips, a folder of clips with video.mp4, K.txt and gt.npz
bench: $(VENV)/.installed $(VENV)/.dev
	$(BIN)/python benchmarks/bench.py $(HANDHOLD_BENCH)
	$(BIN)/python benchmarks/tables.py

# make bench-render ARGS="--peers FOLDER": speed of the engines, docs/benchmarks.md
bench-render: $(VENV)/.installed
	$(BIN)/python benchmarks/render.py $(ARGS)
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf $(VENV) build runs .pytest_cache .ruff_cache

help:
	@echo 'make demo   reconstruct the built-in clip into runs/demo'
	@echo 'make test   run the tests'
	@echo 'make lint   check the style'
	@echo 'make bench  measure the clips of HANDHOLD_BENCH'
	@echo 'make bench-render  measure the speed of the rendering engines'
	@echo 'make clean  remove .venv, runs and build files'

# What comes from the network: once, and again only when the requirements change.
$(VENV)/.deps: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'handhold needs Python 3.11 to 3.14 with venv; name one with make PYTHON=...'; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing dependencies into $(VENV) (once, some minutes)'
	$(PIP) install -c constraints.txt scikit-build-core cmake ninja
	$(call requirements,['dependencies']) > $(VENV)/requirements.txt
	$(PIP) install -c constraints.txt -r $(VENV)/requirements.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.deps
	$(call requirements,['optional-dependencies']['dev']) > $(VENV)/requirements-dev.txt
	$(PIP) install -c constraints.txt -r $(VENV)/requirements-dev.txt
	@touch $@

# The package itself: offline, and quick because the compiled kernels are kept in $(VENV)/build.
$(VENV)/.installed: $(VENV)/.deps $(SOURCES)
	$(PIP) install --no-deps --no-build-isolation --no-index --force-reinstall --config-settings=build-dir=$(VENV)/build .
	@touch $@
