"""Models of other packages on packed codes: docs/integrations.md has each of these as an example."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import stand_ins
from flax import nnx

import fdk_jax

# What the packages themselves call in JAX and Flax.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TOKENS = jnp.asarray([[2, 5, 7, 9, 30, 61]])
# A model of some layers at 8 bits: errors of the weights of about 0.4% each.
WITHIN = 2e-2


@pytest.fixture(autouse=True)
def _ordinary_promotion():
    """Packages of others rely on JAX's defaults."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def close(got, expected, within=WITHIN):
    assert oracle.relative_rms(got, np.asarray(expected, np.float64)) < within


def test_gemma_in_linen():
    """Hand-written Einsums: self.param("w"), then jnp.einsum."""
    transformer, modules, config = stand_ins.gemma_nn()
    kinds = [modules.AttentionType.GLOBAL, modules.AttentionType.LOCAL_SLIDING]
    model = transformer.Transformer(
        config=config.TransformerConfig(
            num_embed=96,
            embed_dim=64,
            hidden_dim=128,
            num_heads=4,
            head_dim=16,
            num_kv_heads=2,
            final_logit_softcap=None,
            use_post_attn_norm=True,
            use_post_ffw_norm=True,
            attention_types=kinds,
            sliding_window_size=8,
            use_qk_norm=True,
        ),
        dtype=jnp.float32,
        tokens="tokens",
    )
    params = model.init(jax.random.key(0), TOKENS)
    axes = fdk_jax.infer_axes(model.apply, params, TOKENS, tables=True)
    assert sorted(axes.values()) == sorted(2 * ["kkn", "nnkn", "nkn", "nkn", "kn"] + ["nk"])
    small = fdk_jax.quantise(params, 8, group_size=32, axes=axes)
    assert not [n for n, text in fdk_jax.summary(small).kept.items() if "," in text]
    apply = jax.jit(fdk_jax.quantised_apply(model.apply, unfused="raise"))
    close(apply(small, TOKENS).logits, model.apply(params, TOKENS).logits)


