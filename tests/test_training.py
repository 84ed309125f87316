"""Quantisation-aware training: the numbers of quantise, straight-through gradients, what it recovers."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fdk_jax
from fdk_jax.format.packing import BITS
from fdk_jax.learning import training
from fdk_jax.learning.calibration import calibrate
from fdk_jax.learning.evaluation import evaluate
from fdk_jax.quality import language_model
from fdk_jax.quality.text import ALPHABET, Language


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("scale", "axes", "shape"),
    [
        ("auto", "nk", (6, 130)),
        ("absmax", "kn", (64, 5)),
        ("absmean", "kkn", (4, 16, 6)),
        ("rms", "knn", (40, 2, 3)),
        ("none", "nk", (3, 7)),
    ],
)
def test_fake_quantise_is_quantise_bit_for_bit(bits, scale, axes, shape, rng):
    w = jnp.asarray(rng.standard_t(4, shape), jnp.float32)
    codebooks = ["uniform", "normal", np.sort(rng.standard_normal(2**bits)).astype(np.float32)]
    for codebook in codebooks:
        for dtype in (jnp.float32, jnp.bfloat16):
            options = dict(group_size=32, codebook=codebook, scale=scale, axes=axes)
            q = fdk_jax.format.quantisation.quantise_array(w, bits, dtype=dtype, **options)
            fake = jax.jit(
                lambda w, o=options, d=dtype: training.fake_quantise(w, bits, dtype=d, **o)
            )(w)
            assert (np.asarray(fake) == np.asarray(fdk_jax.dequantise(q, jnp.float32))).all()


def test_gradients_pass_straight_through(rng):
    w, c = (jnp.asarray(rng.standard_normal((4, 64)), jnp.float32) for _ in range(2))
    gradient = jax.grad(lambda w: jnp.sum(training.fake_quantise(w, 2) * c))(w)
    assert (np.asarray(gradient) == np.asarray(c)).all()
    two = jax.vmap(lambda w: training.fake_quantise(w, 2))(jnp.stack([w, c]))
    assert (np.asarray(two[1]) == np.asarray(training.fake_quantise(c, 2))).all()


class Model(nnx.Module):
    """Linears with and without bias, and a LinearGeneral."""

    def __init__(self, dtype=jnp.float32, seed=0):
        rngs = nnx.Rngs(seed)
        self.inner = nnx.Linear(64, 96, rngs=rngs, dtype=dtype)
        self.heads = nnx.LinearGeneral((4, 24), (8, 8), axis=(-2, -1), rngs=rngs, dtype=dtype)
        self.lm_head = nnx.Linear(64, 10, use_bias=False, rngs=rngs, dtype=dtype)

    def __call__(self, x):
        a = nnx.relu(self.inner(x)).reshape(*x.shape[:-1], 4, 24)
        return self.lm_head(self.heads(a).reshape(*x.shape[:-1], 64))


def square_loss(model, batch):
    x, y = batch
    return jnp.mean(jnp.square(model(x).astype(jnp.float32) - y))


def steps(model, count, rng, **options):
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    step = training.make_train_step(square_loss, **options)
    x = jnp.asarray(rng.standard_normal((32, 64)), jnp.float32)
    batch = (x, jnp.sin(x[:, :10] * 2))
    return [float(step(model, optimizer, batch)) for _ in range(count)], x


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("codebook", "dtype", "compute"),
    [
        ("kmeans", jnp.bfloat16, jnp.float32),
        ("uniform", None, None),
        ("normal", jnp.bfloat16, jnp.bfloat16),
    ],
)
def test_the_exported_model_gives_the_logits_of_training(bits, codebook, dtype, compute, rng):
    model = training.quantisation_aware(
        Model(compute), bits, codebook=codebook, dtype=dtype, group_size=32
    )
    losses, x = steps(model, 6, rng, refresh_every=2)
    assert losses[-1] < losses[0]
    exported = training.export(model)
    assert isinstance(exported.inner, fdk_jax.QuantisedLinear)
    assert isinstance(exported.lm_head, nnx.Linear)
    assert exported.inner.weight.get_value().dtype == (dtype or jnp.float32)
    tolerance = 1e-2 if compute == jnp.bfloat16 else 1e-5
    assert oracle.relative_rms(exported(x), np.asarray(model(x).astype(jnp.float32))) <= tolerance
    w = exported.heads.weight.get_value()
    assert (
        w.axes == "kknn"
        and (np.asarray(w.dequantise(jnp.float32)) == np.asarray(model.heads.weight())).all()
    )


def test_start_step_and_float32_master_weights(rng):
    plain = Model()
    late = training.quantisation_aware(plain, 1, codebook="kmeans")
    before = np.asarray(late.inner.codebook.get_value())
    assert late.inner.kernel.get_value().dtype == jnp.float32
    seed = rng.integers(2**31)
    ours, x = steps(late, 5, np.random.default_rng(seed), start_step=3, refresh_every=1)
    theirs, _ = steps(plain, 5, np.random.default_rng(seed))
    # Up to the start the same training; from then on another.
    assert ours[:3] == pytest.approx(theirs[:3], rel=1e-4)
    assert abs(ours[3] - theirs[3]) > 1e-3 * theirs[3]
    assert bool(late.inner.active.get_value())
    after = np.asarray(late.inner.codebook.get_value())
    assert (after != before).any() and (np.diff(after) > 0).all()
    assert oracle.relative_rms(training.export(late)(x), np.asarray(late(x))) < 1e-5


def test_refreshed_codebooks_follow_the_weights(rng):
    model = training.quantisation_aware(Model(), 2, codebook="kmeans", scale="absmax")
    layer = model.inner
    layer.kernel.set_value(
        jnp.sign(layer.kernel.get_value()) * jnp.square(layer.kernel.get_value())
    )

    def error():
        return oracle.relative_rms(layer.weight(), np.asarray(layer.kernel.get_value()))

    stale = error()
    training.refresh_codebooks(model)
    assert error() < 0.98 * stale
    fixed = training.quantisation_aware(Model(), 2, codebook="uniform")
    training.refresh_codebooks(fixed)
    assert (
        np.asarray(fixed.inner.codebook.get_value()).tolist()
        == np.linspace(-1, 1, 4, dtype=np.float32).tolist()
    )


def test_bad_arguments_name_the_value():
    with pytest.raises(ValueError, match="bits=3"):
        training.quantisation_aware(Model(), 3)
    with pytest.raises(ValueError, match="kmeans"):
        training.fake_quantise(jnp.ones((4, 64)), 4, codebook="kmeans")
    with pytest.raises(ValueError, match="must end in 4"):
        training.fake_quantise(jnp.ones((4, 64)), 2, codebook=jnp.zeros(3))
    with pytest.raises(ValueError, match="start_step=-1"):
        training.make_train_step(square_loss, start_step=-1)
    with pytest.raises(TypeError, match=r"no nnx\.Linear"):
        training.quantisation_aware(nnx.Dropout(0.1), 4)
    with pytest.raises(ValueError, match="contracted axes"):
        training.quantisation_aware(Model(), 4).inner(jnp.ones((2, 63)))


def test_the_language_is_reproducible_and_has_its_entropy():
    language = Language.invent()
    tokens, entropy = language.write(60_000, 5)
    again, _ = Language.invent().write(60_000, 5)
    assert (tokens == again).all() and (language.write(60_000, 6)[0] != tokens).any()
    text = "".join(ALPHABET[t] for t in tokens)
    words = {w for kind in language.words.values() for w in kind} | {"the", "in"}
    assert set(text[: text.rindex(" ")].replace(".", "").split()) <= words
    assert entropy == pytest.approx(language.write(200_000, 7)[1], rel=0.02)
    # A code for words by their frequency alone cannot reach the entropy: there is structure to learn.
    counts = np.unique(text.split(), return_counts=True)[1]
    shares = counts / counts.sum()
    assert -(shares * np.log(shares)).sum() * len(text.split()) / len(text) > 1.3 * entropy


def test_what_formats_cost_a_trained_model():
    """The claims of docs/quality.md, on a smaller model: one test, as training takes most of its time."""
    recipe = language_model.SMALL
    data = language_model.make_data(recipe)
    model = language_model.train(recipe, data)
    calibration = [jnp.asarray(batch) for batch in data.calibration]

    def loss(candidate):
        report = evaluate(candidate, model, data.test, batch_size=64)
        return math.log(report.perplexity), report

    reference, _ = loss(model)
    assert data.entropy < reference < 0.85  # 2.5 nats are the entropy of single letters
    four, report = loss(calibrate(model, 4, calibration, dtype=jnp.bfloat16))
    assert four - reference < 0.02 and report.kl < 0.02
    assert report.bytes_per_weight == pytest.approx(0.5 + 2 / 64, abs=0.02)
    plain, _ = loss(fdk_jax.quantise(model, 1, codebook="kmeans", dtype=jnp.bfloat16))
    corrected, _ = loss(calibrate(model, 1, calibration, dtype=jnp.bfloat16))
    assert corrected - reference < 0.75 * (plain - reference)
    aware = training.quantisation_aware(model, 1, codebook="kmeans", dtype=jnp.bfloat16)
    language_model.tune(
        aware,
        recipe,
        data,
        first=recipe.steps,
        steps=recipe.tuning_steps,
        peak=2e-3,
        refresh_every=25,
    )
    exported = training.export(aware)
    tuned, report = loss(exported)
    # 1-bit training recovers most of what 1-bit rounding loses.
    assert tuned - reference < 0.25 * (plain - reference)
    assert tuned < corrected
    tokens = calibration[0]
    assert oracle.relative_rms(exported(tokens), np.asarray(aware(tokens))) < 1e-5


class Tied(nnx.Module):
    """A table that is the projection to the vocabulary too."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.table = nnx.Embed(10, 64, rngs=rngs)
        self.inner = nnx.Linear(64, 64, rngs=rngs)

    def __call__(self, tokens):
        return self.table.attend(nnx.relu(self.inner(self.table(tokens))))


