"""What GPU tests launch is recorded without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import launches

_TESTS = Path(launches.__file__)


def _record(tmp_path, target):
    output = tmp_path / f"{target}.json"
    command = [sys.executable, _TESTS, "record", output, "--target", target]
    chosen = ["-k", "test_sums_of_integers and 700-1536 or test_layers or test_rounding"]
    done = subprocess.run([*command, *chosen], capture_output=True, text=True)
    assert output.exists(), done.stderr + done.stdout
    return json.loads(output.read_text(encoding="utf-8"))


def test_a_test_whose_kernel_changed_is_named(tmp_path):
    hopper, older = _record(tmp_path, "sm_90"), _record(tmp_path, "sm_80")
    products = [f"tests/test_gpu.py::test_sums_of_integers[700-1536-32-12-2-{b}]" for b in (2, 4)]
    others = {name for name in older if name not in products}
    assert others and all("test_layers" in name or "test_rounding" in name for name in others)
    assert all(hopper[name] and older[name] for name in products)
    assert set(launches.changed(hopper, hopper)) == others  # of several kernels, or of none
    assert set(launches.changed(hopper, older)) == {
        *others,
        *products,
    }  # no bulk copies before sm_90


def test_a_kernel_that_any_test_had_is_known():
    old = {"a": "1", "b": "2", "c": ""}
    assert launches.changed(old, {"b": "1", "d": "2", "e": "3", "c": ""}) == ["e", "c"]
