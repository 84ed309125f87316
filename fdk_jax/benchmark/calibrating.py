"""How long `load_calibrated` takes, and what it holds of the device and of the host.

    python -m fdk_jax.benchmark.calibrating FOLDER --model 1B --bits 4 --out rows.jsonl

writes a model of random weights in bfloat16 into FOLDER (on a memory disk, such as /dev/shm, to leave the disk
out; --write_only does no more than that), and calibrates it on random tokens, which take as long as any others.
One row a process: a peak is the process's. Until then rows.jsonl.unfinished holds the row of the layers that
were: a run that was stopped leaves it, with fewer "layers" than "layers_of_model".
"""

import dataclasses
import itertools
import json
import logging
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from fdk_jax import compilation_cache, models, usage
from fdk_jax.benchmark import environment, loading, records
from fdk_jax.format.packing import BITS
from fdk_jax.models import calibrating
from fdk_jax.models.config import ModelConfig, custom_llama

SUITE = "calibration"
_CONTEXT = 512
_COMPILED = "/jax/core/compile/backend_compile_duration"


class _Clock(logging.Handler):
    """When the model was read and each layer was done, and what was compiled by then.

    Args:
        layer: called with this clock after each layer.
    """

    def __init__(self, layer: Callable[["_Clock"], None]):
        super().__init__(logging.INFO)
        self.layer = layer
        self.times, self.programs = [time.perf_counter()], [0]
        self.compiled: list[float] = []  # seconds of each program
        calibrating.LOG.setLevel(logging.INFO)
        calibrating.LOG.addHandler(self)
        jax.monitoring.register_event_duration_secs_listener(self._compile)

    def _compile(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED:
            self.compiled.append(duration_secs)

    def emit(self, record: logging.LogRecord) -> None:
        self.times.append(time.perf_counter())
        self.programs.append(len(self.compiled))
        new = self.compiled[self.programs[-2] :]
        print(
            f"{record.getMessage()}: {self.times[-1] - self.times[-2]:.2f} s, of them {sum(new):.2f} compiling"
            f" {len(new)} programs",
            file=sys.stderr,
            flush=True,
        )
        if self.layers:
            self.layer(self)

    @property
    def layers(self) -> int:
        """That were calibrated."""
        return max(0, len(self.times) - 2)

    def fields(self) -> dict[str, Any]:
        """Of a row. Further layers are those after the first, which compiles what all of them run."""
        read, *layers = [b - a for a, b in itertools.pairwise(self.times)]
        return {
            "read_seconds": read,
            "first_layer_seconds": layers[0],
            "further_layer_seconds": statistics.median(layers[1:]) if layers[1:] else None,
            "compile_seconds": sum(self.compiled),
            "programs": len(self.compiled),
            "programs_of_further_layers": self.programs[-1] - self.programs[2],
        }


def _shape(name: str, layers: int | None) -> ModelConfig:
    config = custom_llama(name)
    return dataclasses.replace(config, num_layers=layers or config.num_layers)


def _place(folder: Path, name: str, config: ModelConfig) -> Path:
    return folder / f"calibrating-{name}-{config.num_layers}"


def write(where: Path, config: ModelConfig) -> None:
    """Writes the float model, unless it is there."""
    if not where.exists():
        unfinished = where.with_name(f"{where.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        loading.write(unfinished, config, 16, np.random.default_rng(0))
        unfinished.rename(where)


def measure(
    folder: Path,
    name: str,
    bits: int,
    *,
    layers: int | None,
    tokens: int,
    rotate: bool,
    part: Callable[[dict[str, Any]], None] = lambda fields: None,
) -> dict[str, Any]:
    """The fields of a row.

    Args:
        folder: where the float model is written, and removed again.
        name: of `fdk_jax.models.custom_llama`.
        bits: of the quantised model.
        layers: of the model, if not all.
        tokens: of the text, in windows of 512.
        rotate: see `load_calibrated`.
        part: called after each layer with the fields as they are by then; the size of the model is open yet.
    """
    whole = custom_llama(name).num_layers
    config = _shape(name, layers)
    where = _place(folder, name, config)

    def fields(clock: _Clock, model_bytes: int | None) -> dict[str, Any]:
        memory = jax.local_devices()[0].memory_stats() or {}
        return {
            "suite": SUITE, "name": f"{name} {bits}" + " rotated" * rotate, "bits": bits, "group_size": 64,
            "codebook": "kmeans", "dtype": "bfloat16", "model": f"custom-llama-{name}", "layers": clock.layers,
            "layers_of_model": whole, "parameters": config.num_parameters, "tokens": int(rows.size),
            "seconds": time.perf_counter() - clock.times[0], **clock.fields(), "stored_bytes": stored,
            "peak_bytes": memory.get("peak_bytes_in_use"), "model_bytes": model_bytes,
            "host_peak_bytes": loading.peak_host_bytes(),
        }  # fmt: skip

    try:
        write(where, config)
        stored = sum(path.stat().st_size for path in where.iterdir())
        rows = np.random.default_rng(1).integers(
            0, config.vocab_size, (max(1, tokens // _CONTEXT), _CONTEXT)
        )
        clock = _Clock(lambda clock: part(fields(clock, None)))
        with (
            warnings.catch_warnings()
        ):  # the text has fewer tokens than the widest layers have inputs
            warnings.simplefilter("ignore")
            model = calibrating.load_calibrated(
                where,
                models.Quantisation(bits),
                rows.astype(np.int32),
                rotate=rotate,
                progress=False,
            )
        jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
        return fields(clock, sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))))
    finally:
        shutil.rmtree(where, ignore_errors=True)


def main() -> None:
    """Measures one model and appends its row."""
    parser = usage.Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="1B", help="1B, 8B, ...: see models.custom_llama")
    parser.add_argument("--bits", type=int, default=4, choices=BITS)
    parser.add_argument("--layers", type=int, help="the first ones only")
    parser.add_argument("--tokens", type=int, default=16384, help="of the text")
    parser.add_argument("--write_only", action="store_true", help="write the float model and stop")
    parser.add_argument("--rotate", action="store_true", help="turn the weights first")
    parser.add_argument("--out", type=Path, default=Path("results/calibration.jsonl"))
    arguments = parser.parse_args()
    if arguments.write_only:
        config = _shape(arguments.model, arguments.layers)
        write(_place(arguments.folder, arguments.model, config), config)
        return
    compilation_cache.keep()
    device = environment.describe(jax.devices()[0])
    unfinished = arguments.out.with_name(f"{arguments.out.name}.unfinished")

    def keep(fields: dict[str, Any]) -> None:
        unfinished.write_text(json.dumps(records.make_row(device, fields)) + "\n", "utf-8")

    found = measure(
        arguments.folder,
        arguments.model,
        arguments.bits,
        layers=arguments.layers,
        tokens=arguments.tokens,
        rotate=arguments.rotate,
        part=keep,
    )
    row = records.make_row(device, found)
    with records.Writer(arguments.out) as writer:
        writer.write(row)
    unfinished.unlink(missing_ok=True)
    print(
        f"{row['name']}, {row['layers']} layers: {row['seconds']:.1f} s, device peak"
        f" {(row['peak_bytes'] or 0) / 1e9:.2f} GB, host peak {row['host_peak_bytes'] / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