def test_tables_train_through_their_quantisation(rng):
    plain = Tied()
    model = training.quantisation_aware(plain, 2, codebook="kmeans", embedding_bits=4)
    assert isinstance(training.quantisation_aware(plain, 2).table, nnx.Embed)
    tokens = jnp.asarray(rng.integers(0, 10, (8, 16)), jnp.int32)
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)

    def loss(model, tokens):
        return jnp.mean(jnp.square(model(tokens) - jax.nn.one_hot(tokens, 10)))

    step = training.make_train_step(loss, refresh_every=2)
    before = np.asarray(model.table.kernel.get_value())
    values = [float(step(model, optimizer, tokens)) for _ in range(6)]
    assert values[-1] < values[0]
    assert (np.asarray(model.table.kernel.get_value()) != before).any()
    exported = training.export(model)
    assert isinstance(exported.table, fdk_jax.QuantisedEmbed)
    table = exported.table.embedding.get_value()
    assert table.bits == 4 and exported.inner.weight.get_value().bits == 2
    assert (np.asarray(table.dequantise()) == np.asarray(model.table.weight())).all()
    assert oracle.relative_rms(exported(tokens), np.asarray(model(tokens))) < 1e-5


def test_gradients_of_narrow_products_are_those_of_flax(rng):
    """In bfloat16 both round the same products once; float32 products would be slow on a GPU."""
    layer = nnx.Linear(64, 32, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    fake = training.quantisation_aware(nnx.Sequential(layer), 8, codebook="uniform").layers[0]
    fake.active.set_value(jnp.zeros((), bool))
    x = jnp.asarray(rng.standard_normal((16, 64)), jnp.bfloat16)

    def gradient(module):
        return nnx.grad(lambda m, x: jnp.sum(jnp.square(m(x).astype(jnp.float32))))(module, x)

    ours, theirs = (gradient(m).kernel.get_value() for m in (fake, layer))
    assert oracle.relative_rms(ours, np.asarray(theirs)) < 2.0**-7
    text = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(fake(x).astype(jnp.float32))))(x))
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert (
        len(products) >= 2 and ["f32" in line.split("=")[0] for line in products].count(True) == 1
    )
    tangent = jax.jvp(lambda x: fake(x), (x,), (x,))[1]
    assert oracle.relative_rms(tangent, np.asarray(layer(x), np.float32)) < 2.0**-6


