"""The scaling table: its text, runs that are stopped and go on, packed losses, the fit."""

import dataclasses
import gzip
import re
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdk_jax.benchmark import records
from fdk_jax.quality import corpus, resuming, scaling_report, scaling_runs, step_times
from fdk_jax.quality.scaling_model import LanguageModel, Shape, best_attention
from fdk_jax.quality.scaling_runs import Plan, Run

pytest.importorskip("tokenizers")
pytest.importorskip("orbax.checkpoint")

PAGE = (
    "Network Working Group                      J. Postel\n\n\n\n   The tide rises and the\n\n\n\n\n"
    "Postel                    Standards Track                    [Page 1]\n\f\n"
    "RFC 9999                      Tides                      June 1999\n\n\n   tide falls.  \n"
)
SHAPE = Shape(64, 64, 2, 320)
PLAN = Plan(
    tokens=4 * 2 * 2 * 32,
    context=32,
    batch=2,
    chunk=2,
    refresh_every=2,
    test_batches=2,
    checkpoint_chunks=1,
)


@pytest.fixture(autouse=True)
def promotions():
    """The attention of JAX counts on them, in its gradients too."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def write_text(folder):
    rng = np.random.default_rng(0)
    words = ["tide", "moon", "sea", "sun", "rises", "falls", "with", "the"]
    for i in range(12):
        text = " ".join(words[j] for j in rng.integers(0, 8, 400))
        name = folder / f"rfc{i}.txt.gz"
        name.write_bytes(gzip.compress(f"{text}.\n".encode()))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    out = folder / "corpus.xz"
    assert corpus.write(write_text(folder), out) == 12
    return out


@pytest.fixture(scope="module")
def data(text):
    return scaling_runs.make_data(PLAN, text.name, corpus.tokenise(text, SHAPE.vocabulary))


def test_pages_become_one_text():
    assert corpus.clean(PAGE) == (
        "Network Working Group                      J. Postel\n\nThe tide rises and the\n\ntide falls.\n"
    )


def test_a_text_keeps_to_its_size_and_to_whole_documents(tmp_path):
    folder = write_text(tmp_path)
    count = corpus.write(folder, tmp_path / "few.xz", 10_000)
    found = corpus.documents(tmp_path / "few.xz")
    assert len(found) == count < 12
    assert 8_000 < sum(len(text) + 1 for text in found) <= 10_000
    with pytest.raises(ValueError, match="holds no rfc"):
        corpus.write(tmp_path / "none", tmp_path / "none.xz")


def test_tokens_are_the_same_again_and_parted_by_documents(text, tmp_path):
    made = corpus.tokenise(text, 320, tmp_path)
    again, kept = corpus.tokenise(text, 320), corpus.tokenise(text, 320, tmp_path)
    for other in (again, kept):
        assert (other.train == made.train).all() and (other.test == made.test).all()
        assert (other.vocabulary, other.test_bytes) == (made.vocabulary, made.test_bytes)
    whole = corpus.documents(text)
    ends = int((made.train == 0).sum()), int((made.test == 0).sum())
    assert sum(ends) == 12 and ends[1] >= 1
    assert made.test_bytes == sum(len(text.encode()) for text in whole[: ends[1]])
    assert max(made.train.max(), made.test.max()) < made.vocabulary <= 320


def test_kept_tokens_stand_for_their_text(text, tmp_path, monkeypatch):
    out = tmp_path / "tokens.npz"
    monkeypatch.setattr("sys.argv", ["corpus", str(text), str(out), "320"])
    runpy.run_path(corpus.__file__, run_name="__main__")
    made, kept = corpus.tokenise(text, 320), corpus.tokenise(out, 320)
    assert kept.name == made.name == "corpus.xz"
    assert (kept.digest, kept.vocabulary) == (made.digest, made.vocabulary)
    assert (kept.train == made.train).all() and (kept.test == made.test).all()
    with pytest.raises(ValueError, match="tokenise its text again"):
        corpus.tokenise(out, made.vocabulary - 1)
    np.savez(tmp_path / "other.npz", train=made.train)
    with pytest.raises(ValueError, match="it lacks"):
        corpus.tokenise(tmp_path / "other.npz", 320)


def test_every_window_is_read_before_any_comes_again():
    rows = scaling_runs.order(PLAN, 7)
    assert rows.shape == (8, 2)
    assert sorted(rows.ravel()[:7]) == sorted(rows.ravel()[7:14]) == list(range(7))


def losses(run, chunks):
    for _ in range(chunks):
        run.advance()
    return run.losses


def test_gradients_of_the_float_model_need_no_scatter(data):
    """Whose sums a GPU adds up in any order; and they are the gradients of one that is."""
    graph, state = nnx.split(LanguageModel(SHAPE))
    rows = data.test[0].astype(jnp.int32)

    def loss(state):
        return scaling_runs.loss(nnx.merge(graph, state), rows)

    assert "scatter" not in str(jax.make_jaxpr(jax.grad(loss))(state))

    def taken(state):
        model = nnx.merge(graph, state)
        table = model.embedding.embedding.get_value()
        model._rows = lambda tokens: jnp.take(table, tokens, axis=0)
        log_probability = jax.nn.log_softmax(model(rows)[:, :-1].astype(jnp.float32))
        return -jnp.take_along_axis(log_probability, rows[:, 1:, None], axis=-1).mean()

    assert "scatter" in str(jax.make_jaxpr(jax.grad(taken))(state))
    value, gradients = jax.value_and_grad(loss)(state)
    expected, others = jax.value_and_grad(taken)(state)
    assert value == expected
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(jnp.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 2])
def test_a_killed_run_goes_on_with_the_same_losses(bits, data, tmp_path):
    plan = dataclasses.replace(PLAN, reproducible=True)

    def run(folder):
        return Run(plan, SHAPE, bits, data, "xla", folder)

    whole = losses(run(None), 4)
    losses(run(tmp_path), 2)
    later = run(tmp_path)
    assert later.done == 2 and [p.name for p in tmp_path.glob("[0-9]*")] == ["2"]
    assert losses(later, 2) == whole


TRAINING = """
import json, pathlib, sys, time
given = dict(a[2:].split("=") for a in sys.argv[1:] if "=" in a)
place, out = pathlib.Path(given["folder"]), pathlib.Path(given["out"])
begun = place.exists()
(place / "run" / "10").mkdir(parents=True, exist_ok=True)
if MODE == "slow" and place.name == "killed" and not begun:
    time.sleep(600)
