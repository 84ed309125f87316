# `make bench` and `make test` set up everything they need on a fresh Debian machine with Python 3.11.
PYTHON ?= python3
NEWEST_PYTHON ?= python3.12
VENV ?= .venv
NEWEST_VENV ?= .venv-newest
BENCH_FLAGS ?=

.DELETE_ON_ERROR:
.PHONY: bench test test-newest lint cpu clean

bench: $(VENV)/.ready cpu
	$(VENV)/bin/python bench.py --backend xla,cpu --bits 16,8,4,2,1 --m 1,16 $(BENCH_FLAGS)

test: $(VENV)/.ready-dev cpu
	$(VENV)/bin/ruff check fdk_jax pallas_kernels tests bench.py
	$(VENV)/bin/python -m pytest -n 2

# The whole suite on the newest JAX, which needs Python 3.12.
test-newest: $(NEWEST_VENV)/.ready-dev
	$(NEWEST_VENV)/bin/python -m pytest -n 2

lint: $(VENV)/.ready-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

cpu: $(VENV)/.ready
	cpu/toolchain/install.sh host
	$(VENV)/bin/ninja -C cpu

%/.ready: pyproject.toml
	$(if $(findstring newest,$*),$(NEWEST_PYTHON),$(PYTHON)) -m venv $*
	$*/bin/pip install --quiet --upgrade pip
	$*/bin/pip install --quiet --editable .[cpu]
	touch $@

%/.ready-dev: %/.ready
	$*/bin/pip install --quiet --editable .[dev]
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST_VENV) build dist cpu/build *.egg-info
