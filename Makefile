# The one front door. `make demo` and `make test` do all set-up themselves.

VENV := .venv
BIN := $(VENV)/bin
# Debian's own interpreter is built with PGO and runs the proxies 10 to 15 % faster than most other builds.
PYTHON := $(firstword $(wildcard /usr/bin/python3) python3)

# Test files in the order of their names, one after the other on each core.
SIDE_BY_SIDE := -n auto --no-loadscope-reorder

.PHONY: help setup packages bpf demo test kernels lint check fix bench publish guard soak fuzz properties clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: packages $(VENV)/installed bpf  ## Packages, virtual environment, eBPF objects

packages:
	@scripts/install-packages

$(VENV)/installed: pyproject.toml | packages
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

bpf: | packages  ## Compile the eBPF programs
	@$(MAKE) --no-print-directory -C bpf

demo: setup  ## Build a mesh of two hosts on this machine and show what it does
	$(BIN)/meshctl demo

test: setup  ## All tests, as root with namespaces and eBPF; minutes
	$(BIN)/pytest -m 'not soak' $(SIDE_BY_SIDE)

kernels: setup  ## The eBPF programs and their tests on Debian's Linux 6.1 in an emulator (or KERNELS="6.1 6.12"); minutes
	@scripts/install-packages kernels
	$(BIN)/python -m tests.kernels $(KERNELS)

lint: setup  ## Format, lint, types and imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint  ## The same, and the fast tests
	$(BIN)/pytest -q -m 'not root and not mesh and not soak' $(SIDE_BY_SIDE)

fix: setup  ## Format, and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup  ## Measure the mesh against its peers; under an hour
	$(BIN)/meshctl bench run

publish: setup  ## Put the benchmark run RUN=bench-... where docs/benchmarks shows it
	$(BIN)/python -m benchmarks.publish $(RUN)

guard: setup  ## Count what the data plane costs, and compare it with the baseline (a part of the tests)
	$(BIN)/python -m benchmarks.guard

soak: setup  ## Minutes of load: memory, descriptors and map entries must stay flat, 10 GB arrive whole
	$(BIN)/pytest -m soak --timeout 1800
	$(BIN)/meshctl bench run --suite soak

fuzz: setup  ## Each parser fuzzed for an hour of processor time (or FUZZ_SECONDS=..., PARSERS="..."); what is found is kept
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz $(PARSERS)

properties: setup  ## Property tests with many more examples; hours
	HYPOTHESIS_PROFILE=deep HISTORIES=20 $(BIN)/pytest -m 'not root and not mesh and not soak' --timeout 7200

clean:  ## Remove what was built, not the virtual environment
	rm -rf bpf/build build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