row = dict.fromkeys(["group_size", "codebook", "dtype", "text", "parameters", "schema", "suite", "name"], 2)
row |= dict(tokens=400, batch=2, context=4, chunk=4, loss=1.5 + OFF * begun, curve=[3.0, 1.5])
out.write_text(json.dumps(row))
"""


@pytest.mark.parametrize(("mode", "off"), [("slow", 0.0), ("slow", 0.25), ("fast", 0.0)])
def test_a_training_is_killed_and_compared(mode, off, tmp_path, monkeypatch):
    script = tmp_path / "training.py"
    script.write_text(f"MODE, OFF = {mode!r}, {off}\n{TRAINING}")
    monkeypatch.setattr(resuming, "_PROGRAM", [sys.executable, str(script)])
    if mode == "fast":  # it ended before it could be killed
        monkeypatch.setattr(resuming, "_checkpoints", lambda folder: [])
        started = []

        class Recorded(subprocess.Popen):
            def __init__(self, *args):
                super().__init__(*args)
                started.append(self)

        monkeypatch.setattr(resuming.subprocess, "Popen", Recorded)
        with pytest.raises(RuntimeError, match="give more tokens"):
            resuming.measure("tiny", 1, 400, tmp_path, options=[])
        assert len(started) == 2 and None not in [process.returncode for process in started]
        return
    found = resuming.measure("tiny", 1, 400, tmp_path, options=[])
    assert (found["steps"], found["killed_after_step"]) == (50, 40)
    assert (found["loss"], found["loss_resumed"]) == (1.5, 1.5 + off) and found["same_curve"]


@pytest.mark.slow
def test_rows_and_packed_losses(text, data, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling_runs, "SIZES", {"toy": SHAPE})
    monkeypatch.setattr(scaling_runs.Plan, "variant", "")
    out, notes = tmp_path / "rows.jsonl", []
    grid = [("toy", 16), ("toy", 1)]

    def go(grid, **options):
        return scaling_runs.run(PLAN, text, out, tmp_path / "folder", grid, notes.append, **options)

    assert go(grid[:1], dry=True) and not out.exists()
    # Past the deadline nothing is begun; then everything; then nothing is left to do.
    assert go(grid, deadline=0.0) and not out.exists()
    assert go(grid) and go(grid)
    full, one = records.read([out])
    assert (full["name"], one["name"]) == ("toy 16", "toy 1")
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 64)
    assert full["parameters"] == one["parameters"] == weights
    norms = 4 * (2 * 2 * 64 + 64)
    assert full["bytes"] == 2 * (weights + 320 * 64) + norms and "packed_loss" not in full
    # 1-bit layers, the 4-bit table, scales of groups of 64, codebooks of 4 kinds in 2 layers.
    packed = weights // 8 + 2 * weights // 64 + 320 * 64 // 2 + 2 * 320 + 8 * 2 * 4 + 16 * 4
    assert one["bytes"] == packed + norms
    assert one["tokens"] == 512 and len(one["curve"]) == 4
    # The same weights; products are accumulated in another order and rounded to bfloat16.
    assert one["packed_loss"] == pytest.approx(one["loss"], rel=2e-3)
    assert one["bits_per_byte"] == pytest.approx(
        one["loss"] / np.log(2) / data.bytes_per_token, rel=1e-6
    )


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_others_alone(text, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling_runs, "SIZES", {"odd": Shape(96, 64, 1, 320), "toy": SHAPE})
    monkeypatch.setattr(scaling_runs.Plan, "variant", "")
    out, notes = tmp_path / "rows.jsonl", []
    fine = scaling_runs.run(PLAN, text, out, tmp_path, [("odd", 16), ("toy", 16)], notes.append)
    assert not fine and any("odd 16 failed" in note for note in notes)
    assert [row["name"] for row in records.read([out])] == ["toy 16"]


def test_attention_is_causal_and_knows_positions():
    model = LanguageModel(SHAPE, attention=best_attention(1, 16))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 320, (1, 16)).astype(np.int32)
    run = jax.jit(lambda t: model(t))
    before = np.asarray(run(tokens), np.float32)
    tokens[0, 10] = (tokens[0, 10] + 1) % 320
    after = np.asarray(run(tokens), np.float32)
    assert (before[0, :10] == after[0, :10]).all() and (before[0, 10:] != after[0, 10:]).any()
    swapped = tokens[:, [1, 0, *range(2, 16)]]
    assert not np.allclose(np.asarray(run(swapped), np.float32)[0, -1], after[0, -1], atol=1e-3)


def row(bits, weights, loss, size, step=10.0, variant=""):
    return {
        "suite": "scaling", "status": "ok", "name": f"{weights} {bits}{variant}", "size": str(weights),
        "bits": bits, "parameters": weights, "bytes": size, "loss": loss, "bits_per_byte": loss / 2,
        "packed_loss": loss, "step_ms": step, "device": "a GPU", "tokens": 4e7,
    }  # fmt: skip


def test_the_fit_finds_the_curve_that_rows_lie_on(tmp_path):
    truth = {16: (1.2, 2.0, 0.35), 4: (1.2, 1.4, 0.4), 1: (1.2, 1.1, 0.3)}
    rows = [
        row(bits, weights, a + b * (weights * bits / 8e6) ** -c, weights * bits // 8, 10.0 + bits)
        for bits, (a, b, c) in truth.items()
        for weights in (1_000_000, 4_000_000, 16_000_000, 64_000_000)
    ]
    for bits, found in scaling_report.fit(rows).items():
        assert found == pytest.approx(truth[bits], rel=0.02)
    path = tmp_path / "rows.jsonl"
    other = row(4, 4_000_000, rows[5]["loss"] + 0.0123, 2_000_000, variant=" seed 1")
    with records.Writer(path) as writer:
        for one in [*rows, other]:
            writer.write(records.make_row(one))
    found = scaling_report.report([path], tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 1000
    assert f"| 4.0M | 4 | seed 1 | {other['loss']:.4f} | +0.0123 |" in found
    # In 8 MB: 4M weights of 16 bits, 16M of 4, 64M of 1.
    loss = {bits: truth[bits][0] + truth[bits][1] * 8 ** -truth[bits][2] for bits in truth}
    line = re.search(r"\| 8\.0 MB \|.*", found)[0]
    assert f"{loss[16]:.4f} (4.0M)" in line and f"{loss[4]:.4f} (16.0M)" in line
    assert f"{loss[1]:.4f} (64.0M)" in line


def test_the_sentence_compares_the_best_model_of_one_bit():
    fields = {"tokens": 39e6, "bits": 1}
    found = [
        fields | {"bytes": 8e6, "loss": 2.7},
        fields | {"bytes": 2e6, "loss": 3.0},
        fields | {"bits": 16, "bytes": 9e6, "loss": 2.9},
        fields | {"bits": 16, "bytes": 70e6, "loss": 2.6},
        fields | {"bits": 16, "bytes": 1e6, "loss": 4.0},
    ]
    told = "The best 1-bit model of 8.0 MB has a loss of 2.70 nats a token"
    assert scaling_report.sentence(found) == f"{told}, 16 bits in 9.0 MB 2.90 (39 million tokens)."
    assert scaling_report.sentence(found[:2]) == f"{told} (39 million tokens)."


def test_the_law_finds_what_rows_were_made_of():
    kept = {16: 1 - np.exp(-16 / 3), 4: 1 - np.exp(-4.25 / 3), 1: 1 - np.exp(-1.25 / 3)}
    rows = [
        row(bits, weights, 1.5 + 40 * (weights * part) ** -0.3, weights)
        for bits, part in kept.items()
        for weights in (1_000_000, 4_000_000, 16_000_000)
    ]
    assert scaling_report.law(rows) == pytest.approx((1.5, 0.3, 3.0), rel=0.03)
    text = scaling_report.exponents(rows)
    assert "| | alpha | gamma | a weight of 4 bits is worth | a weight of 1 bit is worth |" in text
    assert re.search(
        r"\| these models \| 0\.(29|30|31) \| [23]\.\d\d \| 0\.7[567] \| 0\.3[345] \|", text
    )
    assert "| 1-Bit-Wonder, k-means | 0.63 | 3.32 | 0.73 | 0.32 |" in text
    assert scaling_report.law(rows[:3]) is None


def test_what_a_weight_is_worth():
    truth = {16: 1.0, 4: 0.8, 1: 0.22}
    rows = [
        row(bits, weights, 1.3 + 40 * (factor * weights) ** -0.25, weights * bits // 8)
        for bits, factor in truth.items()
        for weights in (1_000_000, 4_000_000, 16_000_000, 64_000_000)
    ]
    assert scaling_report.worth(rows) == pytest.approx(truth, rel=0.02)
    assert scaling_report.worth(rows[4:]) == {}
    # A step beside another program is no measure of a step.
    shared = row(1, 1_000_000, 2.0, 125_000, step=99.0) | {"shared_device": True}
    assert "99.00" not in scaling_report.table([shared, rows[0]])


@pytest.mark.slow
def test_steps_are_timed_beside_the_float_step(monkeypatch):
    monkeypatch.setitem(scaling_runs.SIZES, "toy", SHAPE)
    plan = dataclasses.replace(PLAN, chunk=2, refresh_every=2)
    # Each width is compiled in a thread of its own, which knows the rules of all threads only.
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")
    try:
        rows = step_times.measure(plan, "toy", 3)
    finally:  # as in conftest.py
        jax.config.update("jax_numpy_dtype_promotion", "strict")
        jax.config.update("jax_numpy_rank_promotion", "raise")
    assert [row["bits"] for row in rows] == [16, 4, 2, 1]
    for row in rows:
        assert len(row["samples_us"]) == len(row["float_samples_us"]) == 3
        ratios = sorted(np.divide(row["samples_us"], row["float_samples_us"]))
        assert row["of_float"] == pytest.approx(ratios[1], rel=1e-3)
    assert rows[0]["of_float"] == 1