def test_training_with_rematerialisation(rng):
    """`jax.checkpoint` around the model: the losses and weights of the same steps without it."""

    def rematerialised(model, batch):
        graph, state = nnx.split(model)
        return jax.checkpoint(lambda s, b: square_loss(nnx.merge(graph, s), b))(state, batch)

    batch = (
        jnp.asarray(rng.standard_normal((8, 64)), jnp.float32),
        jnp.asarray(rng.standard_normal((8, 10)), jnp.float32),
    )

    def train(loss):
        model = training.quantisation_aware(Model(), bits=1, group_size=16, codebook="kmeans")
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        step = training.make_train_step(loss, refresh_every=2)
        losses = [float(step(model, optimizer, batch)) for _ in range(4)]
        return losses, jax.tree.leaves(nnx.state(model, nnx.Param))

    model = training.quantisation_aware(Model(), bits=1, group_size=16, codebook="kmeans")
    graph, state = nnx.split(model)
    text = str(jax.make_jaxpr(lambda s: rematerialised(nnx.merge(graph, s), batch))(state))
    assert re.search(r"\b(checkpoint|remat2?)\[", text)
    plain, saved = train(square_loss), train(rematerialised)
    assert plain[0][0] > plain[0][-1]
    np.testing.assert_allclose(saved[0], plain[0], rtol=1e-5)
    for a, b in zip(saved[1], plain[1], strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("bits", "codebook"), [(1, "kmeans"), (4, "kmeans"), (2, "auto")])