def tunix_model(family):
    sizes = dict(
        num_layers=2, embed_dim=64, hidden_dim=128, num_heads=4, head_dim=16, num_kv_heads=2
    )
    name = family.split("_")[0]
    module = stand_ins.tunix_model(name)
    if name == "gemma3":
        make, sizes = module.Gemma3, sizes | dict(num_embed=96, sliding_window_size=4)
        sizes |= dict(num_layers=6, param_dtype=jnp.float32)
    else:
        sizes |= dict(vocab_size=96, rope_theta=10_000, norm_eps=1e-6)
        make = getattr(module, name.capitalize())
    if family == "qwen3_moe":
        sizes |= dict(num_experts=4, num_experts_per_tok=2)
    return make(module.ModelConfig(**sizes), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3", "qwen3_moe", "gemma3"])
def test_tunix(family):
    """Nnx models with Einsums and experts of their own, called as they always were."""
    model = tunix_model(family)
    length = TOKENS.shape[1]
    inputs = (TOKENS, jnp.arange(length)[None], None, jnp.tril(jnp.ones((1, length, length), bool)))
    expected = model(*inputs)[0]
    small = fdk_jax.quantise(model, 8, group_size=32, skip=None, axes={"input_embedding": "nk"})
    text = fdk_jax.summary(small, skip=None)
    kept = {n: why for n, why in text.reasons.items() if "router" not in why}
    assert not kept, kept
    assert ("router" in " ".join(text.reasons.values())) == (family == "qwen3_moe")
    close(jax.jit(lambda m, *a: m(*a)[0])(small, *inputs), expected)


class Block(nn.Module):
    """A layer as MaxText stacks them: DenseGenerals of its own names, scanned along axis 1."""

    @nn.compact
    def __call__(self, h, _):
        kernel = functools.partial(nn.with_logical_partitioning, nn.initializers.lecun_normal())
        q = nn.DenseGeneral(
            (4, 16), kernel_init=kernel(("embed", "heads", "kv")), name="q_proj", use_bias=False
        )(h)
        o = nn.DenseGeneral(64, axis=(-2, -1), name="o_proj", use_bias=False)(jnp.tanh(q))
        return h + nn.Dense(64, name="mlp")(o), None


def test_scanned_layers_along_any_axis():
    model = nn.scan(
        nn.remat(Block),
        variable_axes={"params": 1},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()
    x = jax.random.normal(jax.random.key(0), (2, 5, 64))
    variables = model.init(jax.random.key(1), x, None)
    axes = fdk_jax.infer_axes(model.apply, nn.unbox(variables), x, None)
    assert sorted(axes.values()) == ["kbkn", "kbn", "kbnn"]
    small = fdk_jax.quantise(variables, 8, axes=axes)
    apply = jax.jit(
        fdk_jax.quantised_apply(lambda v, x: model.apply(v, x, None)[0], unfused="raise")
    )
    close(apply(small, x), model.apply(variables, x, None)[0])


def test_equinox():
    eqx = pytest.importorskip("equinox", reason="equinox is not installed")

    class Net(eqx.Module):
        tok: eqx.nn.Embedding
        mlp: eqx.nn.MLP
        conv: eqx.nn.Conv1d

        def __init__(self, key):
            self.tok = eqx.nn.Embedding(40, 64, key=key)
            self.mlp = eqx.nn.MLP(64, 32, 128, 2, key=key)
            self.conv = eqx.nn.Conv1d(1, 4, 3, key=key)

        def __call__(self, i):
            return self.conv(self.mlp(self.tok(i))[None])

    net = Net(jax.random.key(0))
    small = fdk_jax.quantise(net, 8)
    text = fdk_jax.summary(small)
    assert len(text.quantised) == 3
    assert "table" in text.reasons["tok.weight"] and "convolution" in text.reasons["conv.weight"]
    assert isinstance(small, Net)
    run = lambda net, ids: jax.vmap(net)(ids)  # noqa: E731
    expected = run(net, TOKENS[0])
    close(
        fdk_jax.quantised_apply(run, unfused="raise")(small, TOKENS[0] % 40),
        run(net, TOKENS[0] % 40),
    )
    assert expected.shape[0] == TOKENS.shape[1]
    # Without it too: equinox's Linear writes weight @ x.
    close(small.mlp(jnp.ones(64)), net.mlp(jnp.ones(64)))


def test_haiku():
    hk = pytest.importorskip("haiku", reason="dm-haiku is not installed")

    def forward(ids):
        h = hk.Embed(96, 64)(ids)
        h = h + hk.MultiHeadAttention(4, 16, w_init=hk.initializers.VarianceScaling())(h, h, h)
        return hk.Linear(96)(jax.nn.relu(hk.Linear(128)(h)))

    model = hk.without_apply_rng(hk.transform(forward))
    params = model.init(jax.random.key(0), TOKENS)
    small = fdk_jax.quantise(params, 8)
    assert len(fdk_jax.summary(small).quantised) == 6
    close(
        jax.jit(fdk_jax.quantised_apply(model.apply, unfused="raise"))(small, TOKENS),
        model.apply(params, TOKENS),
    )


def test_keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="keras is not installed")
    if keras.backend.backend() != "jax":
        pytest.skip("keras runs on another backend")
    model = keras.Sequential(
        [
            keras.layers.Input((8, 64)),
            keras.layers.EinsumDense("abc,cde->abde", output_shape=(8, 4, 16), bias_axes="de"),
            keras.layers.Reshape((8, 64)),
            keras.layers.Dense(32, activation="relu"),
        ]
    )
    x = jax.random.normal(jax.random.key(0), (2, 8, 64))
    weights = [v.value for v in model.trainable_variables]
    states = [v.value for v in model.non_trainable_variables]
    apply = lambda weights, x: model.stateless_call(weights, states, x)[0]  # noqa: E731
    with pytest.raises(TypeError, match="infer_axes"):
        fdk_jax.quantise(weights)
    small = fdk_jax.quantise(weights, 8, axes=fdk_jax.infer_axes(apply, weights, x))
    assert [w.axes for w in small if fdk_jax.is_quantised(w)] == ["knn", "kn"]
    close(jax.jit(fdk_jax.quantised_apply(apply, unfused="raise"))(small, x), apply(weights, x))


class Mlp(nnx.Module):
    """Two Linears for adapters."""

    def __init__(self, rngs):
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.down = nnx.Linear(128, 64, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.relu(self.up(x)))


def test_qwix_adapters_then_codes():
    qwix = pytest.importorskip("qwix", reason="qwix is not installed")
    x = jax.random.normal(jax.random.key(0), (4, 64))
    provider = qwix.LoraProvider(module_path=".*", rank=4, alpha=8.0)
    model = qwix.apply_lora_to_model(Mlp(nnx.Rngs(0)), provider, x, rngs=nnx.Rngs(1))
    adapters = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, jax.tree.map(lambda a: a + 0.1, adapters))
    small = fdk_jax.quantise(model, 8)
    assert len(fdk_jax.summary(small).quantised) == 2
    assert len(jax.tree.leaves(nnx.state(small, nnx.LoRAParam))) == 4
    close(small(x), model(x))


