"""Compiles products for other GPUs through XLA, without a GPU: what Triton and XLA make of the kernels.

    python tests/deviceless.py
    python tests/deviceless.py --gpus sm_80,sm_120

needs jax-cuda13-plugin and jax-cuda13-pjrt of the version of JAX, a ptxas, and that JAX sees no GPU.
The PTX that XLA launches as it stands is not looked into: `assemble` has that.
"""

import argparse
import functools
import itertools
import os
import sys
import time
from pathlib import Path

os.environ |= {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
}
if __name__ == "__main__":  # from the project's root
    sys.path.insert(0, str(Path(__file__).parent.parent))

import assemble
import jax
import jax.numpy as jnp
from golden import DECODERS
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

import pallas_kernels
from pallas_kernels import attention, dense, norm
from pallas_kernels.target import SHARED_BYTES, Target, using

# (name, multiprocessors, L2, bytes a second, clock in GHz) of a GPU of each architecture.
_GPUS = {
    (8, 0): ("NVIDIA A100-SXM4-80GB", 108, 40e6, 2.0e12, 1.41),
    (8, 6): ("NVIDIA GeForce RTX 3090", 82, 6e6, 0.94e12, 1.70),
    (8, 9): ("NVIDIA L40S", 142, 96e6, 0.86e12, 2.52),
    (9, 0): ("NVIDIA H200", 132, 50e6, 4.8e12, 1.98),
    (10, 0): ("NVIDIA B200", 148, 126e6, 8.0e12, 1.97),
    (12, 0): ("NVIDIA GeForce RTX 5090", 170, 96e6, 1.79e12, 2.41),
}


def target_config(capability: tuple[int, int]) -> str:
    """XLA's description of a GPU, as text."""
    _, cores, cache, bandwidth, clock = _GPUS[capability]
    registers = 65536
    threads = 2048 if capability[1] == 0 and capability[0] in (8, 9, 10) else 1536
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {SHARED_BYTES[capability] + 1024}
  threads_per_core_limit: {threads}
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(bandwidth)}
  l2_cache_size: {int(cache)}
  clock_rate_ghz: {clock}
  device_memory_size: 24000000000
  shared_memory_per_block_optin: {SHARED_BYTES[capability]}
  cuda_compute_capability {{
    major: {capability[0]}
    minor: {capability[1]}
  }}
  registers_per_core_limit: {registers}
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{
  major: 9
  minor: 8
}}
device_description_str: "{_GPUS[capability][0]}"
"""


def compile_for(capability: tuple[int, int], run, *shapes: jax.ShapeDtypeStruct):
    """The compiled program of a function for a GPU."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target_config(capability), topology="1x1x1"
    )
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    device = AbstractDevice("NVIDIA H200", None, "gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(run, in_shardings=sharding, out_shardings=sharding).trace(*shapes)
        return traced.lower(lowering_platforms=("cuda",)).compile()


def product(m: int, bits: int, uniform: bool, n: int = 4096, k: int = 4096):
    """A product, and the shapes and dtypes of its arguments."""
    shape, half = jax.ShapeDtypeStruct, jnp.bfloat16
    tiles, blocks = n // 16, k * bits // 512
    arguments = (
        shape((m, k), half),
        shape((tiles, blocks, 2, 8, 32), jnp.uint16),
        shape((tiles, -(-k // 256), 64), half),
        shape((2**bits,), jnp.float32),
    )
    spec = dict(bits=bits, group_size=64, out_features=n, uniform=uniform)
    return functools.partial(pallas_kernels.matmul, **spec), arguments


def others():
    """Names, functions and arguments of the kernels that are not products with quantised weights."""
    shape, half, single = jax.ShapeDtypeStruct, jnp.bfloat16, jnp.float32

    def normalise(x, delta, scale):
        return norm.add_rms_norm(x, delta, scale, eps=1e-5)

    rows = shape((2, 4096), half)
    yield "norm", normalise, (rows, rows, shape((4096,), half))
    dot = functools.partial(dense.matmul, out_dtype=half)
    yield "dense", dot, (rows, shape((4096, 1024), half))
    for batch, capacity in ((1, 512), (4, 4096)):
        cache = shape((batch, 8, capacity, 128), half)
        turn = shape((batch, 64), single)
        token = shape((batch, 48 * 128), half)
        arguments = token, turn, turn, shape((batch,), jnp.int32), cache, cache
        yield f"attention over {capacity}", attention.decode, arguments
    run, shapes = product(3, 4, False)
    exact = shape((3, 4096), single), *shapes[1:]
    yield "a product of float32", run, exact


def _compiles(capability, name, run, shapes) -> bool:
    """Whether a program compiles; else prints what the compiler says."""
    try:
        compile_for(capability, run, *shapes)
    except Exception as error:  # whatever it is, the others follow
        print(f"sm_{capability[0]}{capability[1]} {name}: {error}")
        return False
    return True


def main() -> int:
    """Compiles a product of each decoder and number of tokens for each GPU; 1 if one fails."""
    known = {f"sm_{major}{minor}": (major, minor) for major, minor in _GPUS}
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpus", default=",".join(known), help="architectures, comma-separated")
    wanted, failed = parser.parse_args().gpus.split(","), 0
    if unknown := set(wanted) - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(known)}")
    for ptxas in assemble.assemblers().values():  # XLA takes the first on PATH
        os.environ["PATH"] = f"{ptxas.parent}{os.pathsep}{os.environ['PATH']}"
    for capability in map(known.__getitem__, wanted):
        name, cores, *_ = _GPUS[capability]
        target = Target(capability, cores, SHARED_BYTES[capability], name)
        start, kernels = time.perf_counter(), set()
        with using(target):
            for name, run, shapes in others():
                failed += not _compiles(capability, name, run, shapes)
            tokens = (1, 16, 64, *((100, 128, 250, 400, 2048) if target.has_wgmma else ()))
            for (bits, uniform), m in itertools.product(DECODERS, tokens):
                spec = dict(bits=bits, group_size=64, out_features=4096, in_features=4096)
                plan = pallas_kernels.plan(m, uniform=uniform, dtype=jnp.bfloat16, **spec)
                kernels.add(plan.kernel)
                run, shapes = product(m, bits, uniform)
                name = f"{bits} bits {uniform=} {m=} {plan}"
                failed += not _compiles(capability, name, run, shapes)
        taken = f"{time.perf_counter() - start:.0f} s"
        print(f"{target}: {', '.join(sorted(kernels))} compile, {taken}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
