"""How commands end: what the shell and the next program in a pipe see of them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHATTY = str(ROOT / "tests" / "data" / "models" / "llama3")
ENVIRON = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
JSON = ["generate", "--model", CHATTY, "--prompt", "fox", "--max_tokens", "2", "--quiet", "--json"]


def ended(arguments: list[str], **options) -> tuple[int, str]:
    """Exit status and stderr of a command."""
    command = [sys.executable, "-m", "fdk_jax.command", *arguments]
    done = subprocess.run(
        command, env=ENVIRON, stderr=subprocess.PIPE, text=True, timeout=300, **options
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", [JSON, ["doctor"]], ids=["generate", "doctor"])
def test_a_reader_that_has_gone(arguments):
    """As `| head` does: no word of it, and the status that shells give to SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        assert ended(arguments, stdout=closed) == (128 + signal.SIGPIPE, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [JSON, ["doctor"]], ids=["generate", "doctor"])
def test_a_full_disk(arguments):
    with open("/dev/full", "w") as full:
        status, err = ended(arguments, stdout=full)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "No space left" in err


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
def test_signals_are_those_of_the_command_itself(start):
    """`fdk-jax generate --chat` is the talk, not another process before it: Ctrl-C ends no talk."""
    command = [sys.executable, "-m", "fdk_jax.command", "generate", "--chat", "--model", CHATTY]
    talk = start(
        [*command, "--max_tokens", "2"],
        env=ENVIRON,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    said = b""
    while not said.endswith(b"> "):  # then it waits for a question
        more = os.read(talk.stderr.fileno(), 4096)
        assert more, said
        said += more
    talk.send_signal(signal.SIGINT)
    _, err = talk.communicate(b"hello\n", timeout=300)
    assert talk.returncode == 0, err
    assert b"ends the talk" in err and b"tokens/s" in err
