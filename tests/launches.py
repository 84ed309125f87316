"""Which tests of the GPU kernels a change is for: what each of them launches, recorded without a GPU.

    python tests/launches.py record new.json --target sm_80
    python tests/launches.py record old.json --target sm_80 --tree ../of_another_commit
    python tests/launches.py changed old.json new.json >tests.txt
    FDK_JAX_TARGET=sm_80 python -m pytest @tests.txt

`record` runs tests/test_gpu.py up to each test's first launch of a kernel, in minutes; `changed` prints the
tests whose kernel none of the older file's had: PTX (comments aside), grid, warps and way of launching. Tests
that launch several kernels are always among them. The Mosaic kernel's tests (test_gpu_many.py) are not looked
at: what it is made of, JAX knows when it compiles.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path

# Tests of one kernel each, by the beginnings of their names.
SINGLE = (
    *(
        "test_tuned_",
        "test_shapes",
        "test_sums_",
        "test_copies_",
        "test_groups_",
        "test_every_small_",
        "test_large_",
    ),
    *("test_chains", "test_attention", "test_non_finite_"),
)


class _Launched(Exception):
    """The first launch: nothing after it is of interest."""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _record(tree: Path, target: str, arguments: list[str]) -> dict[str, str]:
    """A digest of what each test of a tree launches first, by the test's name; empty if it launches nothing."""
    os.chdir(tree)
    sys.path[:0] = [str(tree), str(tree / "tests")]
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    import jax
    import pytest
    from jax.experimental import pallas as pl

    import pallas_kernels.target
    from pallas_kernels import xla_call
    from pallas_kernels.ptx import shared_bytes

    gpu = pallas_kernels.target.Target.parse(target, pallas_kernels.target.H200)
    pallas_kernels.target._at_hand = lambda: gpu
    jax.default_backend = lambda: "gpu"
    found: dict[str, str] = {}
    current = [""]

    def launched(*what) -> None:
        found[current[0]] = _digest(repr(what))
        raise _Launched

    def ptx_call(
        source, operands, outputs, target, *, grid, num_warps, name, cluster=1, aliases=None
    ):
        del operands, outputs, aliases
        small = shared_bytes(source) <= xla_call._MAX_SHARED and num_warps.bit_count() == 1
        whole = not (small and cluster == 1)
        way = target.ptx_target(wgmma="wgmma." in source) if whole else "in a Triton kernel"
        launched(name, _digest(re.sub(r"\s*//.*", "", source)), grid, num_warps, cluster, way)

    def pallas_call(*arguments, **options):
        call = original(*arguments, **options)
        return lambda *operands: launched(
            re.sub(r"0x[0-9a-f]+|\S*\.py:\d+", "", str(jax.make_jaxpr(call)(*operands)))
        )

    original, pl.pallas_call, xla_call.ptx_call = pl.pallas_call, pallas_call, ptx_call
    _no_values()

    class Recorder:
        def pytest_runtest_setup(self, item):
            current[0] = item.nodeid
            found[item.nodeid] = ""

        def pytest_runtest_logreport(self, report):
            if report.skipped:
                found.pop(report.nodeid, None)

        @pytest.hookimpl(trylast=True)  # after `-k`
        def pytest_collection_modifyitems(self, items):
            found.update({item.nodeid: "" for item in items})
            items[:] = [item for item in items if item.name.startswith(SINGLE)]

    options = ["-q", "--tb=no", "--no-summary", "-p", "no:cacheprovider", "-o", "addopts="]
    pytest.main([*options, "tests/test_gpu.py", *arguments], plugins=[Recorder()])
    return found


def _no_values() -> None:
    """Products of zeros, of the right shapes: to draw, pack and multiply takes ten times as long."""
    import jax.numpy as jnp
    import numpy as np
    import planar

    from pallas_kernels.case import Case

    def product(
        rng,
        m,
        n,
        k,
        bits,
        group_size,
        dtype,
        codebooks=1,
        scale=1.0,
        uniform=False,
        scale_dtype=None,
    ):
        del rng, scale
        dtype, kind = jnp.dtype(dtype), jnp.dtype(scale_dtype or dtype)
        case = Case(m, n, k, bits, group_size, codebooks, dtype, kind, None, dtype, uniform)
        shapes = (
            *(((m, k), dtype), ((case.tiles, case.blocks, 2, 8, 32), np.uint16)),
            *(((case.tiles, case.scale_fours, 64), kind), ((codebooks, 2**bits), np.float32)),
        )
        arrays = tuple(jnp.asarray(np.zeros(*shape)) for shape in shapes)
        spec = dict(bits=bits, group_size=group_size, out_features=n)
        return arrays, spec, planar.Wanted(np.zeros((m, k)), [np.zeros((1, 1))], bits)

    planar.product = product


def changed(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Tests of the newer record that launch what no test of the older one does."""
    known = {launch for launch in old.values() if launch}
    return [name for name, launch in new.items() if launch not in known]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record", help="what tests launch")
    record.add_argument("output", type=Path)
    record.add_argument("--target", default="sm_90", help="architecture")
    record.add_argument("--tree", type=Path, default=Path(__file__).parent.parent)
    compare = commands.add_parser("changed", help="tests whose kernels changed")
    compare.add_argument("files", type=Path, nargs=2, metavar=("OLD", "NEW"))
    options, arguments = parser.parse_known_args()
    if options.command == "record":
        output = options.output.resolve()
        found = _record(options.tree.resolve(), options.target, arguments)
        output.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")
    else:
        old, new = (json.loads(file.read_text(encoding="utf-8")) for file in options.files)
        print("\n".join(changed(old, new)))


if __name__ == "__main__":
    main()
