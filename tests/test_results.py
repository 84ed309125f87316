"""Committed rows name a source that the history has, and the tables in the documents are those of the rows."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from fdk_jax.benchmark import (
    adopt,
    cpu_tables,
    group_table,
    many_table,
    model_table,
    quantising,
    records,
    report,
    source,
)
from fdk_jax.format.quantisation import DEFAULTS, SCALES, resolve_auto

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "results").rglob("*.jsonl"))
MEASURED = [path for path in FILES if "modelled" not in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", MEASURED, ids=lambda p: p.name)
def test_rows_follow_the_schema_and_have_samples(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert not set(records.KEYS) - row.keys() and row["schema"] == records.SCHEMA
        assert row["commit"] and row["device"]
        adopt.check_row(row)


def test_every_row_names_a_source_in_the_history():
    shallow = source.git(ROOT, "rev-parse", "--is-shallow-repository")
    if shallow is None or shallow.strip() == "true":
        pytest.skip("there is no git here, or a history that was cut")
    named = {(row["digest"], row["commit"]) for path in MEASURED for row in records.read([path])}
    present = source.find({digest for digest, _ in named})
    for digest, commit in named:
        assert digest in present, f"no commit has the source {digest}"
        assert source.digest_of(commit) == digest


@pytest.mark.parametrize("name", report.FILES)
def test_tables_are_those_of_the_rows(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- report: " in text
    assert report.filled(text, report.rows()) == text, "run python -m fdk_jax.benchmark.report"


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md"])
def test_no_figure_outside_of_the_tables(name):
    """Words about speed and quality have a row: numbers with such units stand in written tables only."""
    text = (ROOT / name).read_text(encoding="utf-8")
    rest = re.sub(r"<!-- report: .*?<!-- end -->", "", text, flags=re.DOTALL)
    units = "us|ms|[GT]B/s|tokens a second|tokens/s|TFLOP/s|nats|[MG]B"
    assert not re.findall(rf"\d+(?:\.\d+)? ?(?:{units})\b|\d%", rest)


def test_a_table_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="no table 'speed'"):
        report.filled("<!-- report: speed -->\n<!-- end -->", [])


def _kernel_row(device, us, m=1, group_size=64, **others):
    fields = {"suite": "kernels", "device": device, "k": 64, "n": 32, "m": m, "bits": 4}
    fields |= {"dtype": "bfloat16", "commit": "abcdefgh", "group_size": group_size}
    fields |= {"backend": "pallas", "arithmetic": "exact", "rel_rms_error": 0.001}
    return fields | {"median_us": us, "samples_us": [us] * 3, "bound_us": 1.0} | others


def test_speed_ups_are_over_bfloat16_of_the_same_product():
    own = dict(codebook="kmeans", driver="1", date="2")
    rows = [
        _kernel_row("G", 6.0, bits=16, group_size=None, backend="xla", driver="1", date="1"),
        _kernel_row("G", 1.0, **own | dict(date="3", commit="another")),
        _kernel_row("G", 2.0, **own),
        _kernel_row("G", 4.0, **own | dict(bits=1)),
        _kernel_row("G", 1.0, **own | dict(codebook="uniform")),
        _kernel_row("G", 1.0, m=7, **own),
        _kernel_row("G", 1.0, arithmetic="int8", **own),
        _kernel_row("a CPU", 1.0, **own | dict(driver=None)),
    ]
    text = many_table.speed_ups(rows)
    assert "for 4 / 1 bits" in text and text.endswith("| 1 | 3.00 / 1.50 |")
    # Starts of 474 us: 1% of one of the two samples, and 5% of the other.
    rows[0] |= dict(calls=7900, copies=2)
    for calls, shown in ((4740, "3.00~ / 1.50"), (11850, "3.00 / 1.50")):
        rows[2] |= dict(calls=calls, copies=2)
        rows[3] |= dict(calls=11850, copies=2)
        assert many_table.speed_ups(rows).endswith(f"| 1 | {shown} |")
    assert many_table.speed_ups(rows[1:]) == "(No rows yet.)"


def test_kernels_of_other_gpus_stand_beside_the_gpus_own():
    rows = [
        _kernel_row("G", 2.0),
        _kernel_row("G", 4.0, group_size=32),
        _kernel_row("G as sm_80", 3.0),
        _kernel_row("G as sm_80", 5.0, group_size=32),
        _kernel_row("G as sm_89", 2.5),
        _kernel_row("G", 1.0, m=2),
    ]
    text = report.portable(rows)
    assert "| k x n | group | bits | tokens | G | as sm_80 | as sm_89 |" in text
    assert "| 64 x 32 | 64 | 4 | 1 | 2.0 | 3.0 (1.50) | 2.5 (1.25) |" in text
    assert "| 64 x 32 | 32 | 4 | 1 | 4.0 | 5.0 (1.25) |  |" in text
    assert " 2 |" not in text
    assert report.portable(rows[:2]) == "(No rows yet.)"
    # The tables of a GPU are of its own kernels, and of groups of 64.
    assert report.kernels(rows).count("| 64 x 32 | 1 | 2.0 (50%) |") == 1
    assert "as sm_80" not in report.kernels(rows)


def test_integers_stand_beside_exact_products_and_in_no_other_table():
    rows = [_kernel_row("G", 2.0), _kernel_row("G", 4.0, bits=16, group_size=None, backend="xla")]
    rows.append(_kernel_row("G", 1.6, backend="pallas", arithmetic="int8"))
    assert "1.6" not in report.kernels(rows)
    assert "| 64 x 32 | 4 | 1 | 4.0 | 2.0 | 1.6 (2.50) |" in report.integers(rows)
    assert report.integers(rows[:2]) == "(No rows yet.)"


def test_figures_of_several_commits_say_which_they_are_of():
    rows = [_kernel_row("G", 2.0), _kernel_row("G", 4.0, m=16) | {"commit": "1234567890"}]
    text = report.kernels(rows)
    assert "G, commits abcdefg (a), 1234567 (b):" in text
    assert "| 64 x 32 | 1 | 2.0 (50%) a |" in text and "| 64 x 32 | 16 | 4.0 (25%) b |" in text
    assert "G, commit abcdefg:" in report.kernels(rows[:1])
    beside = _kernel_row("G as sm_89", 3.0) | {"commit": "1234567890"}
    assert "| 2.0 a | 3.0 (1.50) b |" in report.portable([rows[0], beside])


def _sweep_row(backend, name, bits, samples, **more):
    fields = {"suite": "sweep", "device": "d", "k": 64, "n": 32, "threads": 2, "m": 4}
    fields |= {"commit": "abcdefgh", "backend": backend, "name": name, "bits": bits}
    fields |= {"status": "ok", "date": "1", "digest": "d"}
    return fields | {"samples_us": samples, "median_us": sorted(samples)[1]} | more


def test_the_sweep_compares_sample_by_sample():
    rows = [
        _sweep_row("cpu", "codebook_int8", 4, [1.0, 2.0, 4.0]),
        _sweep_row("cpu", "codebook_exact", 4, [2.0, 2.0, 2.0]),
        _sweep_row("torch", "dense", 16, [3.0, 4.0, 12.0]),
        _sweep_row("torch", "int4", 4, [6.0, 8.0, 9.0]),
    ]
    text = cpu_tables.sweep(rows)
    assert "| 4 | 2 | 2 | 4 (3.00 / 2.00) | 8 (4.00 / 4.00) |" in text
    assert "k x n = 64 x 32, commit abcdefg" in text
    assert cpu_tables.sweep(rows[:0]) == "(No rows yet.)"
    # Beside dense products alone there is no table of peers.
    assert cpu_tables.sweep(rows[:3]) == "(No rows yet.)"
    assert "| 4 | 3.00 / 2.00 |" in cpu_tables.dense(rows)
    assert cpu_tables.dense(rows, "ggml") == "(No rows yet.)"


def test_dense_rows_belong_to_the_bits_that_they_took_turns_with():
    rows = [
        row
        for bits, dense in ((4, 12.0), (1, 20.0))
        for row in (
            _sweep_row("cpu", "codebook_int8", bits, [2.0] * 3, beside=[bits]),
            _sweep_row("cpu", "codebook_exact", bits, [4.0] * 3, beside=[bits]),
            _sweep_row("torch", "dense", 16, [dense] * 3, beside=[bits]),
        )
    ]
    text = cpu_tables.dense(rows)
    assert "| tokens | 64 x 32, 4 bits | 64 x 32, 1 bits |" in text
    assert "| 4 | 6.00 / 3.00 | 10.00 / 5.00 |" in text
    # A number of tokens without a line of its own counts for the least of all; a newer run replaces.
    more = [row | {"m": 5, "samples_us": [4.0] * 3} for row in rows[:3]]
    newer = [row | {"digest": "e", "date": "2", "samples_us": [8.0] * 3} for row in rows[3:]]
    text = cpu_tables.dense(rows + more + newer)
    assert "| 4 | 6.00 / 3.00 | 1.00 / 1.00 |" in text and "| 5 |" not in text
    assert "| least of all | 1.00 at 5 / 1.00 at 5 | 1.00 at 4 / 1.00 at 4 |" in text


def test_dense_products_of_ggml_without_a_level():
    rows = [
        _sweep_row("cpu", name, 4, [2.0] * 3, isa=isa, beside=[4])
        for isa in ("amx", "avx2")
        for name in ("codebook_int8", "codebook_exact")
    ]
    rows += [
        _sweep_row(backend, name, 16, [time] * 3, isa="avx2", beside=[4])
        for backend, name, time in (("torch", "dense", 6.0), ("ggml", "bf16", 8.0))
    ]
    text = cpu_tables.dense(rows, "ggml", without="amx")
    assert "| 4 | 4.00 / 4.00 |" in text and "amx" not in text


def test_the_table_of_few_rows_has_the_most_threads():
    shape = dict(k=8192, n=8192, m=16)
    rows = [
        _sweep_row("cpu", "codebook_exact", 4, [9.0] * 3, **shape),
        _sweep_row("cpu", "codebook_exact", 4, [4.0] * 3, **(shape | {"threads": 8})),
        _sweep_row("cpu", "codebook_exact", 1, [2.0] * 3, **(shape | {"threads": 8}), beside=[1]),
        _sweep_row("torch", "dense", 16, [12.0] * 3, **(shape | {"threads": 8}), beside=[4]),
        _sweep_row("torch", "dense", 16, [10.0] * 3, **(shape | {"threads": 8}), beside=[1]),
        _sweep_row("cpu", "codebook_exact", 4, [1.0] * 3, **(shape | {"threads": 8, "m": 3})),
    ]
    text = cpu_tables.few(rows)
    assert "| tokens | bf16 (PyTorch) | 4 bit, `exact` | 1 bit, `exact` |" in text
    assert text.endswith("| 8192 x 8192 | 16 | 10 | 4 (3.00) | 2 (5.00) |")
    assert cpu_tables.few(rows[-1:]) == "(No rows yet.)"


def test_shares_of_the_read_bandwidth():
    fields = {"suite": "cpu_threads", "device": "d", "threads": 2, "k": 64, "commit": "abcdefgh"}
    probe = fields | {"k": None, "bits": None, "arithmetic": None, "bytes_rw": 3000}
    rows = [
        probe | {"name": "probe_reduce_sum", "samples_us": [1.0, 2.0, 1.0], "median_us": 1.0},
        probe | {"name": "probe_copy", "samples_us": [2.0] * 3, "median_us": 2.0},
        fields | {"name": "codebook_exact", "bits": 4, "arithmetic": "exact", "bytes_rw": 1500}
        | {"samples_us": [1.0, 1.0, 1.0], "median_us": 1.0},
    ]  # fmt: skip
    assert "| 2 | 3.0 | 1.5 | 50% |" in cpu_tables.read_shares(rows)
    # Memory that its weights are in is read faster than other.
    own = probe | dict(name="probe_reduce_sum", k=64, bits=4, samples_us=[0.8] * 3, median_us=0.8)
    del own["arithmetic"]
    assert "| 2 | 3.0 | 1.5 | 40% |" in cpu_tables.read_shares([*rows, own])


def test_prompts_beside_llama_cpp():
    fields = {
        "suite": "prompts",
        "device": "d",
        "threads": 2,
        "model": "1B",
        "type": "Q4_0",
        "prompt": 512,
    }
    fields |= {"commit": "abcdefgh", "bytes_rw": 100, "base_bytes": 30, "peak_bytes": 140}
    fields |= {"read_gb_s": 0.02}
    ours = {"backend": "cpu", "arithmetic": "int8", "samples_us": [1e6] * 3, "median_us": 1e6}
    peer = {
        "backend": "llama.cpp",
        "arithmetic": "llama.cpp",
        "samples_us": [2e6] * 3,
        "median_us": 2e6,
    }
    rows = [
        fields | ours | {"decode_us": [10.0] * 3, "tokens_per_s": 1e5},
        fields | peer | {"decode_us": [25.0] * 3, "tokens_per_s": 4e4},
    ]
    text = cpu_tables.prompts(rows)
    assert "| 1B | Q4_0 | 512 | cpu int8 | 1.00 | 2.00 | 100000.0 | 2.50 | 50% | 1.10 |" in text


def _network_row(bits, codebook, scale, rounding, kl, group_size=64, network="n"):
    fields = {"suite": "networks", "network": network, "bits": bits, "codebook": codebook}
    fields |= {"scale": scale, "rounding": rounding, "kl": kl, "kl_by_seed": [0.9 * kl, 1.1 * kl]}
    fields |= {"group_size": group_size, "bytes_per_weight": 0.5, "calibration_seed": None}
    return fields | {"loss": 1 + kl, "commit": "abcdefgh"}


def test_a_network_has_a_line_for_levels_and_a_column_for_what_was_done():
    rows = [
        _network_row(4, "kmeans", "absmax", "nearest", 0.5),
        _network_row(4, "kmeans-weights", "absmax", "nearest", 0.4),
        _network_row(4, "kmeans", "search", "corrected", 0.125),
        _network_row(4, "kmeans-weights", "auto", "trained", 0.25),
        _network_row(4, "integers", "search", "descended", 0.3, 128),
        _network_row(4, "published", "search", "gptq", 0.2, 128, "m"),
    ]
    text = report.networks(rows, "n")
    assert "| bits | levels | bytes a weight | absmax | search, corrected | trained |" in text
    assert "| 4 | kmeans-quotients | 0.500 | 4.482 (0.5) |  |  |" in text
    assert "| 4 | kmeans | 0.500 | 4.055 (0.4) | 3.08 (0.125) | 3.49 (0.25) |" in text
    assert "integers" not in text and "by at most 10% (kl)" in text
    beside = report.networks_published(rows)
    assert "| levels | | bytes a weight | n | m |" in beside
    assert "| integers | search, corrected, swept | 0.500 | 3.669 (0.3) |  |" in beside
    assert "| auto-gptq's integers | `sym`, `actorder`, `mse` | 0.500 |  | 3.32 (0.2) |" in beside
    assert report.networks(rows, "k") == report.networks_published(rows[:4]) == "(No rows yet.)"


def test_two_trainings_are_one_table():
    rows = [
        _network_row(4, "nf4", "absmax", "nearest", 0.2, network="trained"),
        _network_row(4, "nf4", "absmax", "nearest", 0.3, network="trained-1"),
        _network_row(2, "normal", "auto", "trained", 0.5, network="trained"),
        _network_row(16, None, None, None, 0.0, network="trained"),
    ]
    text = report.networks(rows, "trained")
    # exp(1 + 0.25); a format that one of them lacks is marked.
    assert "| 4 | nf4 | 0.500 | 3.49 (0.25) |  |" in text
    assert "| 2 | normal | 0.500 |  | 4.482 (0.5)\\* |" in text
    assert "the two trainings by 20%; bfloat16 has a perplexity of 2.718. \\* one training" in text
    assert "trainings" not in report.networks(rows[::2], "trained")
    assert "*" not in report.networks(rows[1:2], "trained-1")


def test_calibrations_and_steps_of_training_have_tables():
    fields = {"device": "G", "commit": "abcdefgh", "bits": 4, "parameters": 2_000_000_000}
    fields |= {"peak_bytes": 3e9, "model_bytes": 1e9, "host_peak_bytes": 5e9, "seconds": 61.4}
    fields |= {"read_seconds": 9.6, "first_layer_seconds": 20.2, "further_layer_seconds": 1.25}
    row = fields | {"suite": "calibration", "name": "2B 4", "model": "custom-llama-2B"}
    row |= {"layers": 8, "layers_of_model": 8}
    text = report.calibration([row])
    assert "| 2B | 2.00 billion | 4 | 61 | 10 | 20 | 1.2 | 3.0 | 1.0 | 5.0 |" in text
    text = report.calibration([row | {"layers": 5, "model_bytes": None}])
    assert "| 2B, 5 of 8 layers | 2.00 billion | 4 | 61 | 10 | 20 | 1.2 | 3.0 |  | 5.0 |" in text
    assert report.calibration([]) == report.training_steps([]) == "(No rows yet.)"
    step = fields | {"suite": "training", "median_us": 2500.0, "of_float": 1.0456}
    assert "| 2000.0M | 4 | 2.50 | 1.046 |" in report.training_steps([step])


def test_killed_trainings_went_on_with_the_same_losses():
    rows = [row for row in report.rows() if row["suite"] == "resumption"]
    assert rows
    for row in rows:
        assert 0 < row["killed_after_step"] < row["steps"] and row["same_curve"]
        assert row["loss"] == row["loss_resumed"]
        assert row["packed_loss"] == row["packed_loss_resumed"]
    text = report.resumption([rows[0] | {"loss": 1.5, "loss_resumed": 1.25}])
    assert "| 1.5000000 | 1.2500000 |" in text


def test_the_default_is_the_fixed_format_of_least_harm():
    """Over networks none without a fit does less harm at worst; on none it is far from the best.

    SmolLM2 has no say: its weights were of 4 bits before, on another grid, and 2 bits leave nothing of it.
    """
    found = [r for r in report.rows() if r["suite"] == "networks" and r["bits"] < 16]
    plain = [r for r in found if r["rounding"] == "nearest" and r["scale"] in SCALES]
    for bits, default in DEFAULTS.items():
        harm: dict[str, dict[tuple, float]] = {}
        for row in plain:
            if row["bits"] == bits and row["network"] in ("minilm", "trained"):
                value = row.get("kl", row.get("dissimilarity"))
                harm.setdefault(row["network"], {})[row["codebook"], row["scale"]] = value
        assert len(harm) >= 2
        assert resolve_auto("auto", "auto", bits) == default
        fixed = set.intersection(*(set(formats) for formats in harm.values()))
        fixed = {form for form in fixed if not form[0].startswith("kmeans")}

        def worst(form, harm=harm, fixed=fixed):
            return max(formats[form] / min(formats[f] for f in fixed) for formats in harm.values())

        if bits == 8:  # where nothing is lost by any, evenly spaced levels need no look-up
            assert all(formats[default] < 2e-3 for formats in harm.values())
            continue
        assert worst(default) == min(map(worst, fixed)), bits
        for formats in harm.values():
            assert formats[default] <= 1.15 * min(formats.values()), bits


def test_what_is_better_than_the_default_without_a_text_takes_many_times_as_long():
    """Searched scales and fitted levels gain less than a fifth: docs/decisions/018."""
    rows = report.rows()
    default = DEFAULTS[4]
    for network in ("minilm", "trained"):
        harm = {
            (row["codebook"], row["scale"]): row.get("kl", row.get("dissimilarity"))
            for row in rows
            if row["suite"] == "networks" and row["network"] == network
            and row["bits"] == 4 and row["rounding"] == "nearest"
        }  # fmt: skip
        assert 0.8 * harm[default] < min(harm.values()) <= harm["kmeans", "search"] < harm[default]
    measured = [row for row in rows if row["suite"] == "quantising"]
    assert measured
    for device in {row["device"] for row in measured}:
        names = ("4 nf4 absmax", "4 kmeans search")
        here = {row["name"]: row for row in measured if row["device"] == device}
        key = "seconds_per_billion" if here[names[0]]["threads"] is None else None
        plain, best = (here[name][key or "processor_seconds_per_billion"] for name in names)
        assert best > 10 * plain


def test_group_sizes_are_compared_at_equal_bytes():
    row = dict(
        suite="kernels", device="d", commit="c" * 40, k=8, n=8, m=1, bits=4, codebook="kmeans"
    )
    found = [
        row | dict(group_size=g, bytes_rw=size, median_us=time)
        for g, size, time in ((16, 200, 30.0), (32, 110, 11.0), (64, 100, 10.0), (128, 95, 19.0))
    ]
    text = group_table.group_sizes([*found, row | dict(group_size=64, bits=16)])
    assert "| 30.0 (1.50) | 11.0 (1.00) | 10.0 (1.00) | 19.0 (2.00) |" in text
    assert group_table.group_sizes(found[1:]) == "(No rows yet.)"


def test_formats_have_a_time_for_each_device():
    weight = jax.random.normal(jax.random.key(0), (8, 128), jnp.bfloat16)
    found = [quantising.measure(weight, *form, 2) for form in quantising.FORMATS[2:6]]
    assert [row["name"] for row in found] == [
        "4 nf4 absmax", "4 kmeans absmax", "4 nf4 search", "4 kmeans search",
    ]  # fmt: skip
    errors = [row["weight_rms_error"] for row in found]
    assert errors[3] < errors[1] < 0.1 and errors[2] < errors[0] < 0.11
    for row in found:
        assert row["seconds_per_billion"] == pytest.approx(row["median_us"] * 1000 / 1024)
    rows = [
        row | {"device": d, "threads": threads, "commit": "c" * 40}
        for d, threads in (("A", None), ("B", 2))
        for row in found
    ]
    text = report.quantising(rows[:-1])
    assert "| bits | levels | scales | error of the weights | A | B, processor seconds |" in text
    assert f"| 4 | nf4 | absmax | {errors[0]:.4f} |" in text and text.count("|  |") == 1


def test_models_of_equal_memory_are_those_of_one_run():
    """Of the newest commit that has all three; rows of several sequences or GPUs do not count."""

    def row(model, bits, commit, date, speed, **others):
        fields = dict(
            suite="models", model=model, bits=bits, commit=commit, date=date, m=1, prompt=2
        )
        fields |= dict(devices=1, speculate=0, codebook=None, backend="pallas", device="H200")
        fields |= dict(samples_us=[1.0], median_us=1.0, bound_us=0.5, tokens_per_s=speed)
        return fields | dict(peak_bytes=8e9, first_token_us=1e3) | others

    names = {"custom-llama-4B": 16, "custom-llama-12B": 4, "custom-llama-31B": 1}
    whole = [row(name, bits, "a" * 40, "2026-01-01", bits) for name, bits in names.items()]
    newer = [row("custom-llama-12B", 4, "b" * 40, "2026-01-02", 999.0)]
    others = [row("custom-llama-31B", 1, "b" * 40, "2026-01-02", 888.0, devices=2)]
    others += [row("custom-llama-4B", 16, "b" * 40, "2026-01-02", 777.0)]
    text = model_table.equal_memory([*newer, *others, *whole])
    assert text.splitlines()[0] == "H200, commit aaaaaaa:"
    assert [line.split(" | ")[5] for line in text.splitlines()[4:]] == ["16", "4", "1"]
    assert model_table.equal_memory(newer) == "(No rows yet.)"


def test_every_run_of_the_gpu_script_has_cases(tmp_path):
    """The script is run with a bench that only lists its cases."""
    lists = tmp_path / "lists"
    lists.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@" --list\n', encoding="utf-8")
    lists.chmod(0o755)
    out = tmp_path / "out"
    ended = subprocess.run(
        ["bash", ROOT / "results" / "gpu.sh", out, lists, "2"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        encoding="utf-8",
    )
    runs = ended.stdout.splitlines()
    assert len(runs) > 20 and all(run.endswith(": status 0, 0 rows") for run in runs), ended
    for log in out.glob("*.log"):
        cases = log.read_text(encoding="utf-8").split()
        assert cases and all(re.fullmatch(r"[\w.]+(-[\w.]+)+", case) for case in cases), cases
