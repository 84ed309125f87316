# `make bench` and `make test` set up everything they need on a fresh Debian machine with Python 3.11.
PYTHON ?= python3
NEWEST_PYTHON ?= python3.12
VENV ?= .venv
NEWEST_VENV ?= .venv-newest
BENCH_FLAGS ?=
TEST_FLAGS ?=

.DELETE_ON_ERROR:
.PHONY: bench test test-long test-part test-all architectures architectures-part test-newest toolchains cuda lint docs cpu clean fuzz matrix

# Builds the C++ library and its Python module for the environment $(1).
define build_cpu
@if cpu/toolchain/install.sh host; then PYTHON=$(CURDIR)/$(1)/bin/python $(1)/bin/ninja -C cpu; \
	else echo "going on without the C++ library"; fi
endef

bench: $(VENV)/.ready
	$(call build_cpu,$(VENV))
	$(VENV)/bin/python bench.py --backend xla,cpu --bits 32,16,8,4,2,1 --m 1,16 \
		--repetitions 10 --max_seconds 3 $(BENCH_FLAGS)

test: $(VENV)/.ready-dev
	$(call build_cpu,$(VENV))
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not long" $(TEST_FLAGS)

# Single tests that take long as well, those of ARM and Android on an emulator among them: half an hour.
test-long: test toolchains cuda
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m "long and not slow" $(TEST_FLAGS)

# Half of the slow cases, by the commit's name: chance, but the same half whenever a commit is tested, and a
# clone without history (or a tree without git: the first half) has one, too.
PART ?= $(shell echo $$((0x0$$(git rev-parse --short=4 HEAD 2>/dev/null) % 2)))/2
test-part: $(VENV)/.ready-dev
	$(call build_cpu,$(VENV))
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m slow --part $(PART) $(TEST_FLAGS)

# All cases of every test, the types and the site.
test-all: lint docs test-long
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m slow $(TEST_FLAGS)

# Every GPU kernel for every architecture, by the assemblers of CUDA 12 and 13; then products through XLA for GPUs
# that are not there, with JAX's plugin for CUDA, which is kept apart from the tests' packages.
architectures: $(VENV)/.ready-dev cuda
	$(VENV)/bin/python tests/assemble.py
	PYTHONPATH=$(VENV)/cuda $(VENV)/bin/python tests/deviceless.py

# Every kernel for half of the architectures by one assembler, for the others by the other, by the commit's name.
architectures-part: $(VENV)/.ready-dev
	$(VENV)/bin/python tests/assemble.py --part $(PART)

# JAX's plugin for CUDA; the test that needs it is skipped where it cannot be had.
cuda: $(VENV)/.ready-dev
	@[ -d $(VENV)/cuda ] || { \
		version=$$($(VENV)/bin/python -c 'import jax; print(jax.__version__)') && \
		$(VENV)/bin/pip install --quiet --no-deps --target $(VENV)/cuda.partial \
			"jax-cuda13-plugin==$$version" "jax-cuda13-pjrt==$$version" && \
		mv $(VENV)/cuda.partial $(VENV)/cuda || echo "going on without JAX's plugin for CUDA"; }

# The whole suite on the newest JAX, which needs Python 3.12.
test-newest: $(NEWEST_VENV)/.ready-dev toolchains
	$(call build_cpu,$(NEWEST_VENV))
	$(NEWEST_VENV)/bin/python -m pytest -n 2 --dist worksteal $(TEST_FLAGS)

# What the tests for ARM and Android need; they are skipped, with the reason, where it cannot be had.
toolchains:
	@for part in android-test model; do \
		cpu/toolchain/install.sh $$part || echo "going on without the toolchain for $$part"; done

# Minutes of random input: the C++ library under the sanitizers, then the long versions of the tests.
FUZZ_SECONDS ?= 120
fuzz: $(VENV)/.ready-dev
	$(call build_cpu,$(VENV))
	tests/fuzz.sh $(VENV)/bin/python $(FUZZ_SECONDS)

# The suite in a clean state on every supported set of packages; see docs/robustness.md.
matrix:
	tests/matrix.sh

# Every build of the C++ library has -Wall -Wextra -Wconversion -Werror.
lint: $(VENV)/.ready-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	find cpu android -path cpu/build -prune -o '(' -name '*.h' -o -name '*.cpp' ')' -print | \
		xargs $(VENV)/bin/clang-format --dry-run --Werror
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(call build_cpu,$(VENV))

# The documents as a site, build/docs/index.html; a warning is an error.
docs: $(VENV)/.ready-docs
	$(VENV)/bin/sphinx-build -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

cpu: $(VENV)/.ready
	$(call build_cpu,$(VENV))

%/.ready: pyproject.toml
	$(if $(findstring newest,$*),$(NEWEST_PYTHON),$(PYTHON)) -m venv $*
	$*/bin/pip install --quiet --upgrade pip
	$*/bin/pip install --quiet --editable .[cpu]
	touch $@

%/.ready-dev: %/.ready
	$*/bin/pip install --quiet --editable .[dev]
	touch $@

%/.ready-docs: %/.ready
	$*/bin/pip install --quiet --editable .[docs]
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST_VENV) build dist cpu/build *.egg-info
