"""XLA compiles products for GPUs that are not there: `deviceless`, in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Where `make test-long` installs JAX's plugin for CUDA, apart from the packages of the tests.
PLUGIN = Path(sys.prefix) / "cuda"


@pytest.mark.skipif(
    not PLUGIN.is_dir(), reason=f"JAX's plugin for CUDA is not in {PLUGIN}: make cuda"
)
@pytest.mark.parametrize("architectures", ["sm_80,sm_86,sm_89", "sm_90,sm_100,sm_120"])
def test_products_compile(architectures):
    path = os.pathsep.join([str(ROOT), str(PLUGIN)])
    done = subprocess.run(
        [sys.executable, ROOT / "tests/deviceless.py", "--gpus", architectures],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" compile, ") == 3
