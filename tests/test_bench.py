"""The benchmark: rows, sampling, interruption, tables, figures, the command line."""

import contextlib
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
import pytest

import fdk_jax
from fdk_jax.benchmark import (
    cases,
    kernels,
    plots,
    probes,
    records,
    repeating,
    runner,
    table,
    timing,
)
from fdk_jax.benchmark import models as models_suite
from fdk_jax.benchmark.cases import KernelCase
from fdk_jax.models import Generator, ModelConfig, random_model

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(backends=["xla"], m=[1], k=[64], n=["k"], bits=[4])


def bench(*flags: str, cwd: Path, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "bench.py"), *flags]
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=300, **options
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
    return records.make_row(case.fields(), measured, records.statistics([4.0, 5.0, 6.0]), values)


def suite(measure) -> types.SimpleNamespace:
    return types.SimpleNamespace(measure=measure)


# Rows


def test_row_has_every_key():
    made = row(extra=1)
    assert list(made)[: len(records.KEYS)] == list(records.KEYS)
    assert made["extra"] == 1 and made["schema"] == 2 and made["suite"] == "kernels"
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
        file.write('{"schema": 2, "torn')
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


def test_measurements_of_the_c_library_become_rows(tmp_path):
    program = ROOT / "cpu/build/fdk_bench"
    if not program.exists():
        pytest.skip(f"{program} is not built")
    path = tmp_path / "rows.jsonl"
    flags = "--m 1 --k 256 --n 64 --bits 4 --threads 1 --rounds 3 --round_ms 1 --rotate_mib 1"
    subprocess.run([program, *flags.split(), "--output", path], check=True, capture_output=True)
    rows = records.read([path])
    assert len(rows) == len(path.read_text().splitlines()) > 2
    for found in rows:
        assert list(found)[: len(records.KEYS)] == list(records.KEYS)
        assert len(found["samples_us"]) == 3 and found["status"] == "ok" and found["isa"]
        assert min(found["samples_us"]) <= found["median_us"] <= found["p95_us"]
    bounds = [r["bytes_rw"] / r["read_gb_s"] / 1e3 for r in rows if r["bits"]]
    assert [r["bound_us"] for r in rows if r["bits"]] == pytest.approx(bounds, rel=1e-3)


def test_pallas_without_a_gpu_is_skipped():
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has a GPU")
    case = KernelCase("pallas", 1, 64, 64, 4, 64, "uniform")
    (made,) = runner.measure(kernels, [case], timing.Session())
    assert made["status"] == "skipped" and "needs a GPU" in made["reason"]


@pytest.mark.parametrize("factor", [1.005, 0.995, 1.05])
def test_a_wrong_kernel_fails_and_is_not_timed(factor, monkeypatch):
    right = fdk_jax.matmul
    monkeypatch.setattr(
        fdk_jax, "matmul", lambda *a, **k: (right(*a, **k) * factor).astype(jnp.bfloat16)
    )
    monkeypatch.setattr(kernels, "build", lambda *_: pytest.fail("times a wrong kernel"))
    monkeypatch.setattr(probes, "bound", lambda *_: {"bound_us": 1.0})
    case = KernelCase("xla", 1, 128, 256, 4, 64, "uniform")
    (made,) = runner.measure(kernels, [case], timing.Session())
    assert made["status"] == "failed" and "worst element" in made["reason"]
    assert made["rel_rms_error"] == pytest.approx(abs(factor - 1), abs=0.005)


@pytest.mark.parametrize(
    "max_seconds, repetitions, expected",
    [(60.0, 15, (1, 15)), (-1.0, 15, (0, 10)), (-1.0, 2, (0, 2))],
)
def test_cases_of_a_group_are_sampled_in_turn(max_seconds, repetitions, expected):
    ran = []

    def measure(case, session):
        def run() -> float:
            ran.append(case.bits)
            return float(len(ran))

        samples = yield run
        return records.statistics(samples)

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
        return records.statistics(samples)

    made = cases.make_cases(**SMALL | dict(bits=[1, 4]))
    broken, good = runner.measure(suite(measure), made, timing.Session(3))
    assert broken["status"] == "failed" and "ZeroDivisionError" in broken["reason"]
    assert good["status"] == "ok" and len(good["samples_us"]) == 3


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3-9B", "'9B'"),
        ("custom-llama-4B-head3", "head have a width of \\(1, 2, 4, 8\\)"),
        ("qwen3-8B-tables16", "tables have a width of \\(1, 2, 4, 8\\)"),
        ("qwen3-8B-tables", "tables have a width of \\(1, 2, 4, 8\\)"),
        ("qwen3-8B-body1", "'8B-body1'"),
    ],
)
def test_names_that_are_like_those_of_shapes_are_refused(name, message):
    (case,) = models_suite.make_cases(models=[name], backends=["xla"], bits=[1], batches=[1])
    with pytest.raises(NotImplementedError, match=message):
        models_suite._config(case)


def test_a_text_that_repeats_itself_is_guessed():
    config = ModelConfig(64, 128, 192, 2, 4, 2, 32)
    model = random_model(config, bits=4, head_bits=4)
    generator = Generator(repeating.without_context(model))
    prompt = repeating.prompt(generator, [3, 5], 24)
    plain = generator.generate([prompt], max_tokens=24)
    guessed = generator.generate([prompt], max_tokens=24, speculate=5)
    assert plain.tokens == guessed.tokens == [prompt[2:-2]]
    assert plain.model_steps == 23 and guessed.model_steps <= 6


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


def test_a_signal_waits_until_a_row_is_written():
    written = []

    def measure(case, session):
        return {}
        yield

    def write(row):
        os.kill(os.getpid(), signal.SIGTERM)
        written.append(row["name"])

    made = cases.make_cases(**SMALL | dict(bits=[4, 1]))
    before = signal.getsignal(signal.SIGTERM)
    group = types.SimpleNamespace(measure=measure, group=lambda case: case.bits)
    assert runner.run(group, made, timing.Session(), write) == signal.SIGTERM
    assert written == [made[0].name] and signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_something_swallows_ends_the_run():
    written = []

    def measure(case, session):
        with contextlib.suppress(runner.Interrupted):  # as a destructor does
            os.kill(os.getpid(), signal.SIGINT)
        return {}
        yield

    made = cases.make_cases(**SMALL | dict(bits=[4, 1]))
    group = types.SimpleNamespace(measure=measure, group=lambda case: case.bits)
    assert runner.run(group, made, timing.Session(), written.append) == signal.SIGINT
    assert not written


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_interruption_loses_no_finished_row(signum, start, tmp_path):
    command = [sys.executable, str(ROOT / "bench.py"), "--m=1,2,3,4,5,6,7,8", "--k=256"]
    command += ["--bits=32,4", "--copies=2", "--repetitions=1000000", "--max_seconds=0.3"]
    command += ["--output=rows.jsonl"]
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    running = start(
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
    out, err = running.communicate(timeout=120)
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
