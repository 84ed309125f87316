"""A model that several processes share, as on several hosts: the tokens of one process, and no hang."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from model_data import wide_config, write_folder

from fdk_jax import models

PROGRAM = Path(__file__).with_name("one_of_processes.py")


def _start(folder: Path, bits: int, **environment: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder), address, "2", str(number), str(bits)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        for number in range(2)
    ]


@pytest.mark.parametrize("bits", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_two_processes_choose_the_tokens_of_one(tmp_path, bits):
    folder = write_folder(tmp_path / "model", wide_config())
    processes = _start(folder, bits)
    quantisation = models.Quantisation(bits, 16) if bits else None
    one = models.Generator(models.load(folder, quantisation=quantisation))
    tokens = np.random.default_rng(5).integers(0, 256, (4, 12))
    expected = one.generate(tokens.tolist(), max_tokens=7, stop_tokens=[1]).tokens
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert json.loads(out.splitlines()[-1]) == dict(
            tokens=expected, own=True, product=True, processes=2
        )


@pytest.mark.slow
def test_a_dead_process_ends_the_others_with_a_message(tmp_path):
    folder = write_folder(tmp_path / "model", wide_config())
    first, second = _start(folder, 4, FDK_DIES="1")
    second.communicate(timeout=300)
    assert second.returncode == 3
    _, err = first.communicate(timeout=300)
    assert first.returncode != 0
    assert "UNAVAILABLE" in err or "heartbeat" in err, err
