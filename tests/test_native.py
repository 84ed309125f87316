"""The C++ library under random calls between guard pages; `make fuzz` adds the sanitizers."""

import subprocess
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent.parent / "cpu" / "build" / "fdk_fuzz"


@pytest.mark.skipif(not FUZZ.exists(), reason="ninja -C cpu has not built fdk_fuzz")
@pytest.mark.parametrize("threads", [1, 4])
def test_random_calls_are_right_or_refused(threads):
    """Products, arbitrary bits, broken calls, conversions, dense products and probes for seconds."""
    command = [FUZZ, "--seconds", "4", "--threads", str(threads)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