def test_codes_then_qwix_adapters():
    """Adapters beside codes, of Linears and of Einsums; they train, and the codes stay."""
    qwix = pytest.importorskip("qwix", reason="qwix is not installed")
    x = jax.random.normal(jax.random.key(0), (16, 64))
    provider = qwix.LoraProvider(module_path=".*", rank=4, alpha=8.0)
    small = fdk_jax.quantise(Mixed(nnx.Rngs(0)), 4)
    model = qwix.apply_lora_to_model(small, provider, x, rngs=nnx.Rngs(1))
    adapters = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    assert {".".join(path) for path, _ in adapters} == {
        f"{name}_lora_{part}" for name in ("up.weight", "mix.kernel") for part in "ab"
    }
    assert len(fdk_jax.summary(model).quantised) == 2
    close(model(x), small(x), 1e-5)
    train(model, nnx.LoRAParam, x, jnp.roll(x, 1, axis=1))
    up, mix = model.up, model.mix
    h = fdk_jax.matmul(x, small.up.weight.get_value(), bias=up.bias[...])
    h = jax.nn.relu(h + 2 * x @ up.weight_lora_a[...] @ up.weight_lora_b[...])
    y = fdk_jax.einsum("td,dnh->tnh", h, small.mix.kernel.get_value())
    y += 2 * jnp.einsum("td,dr,rnh->tnh", h, mix.kernel_lora_a[...], mix.kernel_lora_b[...])
    close(model(x), y.reshape(x.shape), 1e-5)


class Mixed(nnx.Module):
    """A Linear and an Einsum."""

    def __init__(self, rngs):
        self.up = nnx.Linear(64, 64, rngs=rngs)
        self.mix = nnx.Einsum("td,dnh->tnh", (64, 4, 16), rngs=rngs)

    def __call__(self, x):
        return self.mix(jax.nn.relu(self.up(x))).reshape(x.shape)


def test_adapters_around_quantised_layers_train():
    """The other order: nnx.LoRA around a QuantisedLinear."""
    x = jax.random.normal(jax.random.key(0), (16, 64))
    target = jnp.roll(x, 1, axis=1)
    model = fdk_jax.quantise(Mlp(nnx.Rngs(0)), 4)
    for name in ("up", "down"):
        base = getattr(model, name)
        adapter = nnx.LoRA(
            base.in_features, 8, base.out_features, base_module=base, rngs=nnx.Rngs(1)
        )
        setattr(model, name, adapter)
    train(model, nnx.LoRAParam, x, target)


