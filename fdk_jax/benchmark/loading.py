"""How fast checkpoints are loaded: GB of files a second, and the host memory that it takes.

    python -m fdk_jax.benchmark.loading FOLDER [--model 4B] [--bits 4] [--backend pallas] [--devices 2]

writes a model of random weights into FOLDER (on a memory disk, such as /dev/shm, to measure all but the disk),
once as compressed-tensors (integers) or bfloat16 (16 bits) and once prepared for the backend, and loads each in
processes of their own, one after another: the first compiles the conversions, the others find them in a cache.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from fdk_jax import compilation_cache, models, usage
from fdk_jax.benchmark import shapes
from fdk_jax.models import names
from fdk_jax.models.config import ModelConfig, custom_llama
from fdk_jax.models.exporting import export
from fdk_jax.product.choice import default_backend

_GROUP = 64
_DRAWN = 2**21 - 9  # random values of a matrix: odd, so that its rows differ


def write(folder: Path, config: ModelConfig, bits: int, rng: np.random.Generator) -> None:
    """A Hugging Face folder with random weights: of 16 bits, or of compressed-tensors' integers of 4 or 8."""
    folder.mkdir(parents=True)
    settings = shapes.of_hugging_face(config) | dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        rms_norm_eps=1e-5,
        rope_theta=config.rope_theta,
        hidden_act="silu",
        torch_dtype="bfloat16",
    )
    if bits < 16:
        weights = dict(
            num_bits=bits, type="int", symmetric=True, strategy="group", group_size=_GROUP
        )
        settings["quantization_config"] = dict(
            quant_method="compressed-tensors",
            format="pack-quantized",
            quantization_status="compressed",
            config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
            ignore=["lm_head"],
        )
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    for index in range(-1, config.num_layers):
        arrays = _ends(config, rng) if index < 0 else _layer(config, index, bits, rng)
        safetensors.numpy.save_file(arrays, folder / f"model-{index + 1:03d}.safetensors")


def _matrix(rng, n: int, k: int) -> np.ndarray:
    """bfloat16 [n, k]; repeats itself after some million values, which takes little time."""
    values = rng.standard_normal(min(n * k, _DRAWN), np.float32) * np.float32(k**-0.5)
    return np.resize(values.astype(jnp.bfloat16), (n, k))


def _ends(config: ModelConfig, rng) -> dict[str, np.ndarray]:
    shape = config.vocab_size, config.hidden_size
    arrays = {names.EMBEDDING: _matrix(rng, *shape)}
    arrays[names.FINAL_NORM] = np.ones(config.hidden_size, jnp.bfloat16)
    if not config.tie_embeddings:
        arrays["lm_head.weight"] = _matrix(rng, *shape)
    return arrays


def _layer(config: ModelConfig, index: int, bits: int, rng) -> dict[str, np.ndarray]:
    vectors = names.layer_vectors(config, index).items()
    arrays: dict[str, np.ndarray] = {
        name: np.ones(size, jnp.bfloat16) for name, (_, size) in vectors
    }
    for projection in names.layer_projections(config, index):
        for part in projection.parts:
            n, k = part.shape
            if bits == 16:
                arrays[f"{part.name}.weight"] = _matrix(rng, n, k)
                continue
            words = np.frombuffer(rng.bytes(n * k * bits // 8), np.int32).reshape(n, -1)
            arrays[f"{part.name}.weight_packed"] = words
            scales = np.full((n, k // _GROUP), 2.0**-bits / k**0.5, jnp.bfloat16)
            arrays[f"{part.name}.weight_scale"] = scales
            arrays[f"{part.name}.weight_shape"] = np.asarray([n, k], np.int64)
    return arrays


def measure(folder: Path, backend: str | None, devices: int) -> str:
    """Loads a folder in this process, and says how long that took and what it held of the host."""
    parallel = None
    if devices > 1:
        parallel = models.Parallel(
            jax.make_mesh((devices,), ("model",), devices=jax.devices()[:devices])
        )
    size = sum(path.stat().st_size for path in folder.iterdir())
    for device in jax.devices()[:devices]:  # each is started before
        jax.block_until_ready(jax.device_put(jnp.zeros(1), device) + 1)
    before, start = peak_host_bytes(), time.perf_counter()
    model = models.load(folder, backend=backend, parallel=parallel)
    jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    seconds, held = time.perf_counter() - start, peak_host_bytes() - before
    return (
        f"{folder.name} on {devices}: {size / 1e9:.2f} GB in {seconds:.2f} s, {size / seconds / 1e9:.2f} GB/s,"
        f" {held / 1e9:.2f} GB more of host memory at the peak"
    )


def peak_host_bytes() -> int:
    """The most bytes that this process has held (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


def main() -> None:
    """Writes the folders that are not there, and loads each of them twice."""
    parser = usage.Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="4B", help="1B, 4B, 12B, ...: see models.custom_llama")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8, 16))
    parser.add_argument("--backend", help="whose kernels; by default the platform's")
    parser.add_argument("--again", type=int, default=2, help="how often each is loaded")
    parser.add_argument("--one", action="store_true", help="load FOLDER itself, once")
    parser.add_argument("--devices", type=int, default=1, help="that share the model")
    arguments = parser.parse_args()
    compilation_cache.keep()
    if arguments.one:
        print(measure(arguments.folder, arguments.backend, arguments.devices), flush=True)
        return
    name = f"{arguments.model}-{arguments.bits}"
    kind = f"prepared-{arguments.backend or default_backend()}"
    stored, prepared = arguments.folder / f"{name}-stored", arguments.folder / f"{name}-{kind}"
    if not stored.exists():
        write(stored, custom_llama(arguments.model), arguments.bits, np.random.default_rng(0))
    options = [] if arguments.backend is None else ["--backend", arguments.backend]
    options += ["--devices", str(arguments.devices)]
    command = [sys.executable, "-m", "fdk_jax.benchmark.loading", "--one", *options]
    for folder in (stored, prepared) if arguments.devices == 1 else (stored,):
        if not folder.exists():
            model = models.load(stored, backend=arguments.backend)
            export(model, prepared, like=stored, format="prepared")
            del model
        for _ in range(arguments.again):
            subprocess.run([*command, str(folder)], check=True)


if __name__ == "__main__":
    main()
