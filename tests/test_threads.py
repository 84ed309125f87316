"""Threads, fork, affinity and OpenMP's variables: equal results, no deadlock, no crowd of threads."""

import concurrent.futures
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import CPU_MISSING

import fdk_jax

pytestmark = pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))
ROOT = Path(__file__).parent.parent

PRELUDE = """
    import os, sys, threading, warnings
    warnings.simplefilter("ignore")
    import jax, jax.numpy as jnp, numpy as np
    import fdk_jax
    rng = np.random.default_rng(0)
    w = fdk_jax.prepare(fdk_jax.quantise(rng.standard_normal((512, 640)).astype(np.float32), 4), "cpu")
    x = jnp.asarray(rng.standard_normal((5, 640)), jnp.float32)
    run = jax.jit(lambda x: fdk_jax.matmul(x, w, backend="cpu"))
    threads = lambda: len(os.listdir("/proc/self/task"))
"""


def python(code: str, seconds: float = 120, cpus: str | None = None, **variables: str) -> str:
    """Output of a fresh Python process; a deadlock ends in a timeout."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | variables
    pin = ["taskset", "-c", cpus] if cpus is not None else []
    command = [*pin, sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(code)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def expected() -> str:
    return python("print(np.asarray(run(x)).tobytes().hex())")


def test_many_threads_and_several_programs(rng):
    """24 threads call 8 jitted programs at once; each call gets its own answer."""
    cases = []
    for i in range(8):
        w = fdk_jax.quantise(
            rng.standard_normal((64 + 16 * i, 200)).astype(np.float32), (1, 2, 4, 8)[i % 4]
        )
        w = fdk_jax.prepare(w, "cpu")
        x = jnp.asarray(rng.standard_normal((1 + i, 200)), jnp.float32)
        run = jax.jit(lambda x, w=w: fdk_jax.matmul(x, w, backend="cpu"))
        cases.append((run, x, np.asarray(run(x))))

    def work(i: int) -> bool:
        run, x, y = cases[i % 8]
        # The order in which rows of x are summed does not depend on the number of threads.
        return all(np.array_equal(run(x), y) for _ in range(25))

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        assert all(pool.map(work, range(48)))


def test_calls_from_several_threads_while_compiling(rng):
    """Tracing, compiling, preparing and layout conversion in several threads at once."""
    weights = rng.standard_normal((6, 40, 128)).astype(np.float32)

    def work(i: int) -> np.ndarray:
        w = fdk_jax.prepare(fdk_jax.quantise(weights[i % 6], 4), "cpu")
        return np.asarray(fdk_jax.matmul(jnp.ones((1 + i // 6, 128)), w))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(24)))
    for i, y in enumerate(results):
        assert np.array_equal(y, np.broadcast_to(results[i % 6][0], y.shape))


def test_fork_after_import_and_after_work(expected):
    """A child of fork() converts and multiplies outside of JAX, whose own threads fork leaves behind."""
    out = python(
        """
        from fdk_jax.product import cpu_backend
        library = cpu_backend.library()
        packed = np.arange(64 * 32, dtype=np.uint8)
        scales = np.ones(64 * 4, np.uint8)
        def convert():
            tiled, tiled_scales = np.empty(64 * 32, np.uint8), np.empty(64 * 4, np.uint8)
            library.to_tiled(packed, scales, tiled, tiled_scales, bits=4, group_size=64,
                             out_features=64, in_features=64, scale_size=4)
            return tiled.tobytes()
        def child_agrees(before):
            pid = os.fork()
            if pid == 0:
                os._exit(0 if before is None or convert() == before else 1)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        before = None
        if child_agrees(None):
            before = convert()
        fine = all(child_agrees(before) for _ in range(20))
        run(x)
        fine &= all(child_agrees(before) for _ in range(20))
        print(fine, np.asarray(run(x)).tobytes().hex())
        """
    )
    fine, got = out.split()
    assert fine == "True"
    assert got == expected.strip()


@pytest.mark.parametrize(
    "variables",
    [
        dict(OMP_NUM_THREADS="1"),
        dict(OMP_NUM_THREADS="999", OMP_DYNAMIC="true", OMP_NESTED="true"),
        dict(OMP_NUM_THREADS="2,3", OMP_SCHEDULE="nonsense", OMP_PROC_BIND="spread"),
        dict(OMP_NUM_THREADS="0", OMP_WAIT_POLICY="active", OMP_THREAD_LIMIT="1"),
        # LLVM's OpenMP runtime aborts on each of these: the module must not bring one into the process.
        dict(OMP_NUM_THREADS="many"),
        dict(OMP_NUM_THREADS="-3"),
        dict(OMP_NUM_THREADS="99999999999999999999"),
        dict(OMP_STACKSIZE="1"),
        dict(KMP_AFFINITY="none"),
        dict(FDK_NUM_THREADS="100000", FDK_CPU_ISA="no such ISA"),
        dict(FDK_NUM_THREADS="-1", FDK_CPU_ISA=""),
        dict(FDK_NUM_THREADS="1", FDK_CPU_ISA="scalar"),
    ],
    ids=lambda v: ",".join(f"{key}={value}" for key, value in v.items()),
)
def test_odd_variables(variables, expected):
    out = python(
        """
        before = threads()
        y = run(x)
        others = [threading.Thread(target=lambda: [run(x) for _ in range(10)]) for _ in range(4)]
        for t in others: t.start()
        for t in others: t.join()
        fdk_jax.prepare(fdk_jax.prepare(w, "xla"), "cpu")
        print(threads() - before, np.asarray(y).tobytes().hex())
        """,
        **variables,
    )
    new_threads, got = out.split()
    # XLA's own pools may grow while the program compiles; a team of the library's never exceeds the cores.
    assert int(new_threads) <= 4 * (os.cpu_count() or 1) + 8
    same = np.frombuffer(bytes.fromhex(got), np.float32)
    wanted = np.frombuffer(bytes.fromhex(expected), np.float32)
    if "scalar" in variables.values():
        assert np.allclose(same, wanted, rtol=1e-4, atol=1e-4)
    else:
        assert np.array_equal(same, wanted)


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        (dict(OMP_NUM_THREADS="1"), 1),
        (dict(OMP_NUM_THREADS="1,4"), 1),
        (dict(OMP_NUM_THREADS="none"), None),
        (dict(OMP_NUM_THREADS="1", FDK_NUM_THREADS="999"), None),
        (dict(FDK_NUM_THREADS="1", OMP_NUM_THREADS="999"), 1),
    ],
    ids=str,
)
def test_the_number_of_threads(variables, wanted):
    """FDK_NUM_THREADS before OMP_NUM_THREADS, never more than the processors of the process."""
    code = "from fdk_jax.product import cpu_backend; print(cpu_backend.library().num_threads())"
    assert int(python(code, **variables)) == (wanted or len(os.sched_getaffinity(0)))


def test_a_process_that_may_start_no_threads():
    """Memory for another stack is refused: the conversion runs on the calling thread."""
    out = python(
        """
        import resource
        from fdk_jax.product import cpu_backend
        library = cpu_backend.library()
        n, k = 4096, 512
        packed, scales = np.arange(n * k // 2, dtype=np.uint64).astype(np.uint8), np.ones(n * 8 * 4, np.uint8)
        def convert():
            tiled, tiled_scales = np.empty_like(packed), np.empty_like(scales)
            library.to_tiled(packed, scales, tiled, tiled_scales, bits=4, group_size=64,
                             out_features=n, in_features=k, scale_size=4)
            return tiled
        expected = convert()
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (6 << 20), resource.RLIM_INFINITY))
        done, refused = threading.Event(), False
        while not refused:  # until the stacks that the C library keeps are used up, too
            try:
                threading.Thread(target=done.wait, daemon=True).start()
            except RuntimeError:
                refused = True
        print(np.array_equal(convert(), expected))
        done.set()
        """,
        FDK_NUM_THREADS="2",
    )
    assert out.split() == ["True"]


def test_a_process_pinned_to_one_core(expected):
    out = python(
        """
        from fdk_jax.product import cpu_backend
        print(cpu_backend.library().num_threads(), np.asarray(run(x)).tobytes().hex())
        """,
        cpus=str(min(os.sched_getaffinity(0))),
        FDK_NUM_THREADS="64",
    )
    usable, got = out.split()
    assert usable == "1"
    assert got == expected.strip()