def train(model, kind, x, target, steps=40, within=0.8):
    optimiser = nnx.Optimizer(model, optax.adam(1e-2), wrt=kind)

    @nnx.jit
    def step(model, optimiser):
        loss = lambda model: jnp.square(model(x) - target).mean()  # noqa: E731
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, kind))(model)
        optimiser.update(model, grads)
        return value

    losses = [float(step(model, optimiser)) for _ in range(steps)]
    assert losses[-1] < within * losses[0], losses


class DoRA(nnx.Module):
    """Weight-decomposed adaptation: a magnitude a row, a direction from the quantised base plus A B."""

    def __init__(self, base: fdk_jax.QuantisedLinear, rank: int, rngs: nnx.Rngs):
        self.base = base
        kernel = base.kernel.get_value().dequantise()
        self.a = nnx.LoRAParam(rngs.normal((base.in_features, rank)) / base.in_features**0.5)
        self.b = nnx.LoRAParam(jnp.zeros((rank, base.out_features)))
        self.magnitude = nnx.LoRAParam(jnp.linalg.norm(kernel, axis=0))

    def __call__(self, x):
        a, b = self.a[...], self.b[...]
        kernel = jax.lax.stop_gradient(self.base.kernel.get_value().dequantise() + a @ b)
        scale = self.magnitude[...] / jnp.linalg.norm(kernel, axis=0)
        product = fdk_jax.matmul(x, self.base.kernel.get_value()) + x @ a @ b
        return product * scale + self.base.bias[...]


def test_dora_trains():
    x = jax.random.normal(jax.random.key(0), (16, 64))
    model = fdk_jax.quantise(Mlp(nnx.Rngs(0)), 4)
    before = model(x)
    model.up, model.down = DoRA(model.up, 8, nnx.Rngs(1)), DoRA(model.down, 8, nnx.Rngs(2))
    close(model(x), before, 1e-5)
    train(model, nnx.LoRAParam, x, jnp.roll(x, 1, axis=1))


def train_parts(model, select, x, target, rate=2e-3):
    """Trains what `fdk_jax.trainable` takes out of a model; returns that and the trained model."""
    trained, whole = fdk_jax.trainable(model, select)
    optimiser = optax.adam(rate)

    @jax.jit
    def step(trained, state):
        loss = lambda trained: jnp.square(whole(trained)(x) - target).mean()  # noqa: E731
        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(trained, updates), state, value

    state, losses = optimiser.init(trained), []
    for _ in range(30):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0], losses
    return trained, whole(trained)


def test_scales_and_codebooks_train():
    x = jax.random.normal(jax.random.key(0), (16, 64))
    model = Mlp(nnx.Rngs(0))
    small = fdk_jax.quantise(model, 2, codebook="uniform")
    names = {f"{n}.weight.{part}" for n in ("up", "down") for part in ("scales", "codebook")}
    trained, after = train_parts(small, r"\.(scales|codebook)$", x, model(x))
    assert set(trained) == names
    w = after.up.weight.get_value()
    assert (w.packed == small.up.weight.get_value().packed).all() and not w.uniform
    assert (w.scales == trained["up.weight.scales"]).all()
    assert small.up.weight.get_value().uniform


def test_adapters_and_scales_train_together():
    """QLoRA with trainable scales, on the layout of a kernel."""
    x = jax.random.normal(jax.random.key(0), (16, 64))
    model = fdk_jax.prepare(fdk_jax.quantise(Mlp(nnx.Rngs(0)), 4, codebook="uniform"))
    for name in ("up", "down"):
        base = getattr(model, name)
        sizes = base.in_features, 8, base.out_features
        setattr(model, name, nnx.LoRA(*sizes, base_module=base, rngs=nnx.Rngs(1)))
    trained, after = train_parts(model, r"lora|scales$", x, jnp.roll(x, 1, axis=1), 1e-2)
    assert len(trained) == 6
    for name in ("up", "down"):
        old, new = (getattr(m, name).base_module.weight.get_value() for m in (model, after))
        assert (old.packed == new.packed).all() and (old.codebook == new.codebook).all()
        assert (old.scales != new.scales).any() and new.uniform
        assert (getattr(after, name).lora_b[...] != 0).any()


