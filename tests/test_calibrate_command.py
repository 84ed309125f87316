"""`--calibrate` of the commands, `evaluate`, and what they stand on."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdk_jax import evaluate_command, generate, models
from fdk_jax.benchmark import calibrating as calibrating_benchmark
from fdk_jax.layers.linear import QuantisedLinear
from fdk_jax.models import calibrating
from fdk_jax.models.tokenizer import Tokenizer

CHATTY = Path(__file__).parent / "data" / "models" / "llama3"
TEXT = "the quick brown fox jumps over the lazy dog " * 60


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    return path


def test_windows_are_spread_over_the_file(tmp_path, text):
    tokenizer = Tokenizer(CHATTY)
    whole = tokenizer.encode(TEXT)
    rows = calibrating.token_windows(text, tokenizer, context=16, tokens=64)
    assert rows.shape == (4, 16) and rows.dtype == np.int32
    np.testing.assert_array_equal(rows[0], whole[:16])
    last = len(whole) // 16 * 16
    np.testing.assert_array_equal(rows[-1], whole[last - 16 : last])
    np.save(tmp_path / "a.npy", np.arange(50))
    rows = calibrating.token_windows(tmp_path / "a.npy", tokenizer, context=64)
    np.testing.assert_array_equal(rows, np.arange(50)[None])
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not a text in UTF-8"):
        calibrating.token_windows(tmp_path / "b.txt", tokenizer)
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(ValueError, match="tokens; 2 are the least"):
        calibrating.token_windows(tmp_path / "b.txt", tokenizer)


def quantised(model) -> list[QuantisedLinear]:
    return [one for _, one in nnx.iter_modules(model) if isinstance(one, QuantisedLinear)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fdk_jax.learning.statistics.CalibrationWarning")
def test_a_calibrated_checkpoint_is_nearer_to_the_float_one(text, monkeypatch):
    rows = calibrating.token_windows(text, Tokenizer(CHATTY), context=32, tokens=256)
    tokens = jnp.asarray(rows[:2])
    plan = models.Quantisation(2, 16, head_bits=8)
    float_model = models.load(CHATTY, dtype="float32", backend="xla")
    plain = models.load(CHATTY, dtype="float32", quantisation=plan, backend="xla")
    fitted = calibrating.load_calibrated(CHATTY, plan, rows, dtype="float32", backend="xla")
    widths = [one.weight.get_value().bits for one in quantised(fitted)]
    assert widths.count(2) == 4 * float_model.config.num_layers and widths.count(8) == 1
    expected = float_model(tokens)
    # The float model waits on another device, as it does beside a GPU; nothing of it stays there.
    host = jax.local_devices(backend="cpu")[-1]
    monkeypatch.setattr(calibrating, "_host", lambda: host)
    turned = calibrating.load_calibrated(
        CHATTY, plan, rows, dtype="float32", backend="xla", rotate=True
    )
    where = {one for leaf in jax.tree.leaves(nnx.state(turned)) for one in leaf.devices()}
    assert where == {jax.local_devices()[0]} != {host}
    learned = calibrating.load_calibrated(
        CHATTY, plan, rows, dtype="float32", backend="xla", learn=True
    )
    models_ = (plain, fitted, turned, learned)
    errors = [float(jnp.square(m(tokens) - expected).mean()) for m in models_]
    assert all(0 < error < 0.7 * errors[0] for error in errors[1:])
    assert errors[3] != errors[1]


@pytest.mark.slow
def test_commands_end_to_end(text, capfd):
    common = ["--model", str(CHATTY), "--bits", "4", "--group_size", "32", "--dtype", "float32"]
    fitted = [*common, "--calibrate", str(text), "--learn"]
    status = generate.main([*fitted, "--prompt", "the quick", "--max_tokens", "3", "--json"])
    out = capfd.readouterr().out
    assert status == 0 and len(json.loads(out)["tokens"][0]) == 3
    status = evaluate_command.main(
        [*common, "--text", str(text), "--context", "32", "--json", "--quiet"]
    )
    report = json.loads(capfd.readouterr().out)
    assert status == 0
    assert 0 < report["kl"] < 0.2 and 0 < report["output_error"] < 0.2
    assert report["tokens"] % 31 == 0
    assert all(layer["bits"] == 4 for layer in report["layers"])
    status = evaluate_command.main(["--model", str(CHATTY), "--text", str(text), "--quiet"])
    out = capfd.readouterr().out
    assert status == 0 and "perplexity" in out and "reference -" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--calibrate", "x"], "--calibrate needs --bits"),
        (["--bits", "2", "--rotate"], "--rotate needs --calibrate"),
        (["--bits", "2", "--learn"], "--learn needs --calibrate"),
        (["--bits", "4", "--text", "missing.txt"], "missing.txt"),
        (["--context", "1"], "context=1 must be at least 2"),
    ],
)
def test_errors_of_evaluate(arguments, words, capsys):
    status = evaluate_command.main(["--model", str(CHATTY), "--text", os.devnull, *arguments])
    assert status == 2 and words in capsys.readouterr().err


@pytest.mark.slow
def test_the_row_of_a_calibration(tmp_path, monkeypatch):
    config = dataclasses.replace(
        calibrating_benchmark.custom_llama("1B"), vocab_size=320, hidden_size=64, intermediate_size=128,
        num_layers=2, num_heads=1, num_kv_heads=1,
    )  # fmt: skip
    monkeypatch.setattr(calibrating_benchmark, "custom_llama", lambda name: config)
    arguments = ["calibrating", str(tmp_path), "--layers", "3"]
    monkeypatch.setattr("sys.argv", [*arguments, "--write_only"])
    calibrating_benchmark.main()
    (written,) = tmp_path.iterdir()  # and is not written again
    times = {path.name: path.stat().st_mtime_ns for path in written.iterdir()}
    calibrating_benchmark.write(written, config)
    assert {path.name: path.stat().st_mtime_ns for path in written.iterdir()} == times
    parts = []
    row = calibrating_benchmark.measure(
        tmp_path, "1B", 4, layers=3, tokens=1024, rotate=False, part=parts.append
    )
    assert [part["layers"] for part in parts] == [1, 2, 3]
    assert parts[0]["further_layer_seconds"] is None and parts[1]["further_layer_seconds"] > 0
    assert parts[0]["seconds"] < parts[2]["seconds"] <= row["seconds"]
    assert (row["layers"], row["layers_of_model"], row["tokens"]) == (3, 2, 1024)
    assert row["programs"] > 20 and row["programs_of_further_layers"] == 0  # they are alike
    weights = 3 * ((1 + 2 + 1) * 64 * 64 + 3 * 64 * 128)
    assert row["parameters"] == weights + 320 * 64
    # The embedding and three norms as they are; codes, scales of groups of 64, codebooks of four matrices.
    assert (
        row["model_bytes"]
        == 2 * 320 * 64 + (1 + 2 * 3) * 2 * 64 + weights // 2 + weights // 32 + 3 * 4 * 64
    )
    assert row["seconds"] > 0 and not list(tmp_path.iterdir())
