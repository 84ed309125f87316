"""Times a product inside jit while another process keeps one processor busy.

usage: busy_core.py [--k 4096] [--bits 4] [--rounds 9] [--output FILE.jsonl]

Mean time a call over intervals of 0.2 s, so that the scheduler's time slices average out, with one
thread and with all of them in turns: first with idle processors, then with the last one shared with
a process that never sleeps. Work is handed out in pieces to whoever takes part, and nobody waits for
a thread that has not started. The bound assumes that the shared processor gives half of its time; an
equal split would take as long as one thread alone at best.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_STRETCH_SECONDS = 0.2


def work(pipe: Any, k: int, bits: int, threads: int) -> None:
    """A process with its own limit of threads: a sample in microseconds for each message."""
    os.environ["FDK_NUM_THREADS"] = str(threads)
    import jax
    import jax.numpy as jnp

    import fdk_jax
    from fdk_jax.benchmark import environment

    device = jax.devices("cpu")[0]
    matrix = jax.random.normal(jax.random.key(0), (k, k), jnp.bfloat16)
    weight = fdk_jax.prepare(fdk_jax.quantise(matrix, bits=bits, codebook="nf4"), backend="cpu")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
    copies = environment.working_set_bytes(device) // size + 2
    weights = [weight, *(jax.tree.map(jnp.copy, weight) for _ in range(copies - 1))]
    product = jax.jit(lambda x, w: fdk_jax.matmul(x, w, backend="cpu", arithmetic="int8"))
    x = jnp.ones((1, k), jnp.bfloat16)
    product(x, weight).block_until_ready()
    pipe.send(environment.describe(device) | {"bytes_rw": size + 4 * k})
    calls = 0
    while pipe.recv():
        first, start = calls, time.perf_counter()
        while (passed := time.perf_counter() - start) < _STRETCH_SECONDS:
            product(x, weights[calls % copies]).block_until_ready()
            calls += 1
        pipe.send(passed / (calls - first) * 1e6)


def main() -> None:
    """Measures and prints; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("k", 4096), ("bits", 4), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) < 2:
        sys.exit("busy_core.py needs two processors or more")
    context = multiprocessing.get_context("spawn")
    pipes, shared = {}, {}
    for threads in (1, len(processors)):
        pipes[threads], other = context.Pipe()
        arguments = (other, args.k, args.bits, threads)
        context.Process(target=work, args=arguments, daemon=True).start()
        shared[threads] = pipes[threads].recv()

    def sample(threads: int) -> float:
        pipes[threads].send(True)
        return pipes[threads].recv()

    rows, medians = [], {}
    for busy in (0, 1):
        spin = f"import os\nos.sched_setaffinity(0, [{processors[-1]}])\nwhile True: pass"
        spinning = subprocess.Popen([sys.executable, "-c", spin]) if busy else None
        samples: dict[int, list[float]] = {threads: [] for threads in pipes}
        try:
            for _ in range(args.rounds):
                for threads, values in samples.items():
                    values.append(sample(threads))
        finally:  # an interruption leaves no processor busy
            if spinning is not None:
                spinning.kill()
                spinning.wait()
        for threads, values in samples.items():
            medians[busy, threads] = statistics.median(values)
            rows.append((threads, busy, values))
    for pipe in pipes.values():
        pipe.send(False)
    one, whole = medians[1, 1], len(processors)
    bound = one / (whole - 0.5)
    for (busy, threads), median in medians.items():
        print(f"{threads} thread(s), {busy} busy processor(s): {median:7.1f} us")
    print(f"bound with the busy processor: {bound:.1f} us ({bound / medians[1, whole]:.0%} of it)")
    if args.output:
        from fdk_jax.benchmark import records

        case = {
            "suite": "kernels", "name": "codebook_int8_jit", "backend": "cpu", "m": 1, "k": args.k,
            "n": args.k, "bits": args.bits, "group_size": 64, "codebook": "nf4", "dtype": "bfloat16",
            "ops": 2 * args.k**2, "arithmetic": "int8",
        }  # fmt: skip
        with records.Writer(args.output) as writer:
            for threads, busy, values in rows:
                extra = {"threads": threads, "busy_cores": busy}
                row = records.make_row(shared[threads], case, records.statistics(values), extra)
                writer.write(row)


if __name__ == "__main__":
    main()