def test_training_on_a_mesh_of_two_axes(bits, codebook, rng):
    """Matrices cut along one axis and a batch along the other: the losses and weights of one device."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    batches = [
        (
            jnp.asarray(rng.standard_normal((8, 64)), jnp.float32),
            jnp.asarray(rng.standard_normal((8, 10)), jnp.float32),
        )
        for _ in range(4)
    ]
    # Outputs of the first, heads of the second (which are inputs), and the classes of the last.
    cuts = {"inner": P(None, "model"), "heads": P("model"), "lm_head": P(None, "model")}

    def put(array, spec):
        return jax.device_put(array, NamedSharding(mesh, spec))

    def train(sharded: bool):
        model = training.quantisation_aware(Model(), bits=bits, group_size=16, codebook=codebook)
        if sharded:
            graph, state = nnx.split(model)
            whole = jax.tree_util.tree_map_with_path(
                lambda path, a: put(
                    a,
                    next((c for name, c in cuts.items() if name in str(path)), P())
                    if "kernel" in str(path)
                    else P(),
                ),
                state,
            )
            model = nnx.merge(graph, whole)
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        step = training.make_train_step(square_loss, refresh_every=2)
        losses = []
        for x, y in batches:
            pair = (put(x, P("data")), put(y, P("data"))) if sharded else (x, y)
            losses.append(float(step(model, optimizer, pair)))
        return losses, model

    one, apart = train(False)
    several, shared = train(True)
    assert one[0] != one[-1]
    np.testing.assert_allclose(several, one, rtol=2e-5)
    assert shared.inner.kernel[...].sharding.spec == cuts["inner"]
    for a, b in zip(
        jax.tree.leaves(nnx.state(apart, nnx.Param)),
        jax.tree.leaves(nnx.state(shared, nnx.Param)),
        strict=True,
    ):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-3, atol=1e-4)
    exported = training.export(shared)
    x = batches[0][0]
    np.testing.assert_allclose(np.asarray(exported(x)), np.asarray(shared(x)), rtol=1e-4, atol=1e-4)


class Twins(nnx.Module):
    """Two layers of one kernel, and one that may share it in another way."""

    def __init__(self, third=None):
        self.first, self.second = (nnx.Linear(16, 16, rngs=nnx.Rngs(0)) for _ in range(2))
        self.second.kernel = self.first.kernel
        if third is not None:
            self.third = third
            name = "embedding" if isinstance(third, nnx.Embed) else "kernel"
            setattr(third, name, self.first.kernel)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def test_layers_of_one_kernel_train_one(rng):
    """They were two from then on, and drifted apart."""
    model = training.quantisation_aware(Twins(), bits=2, group_size=16)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    step = training.make_train_step(lambda model, x: jnp.mean(jnp.square(model(x) - 1)))
    x = jnp.asarray(rng.standard_normal((8, 16)), jnp.float32)
    before = np.asarray(model.first.kernel[...])
    for _ in range(3):
        step(model, optimizer, x)
    assert model.first.kernel is model.second.kernel
    assert np.abs(before - model.first.kernel[...]).max() > 1e-3
    small = training.export(model)
    weights = [layer.weight.get_value().dequantise() for layer in (small.first, small.second)]
    assert (weights[0] == weights[1]).all()


@pytest.mark.parametrize("kind", ["table", "adapter", "skipped"])
def test_a_kernel_that_is_shared_with_what_is_not_trained_is_refused(kind):
    rngs = nnx.Rngs(0)
    third = {
        "table": lambda: nnx.Embed(16, 16, rngs=rngs),
        "adapter": lambda: nnx.LoRALinear(16, 16, lora_rank=2, rngs=rngs),
        "skipped": lambda: nnx.Linear(16, 16, rngs=rngs),
    }[kind]()
    with pytest.raises(ValueError, match=r"first.kernel and second.kernel and third\.\w+ are one"):
        training.quantisation_aware(Twins(third), bits=2, group_size=16, skip="third")
    training.quantisation_aware(
        nnx.Sequential(Twins(third), nnx.Linear(16, 16, rngs=rngs)), bits=2, skip=r"^layers\.0"
    )
