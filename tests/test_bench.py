"""The benchmark: cases, oracle, the timed loop, rows, interruption, the command line."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import fdk_jax
import pallas_kernels
from fdk_jax.benchmark import (
    cases,
    environment,
    inputs,
    kernels,
    plots,
    probes,
    records,
    runner,
    table,
    timing,
)
from fdk_jax.benchmark.cases import KernelCase

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(backends=["xla"], m=[1], k=[64], n=["k"], bits=[4])


def bench(*flags: str, cwd: Path, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "bench.py"), *flags]
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=120, **options
    )


def row(**values) -> dict:
    case = KernelCase("xla", 1, 64, 64, 4, 64, "uniform")
    measured = dict(
        bytes_rw=4096,
        ops=8192,
        read_gb_s=10.0,
        copy_gb_s=8.0,
        matmul_gflop_s=100.0,
        bound_us=1.0,
        rel_rms_error=1e-3,
        device="Device",
    )
    return records.make_row(case.fields(), measured, timing.statistics([4.0, 5.0, 6.0]), values)


def suite(measure) -> types.SimpleNamespace:
    return types.SimpleNamespace(measure=measure)


# Cases


def test_cases_cover_every_combination_once():
    made = cases.make_cases(
        backends=["cpu", "xla"],
        m=[1, 4],
        k=[64, 128],
        n=["k", 64],
        bits=[16, 32, 4, 1],
        dtypes=["bfloat16", "float32"],
        arithmetics=["exact", "int8"],
    )
    assert len({c.name for c in made}) == len(made)
    # k = 64 twice names the same size: 3 shapes. Dense: bfloat16, float32. Others: 3 backends x 2 dtypes.
    assert len(made) == 2 * 3 * (2 + 2 * 2 * 3)
    assert {(c.k, c.n) for c in made} == {(64, 64), (128, 128), (128, 64)}
    for case in made:
        assert (case.bits == 32) == (case.dense and case.dtype == "float32")
        assert case.arithmetic == "exact" or case.backend == "cpu"
        assert KernelCase.parse(case.name) == case


@pytest.mark.parametrize(
    "name",
    [
        "",
        "xla-b4-m1-k64-n64-bfloat16",
        "xla-b16-m1-k64-n64-g64-uniform-bfloat16",
        "xla-b3-m1-k64-n64-g64-uniform-bfloat16",
        "xla-b4-m0-k64-n64-g64-uniform-bfloat16",
        "xla-b4-m1-k64-n64-g64-uniform-bfloat16-",
    ],
)
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        KernelCase.parse(name)


def test_select_includes_and_excludes():
    made = cases.make_cases(**SMALL | dict(bits=[16, 4, 1], m=[1, 4]))
    names = [c.name for c in cases.select(made, include="-b(4|1)-", exclude="-m4-")]
    assert names == [
        "xla-b4-m1-k64-n64-g64-uniform-bfloat16",
        "xla-b1-m1-k64-n64-g64-uniform-bfloat16",
    ]
    assert cases.select(made) == made


# Inputs and the oracle


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("k, group_size", [(64, 64), (37, 16), (5, 64)])
def test_oracle_reads_the_format(bits, k, group_size, rng):
    case = KernelCase("xla", 3, k, 7, bits, group_size, "kmeans", "float32")
    w = inputs.quantised_weight(case, rng)
    w.validate()
    x = inputs.activations(case, rng)
    # Every weight by the definition of the format, one at a time.
    expected = np.zeros((3, 7))
    packed, scales, codebook = (np.asarray(a) for a in (w.packed, w.scales, w.codebook))
    for n, i in itertools.product(range(7), range(k)):
        digits = "".join(f"{byte:08b}" for byte in packed[n])
        code = int(digits[i * bits : (i + 1) * bits], 2)
        weight = float(scales[n, i // group_size]) * float(codebook[code])
        expected[:, n] += x[:, i].astype(np.float64) * weight
        if i == k - 1:
            assert not digits[k * bits :].strip("0"), "padding must be zero codes"
    np.testing.assert_allclose(inputs.oracle(x, w), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", [16, 1, 4])
def test_products_keep_their_size(bits, rng):
    dense = bits == 16
    case = KernelCase("xla", 4, 512, 512, bits, None if dense else 64, None if dense else "uniform")
    w = inputs.dense_weight(case, rng) if dense else inputs.quantised_weight(case, rng)
    y = inputs.oracle(inputs.activations(case, rng), w)
    assert 0.8 < np.sqrt(np.mean(np.square(y))) < 1.25


def test_nf4_has_four_bits(rng):
    with pytest.raises(NotImplementedError, match="2-bit"):
        inputs.quantised_weight(KernelCase("xla", 1, 64, 64, 2, 64, "nf4"), rng)


def test_relative_error_sees_wrong_and_missing_values(rng):
    expected = rng.standard_normal((4, 5))
    assert inputs.relative_rms_error(expected * 1.01, expected) == pytest.approx(0.01)
    broken = expected.copy()
    broken[1, 2] = np.nan
    assert inputs.relative_rms_error(broken, expected) == math.inf
    with pytest.raises(ValueError, match="shape"):
        inputs.relative_rms_error(expected.T, expected)


# The loop


@pytest.mark.parametrize("link_every", [True, False])
def test_loop_runs_every_call_in_turn(link_every, rng):
    x = jnp.asarray(rng.standard_normal((2, 8)), jnp.float32)
    copies = [jnp.float32(v) for v in (0.5, 1.25, 2.0)]
    program = timing.loop_program(
        lambda x, w: x * jnp.float32(0.5) + w, x, copies, loops=4, link_every=link_every
    )
    expected = np.asarray(x, np.float64)
    for _, w in itertools.product(range(4), copies):
        expected = expected * 0.5 + float(w)
    last, results = jax.jit(program)(x, copies)
    np.testing.assert_allclose(last, expected, rtol=1e-6)
    assert results == []


@pytest.mark.parametrize("link_every", [True, False])
def test_loop_links_results_of_another_shape(link_every, rng):
    x = np.asarray(rng.standard_normal((2, 8)), np.float32)
    copies = [jnp.asarray(rng.standard_normal((8, 6)) / 3, jnp.float32) for _ in range(3)]
    program = timing.loop_program(
        lambda x, w: x @ w, jnp.asarray(x), copies, loops=3, link_every=link_every
    )
    last, results = jax.jit(program)(x, copies)
    for _ in range(3):
        expected = []
        for i, w in enumerate(copies):
            expected.append(x @ np.asarray(w))
            if link_every or i == 2:
                x[0, 0] = expected[-1][0, 0]
    np.testing.assert_allclose(last, x, rtol=1e-4)
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [256, 384])
def test_nothing_is_hoisted_out_of_the_compiled_loop(n):
    work = kernels.prepare(KernelCase("xla", 1, 256, n, 4, 64, "uniform"))
    copies = timing.copy_weight(work.weight, 3)
    assert len({w.packed.unsafe_buffer_pointer() for w in copies}) == 3
    program = timing.loop_program(work.step, work.x, copies, loops=5, link_every=True)
    compiled = jax.jit(program).lower(work.x, tuple(copies)).compile().as_text()
    computations = re.split(r"\n(?=\S)", compiled)
    entry = next(c for c in computations if c.startswith("ENTRY"))
    bodies = [c for c in computations if len(re.findall(r" dot\(", c)) == 3]
    assert len(bodies) == 1 and not re.search(r" dot\(", entry)
    assert not re.search(r"\bcopy\(.*u8\[", compiled), "weights must not be copied"
    unpacked = rf"[us]\d+\[{n},\d+,2\]|(f32|bf16)\[{n},256\]"
    assert not re.search(unpacked, entry), "nothing may be dequantised outside of the loop"
    assert re.search(unpacked, bodies[0])


@pytest.mark.parametrize("m", [1, 16])
def test_a_gpu_runs_nothing_but_the_kernels(m, rng):
    case = KernelCase("pallas", m, 512, 512, 4, 64, "uniform")
    weight = fdk_jax.prepare(inputs.quantised_weight(case, rng), backend="pallas")
    x, copies = jnp.asarray(inputs.activations(case, rng)), timing.copy_weight(weight, 5)
    facts = dict(bits=4, group_size=64, out_features=512, uniform=True)

    def step(x, w):
        return pallas_kernels.matmul(x, w.packed, w.scales, w.codebook, **facts)

    program = timing.loop_program(step, x, copies, loops=7, link_every=False)
    h200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=h200)):
        traced = jax.jit(program).trace(x, tuple(copies))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    body = text[text.index("stablehlo.while") :]
    assert len(re.findall(r"@__gpu\$xla\.gpu\.triton", body)) == 5
    # Per loop: its counter. Per product: one kernel and views of its operands.
    free = {"while", "return", "constant", "compare", "add", "optimization_barrier", "reshape"}
    assert set(re.findall(r"stablehlo\.(\w+)", body)) <= free | {"custom_call"}


def test_statistics_keep_every_sample():
    found = timing.statistics([3.0, 1.0, 2.0, 10.0])
    assert found["samples_us"] == [3.0, 1.0, 2.0, 10.0]
    assert (found["median_us"], found["mean_us"]) == (2.5, 4.0)
    assert found["stderr_us"] == pytest.approx(np.std([3, 1, 2, 10], ddof=1) / 2, abs=1e-4)
    assert found["p95_us"] == pytest.approx(8.95)
    assert timing.statistics([1.0])["stderr_us"] is None


@pytest.mark.parametrize(
    "max_seconds, repetitions, expected", [(60.0, 5, (2, 5)), (-1.0, 5, (0, 3)), (-1.0, 2, (0, 2))]
)
def test_cases_of_a_group_are_sampled_in_turn(max_seconds, repetitions, expected):
    ran = []

    def measure(case, session):
        def run() -> float:
            ran.append(case.bits)
            return float(len(ran))

        samples = yield run
        return timing.statistics(samples)

    session = timing.Session(repetitions, None, max_seconds)
    made = cases.make_cases(**SMALL | dict(bits=[4, 1]))
    rows = list(runner.measure(suite(measure), made, session))
    warm, kept = expected
    assert ran == [4, 1] * (warm + kept)
    for i, found in enumerate(rows):
        assert found["samples_us"] == [2.0 * (warm + j) + i + 1 for j in range(kept)]


def test_a_case_that_breaks_while_sampled_leaves_the_others_alone():
    def measure(case, session):
        samples = yield lambda: 1.0 if case.bits == 4 else 1 / 0
        return timing.statistics(samples)

    made = cases.make_cases(**SMALL | dict(bits=[1, 4]))
    broken, good = runner.measure(suite(measure), made, timing.Session(3))
    assert broken["status"] == "failed" and "ZeroDivisionError" in broken["reason"]
    assert good["status"] == "ok" and len(good["samples_us"]) == 3


def test_more_copies_than_caches_hold():
    work = kernels.prepare(KernelCase("xla", 1, 1024, 1024, 32, dtype="float32"))
    held = kernels.copies_for(work) * work.weight_bytes
    assert held >= 2 * environment.cache_bytes(work.device) or kernels.copies_for(work) == 96
    assert held <= 300 << 20


# Rows


def test_row_has_every_key():
    made = row(extra=1)
    assert list(made)[: len(records.KEYS)] == list(records.KEYS)
    assert made["extra"] == 1 and made["schema"] == 1 and made["suite"] == "kernels"
    with pytest.raises(ValueError, match="must say why"):
        row(status="failed")
    with pytest.raises(ValueError, match="status='good'"):
        row(status="good")


def test_writer_appends_and_mends_a_torn_line(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    with records.Writer(path) as writer:
        writer.write(row(rel_rms_error=math.inf))
        assert len(records.read([path])) == 1, "a row must be in the file before the next one"
    with open(path, "a") as file:
        file.write('{"schema": 1, "torn')
    with records.Writer(path) as writer:
        writer.write(row())
    first, second = records.read([path])
    assert first["rel_rms_error"] is None and second["rel_rms_error"] == 1e-3
    assert path.read_bytes().endswith(b"}\n")


def test_reading_says_which_file_is_wrong(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"a": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"other\.jsonl holds no rows"):
        records.read([path])


@pytest.mark.parametrize(
    "error, status, reason",
    [
        (NotImplementedError("no such\nkernel"), "skipped", "no such"),
        (ValueError("bad"), "failed", "ValueError: bad"),
        (MemoryError(), "failed", "MemoryError: MemoryError"),
    ],
)
def test_cases_that_cannot_run_become_rows(error, status, reason):
    def measure(case, session):
        raise error
        yield

    case = KernelCase("xla", 1, 64, 64, 4, 64, "uniform")
    (made,) = runner.measure(suite(measure), [case], timing.Session())
    assert (made["status"], made["reason"]) == (status, reason)
    assert made["name"] == case.name and made["device"] and made["samples_us"] is None


def test_pallas_without_a_gpu_is_skipped():
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has a GPU")
    case = KernelCase("pallas", 1, 64, 64, 4, 64, "uniform")
    (made,) = runner.measure(kernels, [case], timing.Session())
    assert made["status"] == "skipped" and "needs a GPU" in made["reason"]


def test_a_wrong_kernel_fails_and_is_not_timed(monkeypatch):
    right = fdk_jax.matmul
    monkeypatch.setattr(fdk_jax, "matmul", lambda *a, **k: right(*a, **k) * jnp.bfloat16(1.05))
    monkeypatch.setattr(kernels, "build", lambda *_: pytest.fail("times a wrong kernel"))
    monkeypatch.setattr(probes, "bound", lambda *_: {"bound_us": 1.0})
    case = KernelCase("xla", 1, 64, 64, 4, 64, "uniform")
    (made,) = runner.measure(kernels, [case], timing.Session())
    assert made["status"] == "failed" and "relative RMS error 0.0" in made["reason"]
    assert made["rel_rms_error"] == pytest.approx(0.05, abs=0.01)


def test_outside_git_there_is_no_commit(monkeypatch):
    monkeypatch.setattr(environment, "_output", lambda command: None)
    assert environment.commit.__wrapped__() == (None, None)
    monkeypatch.setattr(environment, "_output", lambda command: "/some/other/project\n")
    assert environment.commit.__wrapped__() == (None, None)


# Table and figures


def test_speed_up_is_over_the_fastest_dense_row():
    dense = [row(bits=16, median_us=20.0), row(bits=32, median_us=10.0)]
    other = row(bits=16, median_us=1.0, m=2)
    assert table.speed_up(row(median_us=5.0), [*dense, other]) == 2.0
    assert table.speed_up(row(median_us=5.0), [other]) is None
    assert table.speed_up(row(median_us=None), dense) is None
    assert table.share_of_bound(row(median_us=4.0, bound_us=1.0)) == 0.25
    assert table.bandwidth(row(read_gb_s=3.0, copy_gb_s=4.0, threads=2)) == 3.0
    assert table.bandwidth(row(read_gb_s=3.0, copy_gb_s=4.0)) == 4.0


def test_table_shows_rows_that_were_not_measured():
    skipped = records.make_row(
        KernelCase("pallas", 1, 64, 64, 4, 64, "uniform").fields(),
        {"status": "skipped", "reason": "no GPU", "device": "Device"},
    )
    text = table.render([row(), skipped])
    assert re.search(r"xla-b4\S+ +5\.00 +5\.90 +0\.8 +1\.6 +20% +1\.0e-03\n", text)
    assert "skipped: no GPU" in text and "measured read 10 GB/s" in text
    model = row(suite="models", model="tiny", batch=1, tokens_per_s=250.0, peak_bytes=2e9)
    assert "250.0" in table.render([model])


def test_figures_of_any_rows(tmp_path):
    rows = [row(bits=b, m=m, median_us=b * m / 4) for b in (16, 4, 1) for m in (1, 4, 16)]
    rows.append(records.make_row(row(), {"status": "failed", "reason": "x", "median_us": None}))
    rows += [
        row(suite="models", model=model, batch=b, tokens_per_s=100.0 * b)
        for model in ("4B", "12B")
        for b in (1, 4)
    ]
    paths = plots.draw(rows, tmp_path / "a.b")
    names = ["a.b-speedup.png", "a.b-roofline.png", "a.b-models.png"]
    assert [p.name for p in paths] == names
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)
    with pytest.raises(ValueError, match="no measured row"):
        plots.draw(rows[9:10], tmp_path / "none")


def test_figures_name_the_missing_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"fdk-jax\[plot\]"):
        plots.draw([row()], tmp_path / "a")


# The command line


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--nonsense"], "nonsense"),
        (["--backend=tpu"], "pallas, cpu, xla"),
        (["--m=0"], "positive integers"),
        (["--m="], "positive integers"),
        (["--n=j"], '"k"'),
        (["--bits=3"], "1, 2, 4, 8, 16, 32"),
        (["--dtype=bf16"], "bfloat16, float16, float32"),
        (["--include=("], "regular expression"),
        (["--include=nothing"], "no case is left"),
        (["--copies=x"], "copies"),
        (["1", "4"], "unexpected arguments 1 4"),
        (["--plot", "absent.jsonl"], "absent.jsonl"),
        (["--profile=x"], "'x' is not the name"),
        (["--threads=100000"], "100000"),
        (["--output=/dev/null/rows.jsonl"], "/dev/null/rows.jsonl"),
    ],
)
def test_wrong_flags_give_one_line(flags, message, tmp_path):
    done = bench(*flags, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("bench.py: error: ") and message in lines[0]


def test_list_has_the_default_cases(tmp_path):
    done = bench("--list", "--backend=pallas", cwd=tmp_path)
    names = done.stdout.split()
    assert len(names) == 15 and done.returncode == 0
    assert names[:3] == [
        "xla-b16-m1-k4096-n4096-bfloat16",
        "pallas-b4-m1-k4096-n4096-g64-uniform-bfloat16",
        "pallas-b1-m1-k4096-n4096-g64-uniform-bfloat16",
    ]
    assert not list(tmp_path.iterdir())


def test_a_run_from_flags_to_figures(tmp_path):
    flags = "--backend=xla,pallas --m=1 --k=128 --n=k,96 --bits=32,4,1 --repetitions=4 --copies=3"
    done = bench(*flags.split(), "--plot", "--output=rows.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 5
    for made in rows:
        assert list(made)[: len(records.KEYS)] == list(records.KEYS)
        assert made["name"] in done.stdout
        if made["backend"] == "pallas":
            assert made["status"] == "skipped" and made["reason"]
            continue
        assert made["status"] == "ok" and made["reason"] is None
        assert len(made["samples_us"]) == 4 and min(made["samples_us"]) > 0
        assert made["rel_rms_error"] <= 1e-2 and made["threads"] and made["driver"] is None
        assert made["ops"] == 2 * made["k"] * made["n"]
        weight = made["n"] * made["k"] * made["bits"] / 8
        if made["bits"] < 16:
            weight += made["n"] * made["k"] / 64 * 2 + 2 ** made["bits"] * 4
        itemsize = 4 if made["bits"] == 32 else 2
        assert made["bytes_rw"] == weight + (made["k"] + made["n"]) * itemsize
        bound = max(made["bytes_rw"] / made["read_gb_s"], made["ops"] / made["matmul_gflop_s"])
        assert made["bound_us"] == pytest.approx(bound / 1e3, rel=1e-2, abs=1e-3)
    assert (tmp_path / "rows-speedup.png").exists()
    drawn = bench("--plot", "rows.jsonl", cwd=tmp_path)
    assert drawn.stdout.split() == ["figure", "rows-speedup.png", "figure", "rows-roofline.png"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interruption_loses_no_finished_row(signum, tmp_path):
    command = [sys.executable, str(ROOT / "bench.py"), "--m=1,2,3,4,5,6,7,8", "--k=256"]
    command += ["--bits=32,4", "--copies=2", "--repetitions=1000000", "--max_seconds=1"]
    command += ["--output=rows.jsonl"]
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr is not None
    finished = running.stderr.readline()
    assert "[1/16]" in finished
    running.send_signal(signum)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 128 + signum and "Traceback" not in err
    rows = records.read([tmp_path / "rows.jsonl"])
    assert 1 <= len(rows) < 16 and all(r["status"] == "ok" for r in rows)
    assert f"{len(rows)} of 16 rows" in out and rows[-1]["name"] in out


def test_profile_leaves_a_trace(tmp_path):
    name = "xla-b32-m1-k128-n128-float32"
    done = bench(f"--profile={name}", "--copies=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = Path(".bench/profiles") / name
    assert str(folder) in done.stdout and "mean us" in done.stdout
    assert list((tmp_path / folder).rglob("*.xplane.pb"))


# Committed results


@pytest.mark.parametrize("path", sorted((ROOT / "results").rglob("*.jsonl")), ids=lambda p: p.name)
def test_committed_rows_follow_the_schema(path):
    for line in path.read_text().splitlines():
        made = json.loads(line)
        assert not set(records.KEYS) - made.keys() and made["schema"] == records.SCHEMA
        assert made["status"] in records.STATUSES and made["device"]
        if made["status"] == "ok" and made["suite"] in ("kernels", "models"):
            assert made["samples_us"] and made["median_us"] > 0
