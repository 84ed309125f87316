"""The programs in examples/ run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARGUMENTS = {"load_and_chat": [str(ROOT / "tests/data/models/llama3")]}
SAYS = {
    "load_and_chat": "tokens a second",
    "quantise_flax_model": "relative error",
    "bench_a_product": "xla-b4-m1-k256",
    "train_at_two_bits": "quantisation-aware training: loss",
}


def test_there_is_an_example_of_each_kind():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(SAYS)


@pytest.mark.whole
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_example_runs(path):
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(path), *ARGUMENTS.get(path.stem, [])]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert SAYS[path.stem] in done.stdout


def test_the_command_names_its_commands(capsys):
    from fdk_jax import command

    assert command.main([]) == 2 and command.main(["fly"]) == 2
    assert "generate,evaluate,bench,doctor,quality,tune" in capsys.readouterr().out
    listed = [sys.executable, "-m", "fdk_jax.command", "bench", "--list", "--k=64", "--m=1"]
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(listed, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "-m1-k64-" in done.stdout
