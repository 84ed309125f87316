"""Measures kernels and models on this machine; see `fdk_jax/benchmark/__main__.py` for the command line."""

import os
import runpy

# Products are compared with float64 by threads of Python, each with its own rows. Read when numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if __name__ == "__main__":
    runpy.run_module("fdk_jax.benchmark", run_name="__main__", alter_sys=True)
