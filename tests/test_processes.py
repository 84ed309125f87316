"""A model that several processes share, as on several hosts: the tokens of one process, and no hang."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from children import children
from model_data import wide_config, write_folder

from fdk_jax import models

PROGRAM = Path(__file__).with_name("one_of_processes.py")


def _two(start, folder: Path, bits: int, **environment: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [
        start(
            [sys.executable, str(PROGRAM), str(folder), address, "2", str(number), str(bits)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        for number in range(2)
    ]


@pytest.mark.parametrize("bits", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_two_processes_choose_the_tokens_of_one(start, tmp_path, bits):
    folder = write_folder(tmp_path / "model", wide_config())
    processes = _two(start, folder, bits)
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
def test_a_dead_process_ends_the_others_with_a_message(start, tmp_path):
    folder = write_folder(tmp_path / "model", wide_config())
    first, second = _two(start, folder, 4, FDK_DIES="1")
    second.communicate(timeout=300)
    assert second.returncode == 3
    _, err = first.communicate(timeout=300)
    assert first.returncode != 0
    assert "UNAVAILABLE" in err or "heartbeat" in err, err


def test_processes_of_a_test_that_fails_end_with_it():
    """Those that they have started, too: of a pipe that all of them hold there is an end when none is left."""
    child = "import time; print('here', flush=True); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(ZeroDivisionError), children() as start:
        process = start([sys.executable, "-c", parent], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"here\n"
        pipe = os.dup(process.stdout.fileno())
        raise ZeroDivisionError
    assert process.returncode == -signal.SIGKILL
    assert select.select([pipe], [], [], 60)[0] and os.read(pipe, 1) == b""
    os.close(pipe)
