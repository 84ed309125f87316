"""Whether a training that was killed goes on with the same losses.

    python -m fdk_jax.quality.resuming --text corpus.xz --out results/resumed.jsonl

trains a model of the scaling table twice, each time in a process of its own and with sums in one order. One is
killed once it has written a checkpoint, and started again. A row has the losses of both.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from fdk_jax import usage
from fdk_jax.benchmark import environment, records
from fdk_jax.quality import scaling_runs

SUITE = "resumption"
_PROGRAM = [sys.executable, "-m", "fdk_jax.quality.scaling"]


def measure(
    size: str, bits: int, tokens: int, text: Path, *, options: list[str], wait: float = 600.0
) -> dict[str, Any]:
    """The fields of a row.

    Args:
        size: of `scaling_runs.SIZES`.
        bits: of its weights, 16 for floats.
        tokens: of training.
        text: see `fdk_jax.quality.corpus.documents`.
        options: further ones of `python -m fdk_jax.quality.scaling`.
        wait: seconds until a checkpoint is there at the latest.

    Raises:
        RuntimeError: a training failed, or ended before it could be killed: give more tokens.
    """
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = (Path(folder) / name for name in ("whole", "killed"))
        command = [
            *_PROGRAM,
            f"--text={text}",
            "--reproducible",
            f"--sizes={size}",
            f"--bits={bits}",
            f"--tokens={tokens}",
            *options,
        ]

        def start(place: Path) -> contextlib.AbstractContextManager[subprocess.Popen]:
            return _child([*command, f"--folder={place}", f"--out={place}.jsonl"])

        with start(whole) as first:
            with start(killed) as second:
                until = time.monotonic() + wait
                while not (found := _checkpoints(killed)) and second.poll() is None:
                    if time.monotonic() > until:
                        break
                    time.sleep(0.05)
                second.kill()
                ended = second.wait() == 0
            if ended or not found:
                raise RuntimeError(
                    f"no checkpoint of {size} {bits} in time to be killed after: give more tokens"
                )
            with start(killed) as again:
                if again.wait() or first.wait():
                    raise RuntimeError(f"a training of {size} {bits} failed")
        one, other = (records.read([place.with_suffix(".jsonl")])[0] for place in (whole, killed))
    return {
        "suite": SUITE,
        "name": f"{size} {bits}",
        "bits": bits,
        **{
            key: one[key]
            for key in ("group_size", "codebook", "dtype", "text", "tokens", "parameters")
        },
        "steps": one["tokens"] // (one["batch"] * one["context"]),
        "killed_after_step": max(found) * one["chunk"],
        "loss": one["loss"],
        "loss_resumed": other["loss"],
        "packed_loss": one.get("packed_loss"),
        "packed_loss_resumed": other.get("packed_loss"),
        "same_curve": one["curve"] == other["curve"],
    }


@contextlib.contextmanager
def _child(command: list[str]) -> Iterator[subprocess.Popen]:
    """A process that has ended when the block has, whatever happens in it."""
    with subprocess.Popen(command) as process:
        try:
            yield process
        finally:
            process.kill()


def _checkpoints(folder: Path) -> list[int]:
    """Chunks that were trained by each checkpoint; one that is being written has another name."""
    return [int(path.name) for path in folder.glob("*/[0-9]*") if path.name.isdigit()]


def main() -> None:
    """Trains, kills, and appends the row."""
    parser = usage.Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="see fdk_jax.quality.corpus")
    parser.add_argument("--size", default="tiny", choices=list(scaling_runs.SIZES))
    parser.add_argument("--bits", type=int, default=1, choices=(16, 8, 4, 2, 1))
    parser.add_argument("--tokens", type=int, default=30_000_000, help="of training")
    parser.add_argument("--small", action="store_true", help="short sequences, for a CPU")
    parser.add_argument("--out", type=Path, default=Path("results/resumed.jsonl"))
    arguments = parser.parse_args()
    options = ["--small"] if arguments.small else []
    try:
        found = measure(
            arguments.size, arguments.bits, arguments.tokens, arguments.text, options=options
        )
    except RuntimeError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    with records.Writer(arguments.out) as writer:
        writer.write(records.make_row(environment.describe(jax.devices()[0]), found))
    print(
        f"{found['name']}: killed after step {found['killed_after_step']} of {found['steps']},"
        f" loss {found['loss_resumed']!r} for {found['loss']!r}"
    )


if __name__ == "__main__":
    main()
