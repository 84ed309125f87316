"""One process of several that share a model: the program that tests/test_processes.py starts.

    python tests/one_of_processes.py CHECKPOINT ADDRESS COUNT NUMBER BITS

Prints a line of JSON: the tokens, whether the process holds only its own slices, and whether its part of a
sharded product is right. With FDK_DIES set the last process goes away before it takes part.
"""

import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fdk_jax
from fdk_jax import models
from fdk_jax.product.sharding import place, shard


def main(folder: str, address: str, count: int, number: int, bits: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.distributed.initialize(address, count, number, heartbeat_timeout_seconds=10)
    mesh = jax.make_mesh((count, 2), ("data", "model"))
    quantisation = models.Quantisation(bits, 16) if bits else None
    parallel = models.Parallel(mesh, data="data")
    model = models.load(folder, quantisation=quantisation, parallel=parallel)
    generator = models.Generator(model)
    if number == count - 1 and os.environ.get("FDK_DIES"):
        os._exit(3)
    tokens = np.random.default_rng(5).integers(0, 256, (4, 12))
    done = generator.generate(tokens.tolist(), max_tokens=7, stop_tokens=[1])
    local = {s.device.process_index for leaf in generator.leaves for s in leaf.addressable_shards}
    plain = fdk_jax.quantise(np.random.default_rng(6).normal(size=(32, 64)).astype(np.float32), 4)
    x = place(np.ones((2, 64), np.float32), NamedSharding(mesh, P()))
    y = jax.jit(fdk_jax.matmul)(x, shard(plain, mesh, n="model"))
    wanted = np.asarray(fdk_jax.dequantise(plain), np.float64).sum(1)
    parts = [(np.asarray(s.data), wanted[s.index[1]]) for s in y.addressable_shards]
    right = all(np.allclose(part, one, rtol=1e-5, atol=1e-5) for part, one in parts)
    print(
        json.dumps(dict(tokens=done.tokens, own=local == {number}, product=right, processes=count)),
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))