def test_parts_of_trees_are_trained_by_name():
    w = fdk_jax.quantise(jnp.ones((8, 64)), 4)
    tree = {"a": {"kernel": w, "bias": nn.Partitioned(jnp.ones(8), ("n",))}, "n": jnp.ones(3)}
    found, whole = fdk_jax.trainable(tree, "^a")
    assert set(found) == {"a.kernel.scales", "a.kernel.codebook", "a.bias"}
    new = whole(jax.tree.map(lambda a: 2 * a, found))
    assert (new["a"]["kernel"].dequantise() == 4 * w.dequantise()).all()
    assert new["a"]["bias"].names == ("n",) and (new["a"]["bias"].value == 2).all()
    assert new["n"] is tree["n"]
    with pytest.raises(ValueError, match=r"select='b\$' finds none of \['a.bias', 'a.kernel"):
        fdk_jax.trainable(tree, "b$")


def test_penzai():
    """Frozen parameters bind to a model; its named arrays hold packed weights as they hold others."""
    pz = pytest.importorskip("penzai.pz", reason="penzai is not installed")
    from penzai.models import simple_mlp

    rng = jax.random.key(0)
    sizes = [64, 128, 32]
    model = simple_mlp.MLP.from_config(name="mlp", init_base_rng=rng, feature_sizes=sizes)
    x = pz.nx.wrap(jax.random.normal(jax.random.key(1), (4, 64))).tag("batch", "features")
    with pytest.raises(TypeError, match="a Parameter, not an array"):
        fdk_jax.quantise(model)
    unbound, params = pz.unbind_params(model, freeze=True)
    apply = lambda params, x: pz.bind_variables(unbound, params)(x)  # noqa: E731
    axes = fdk_jax.infer_axes(apply, params, x)
    assert list(axes.values()) == ["kn", "kn"]
    small = fdk_jax.quantise(params, 8, axes=axes)
    got = jax.jit(fdk_jax.quantised_apply(apply, unfused="raise"))(small, x)
    close(got.unwrap("batch", "features"), model(x).unwrap("batch", "features"))


def test_qwix_arrays_in_and_out():
    """A QArray of 4 or 8 bits with one scale a tile of K is a weight with evenly spaced levels, exactly."""
    qwix = pytest.importorskip("qwix", reason="qwix is not installed")
    from fdk_jax.layers import qwix_arrays

    w = jax.random.normal(jax.random.key(0), (64, 24))
    for qtype, bits in (("int8", 8), ("int4", 4)):
        array = qwix.quantize(w, qtype, channelwise_axes=(1,), tiled_axes={0: 32})
        ours = qwix_arrays.from_qarray(array, axes="kn")
        assert ours.bits == bits and ours.group_size == 32
        np.testing.assert_allclose(
            np.asarray(ours), np.asarray(qwix.dequantize(array)), rtol=1e-6, atol=1e-7
        )
        back = qwix_arrays.to_qarray(ours)
        np.testing.assert_allclose(
            np.asarray(qwix.dequantize(back)), np.asarray(ours), rtol=1e-6, atol=1e-7
        )
    affine = qwix.quantize(w, "int8", channelwise_axes=(1,), calibration_method="minmax")
    with pytest.raises(ValueError, match="zero point"):
        qwix_arrays.from_qarray(affine, axes="kn")


def test_the_names_of_the_rules_match_one_leaf_each():
    tree = {"a": {"w": jnp.ones((2, 64, 64))}, "aXw": jnp.ones((2, 64, 64))}
    axes = fdk_jax.infer_axes(
        lambda t, x: jnp.einsum("eb,ebc->ec", x, t["a"]["w"]), tree, jnp.ones((2, 64))
    )
    assert list(axes) == [r"^a\.w$"] and axes[r"^a\.w$"] == "bkn"
    assert not re.search(r"^a\.w$", "aXw")
