"""What `quantise` takes, what it leaves and why, and what it refuses: never a silent nothing."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict

import fdk_jax

W = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
STACK = np.stack([W, W, W])


def names(tree):
    return set(fdk_jax.summary(tree).quantised)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"a/kernel": W}, {"a.kernel"}),
        ({"a.kernel": W}, {"a.kernel"}),
        (flatten_dict({"a": {"b": {"kernel": W}}}), {"a.b.kernel"}),
        ({"linear": {"w": W, "b": W[0]}}, {"linear.w"}),
        ({"a": {"kernel": W.astype(np.float64)}}, {"a.kernel"}),
        ({"a": {"kernel": W.astype(">f4")}}, {"a.kernel"}),
        ({"params": {"a": {"kernel": nn.Partitioned(W, ("x", "y"))}}}, {"params.a.kernel"}),
        ({"a": {"kernel": nn.LogicallyPartitioned(W, ("x", "y"))}}, {"a.kernel"}),
        (
            {"embed_proj": {"kernel": W}, "norm_in": {"kernel": W}},
            {"embed_proj.kernel", "norm_in.kernel"},
        ),
        (
            {"a": {"kernel": W}, "lm_head": {"kernel": W}, "m": {"lm_head": {"kernel": W}}},
            {"a.kernel"},
        ),
        ({"q_proj": {"kernel": W.reshape(64, 4, 16), "bias": np.ones((4, 16))}}, {"q_proj.kernel"}),
        ({"layers": {"kernel": STACK, "bias": np.ones((3, 64))}}, {"layers.kernel"}),
    ],
)
def test_what_is_taken(tree, expected):
    assert names(fdk_jax.quantise(tree, 4)) == expected


def test_orientations_from_the_bias_and_the_names_of_boxes():
    tree = {
        "q": {"kernel": W.reshape(64, 4, 16), "bias": np.ones((4, 16))},
        "s": {"kernel": STACK, "bias": np.ones((3, 64))},
        "t": {"kernel": STACK.swapaxes(0, 1), "bias": np.ones((64, 3))},
        "u": {"kernel": nn.Partitioned(STACK.swapaxes(0, 1), ("in", "layers", "out"))},
    }
    q = fdk_jax.quantise(tree, 4)
    found = {name: q[name]["kernel"].axes for name in tree}
    assert found == {"q": "knn", "s": "kn", "t": "kbn", "u": "kbn"}
    assert q["s"]["kernel"].batch_shape == q["t"]["kernel"].batch_shape == (3,)


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({"q_einsum": {"w": np.ones((4, 64, 16), np.float32)}}, "no known orientation"),
        ({"tok": {"weight": W}}, "table"),
        ({"patch": {"weight": np.ones((8, 4, 3), np.float32)}}, "taps"),
        (
            {"stem": {"kernel": np.ones((3, 64, 32), np.float32), "bias": np.ones(32)}},
            "no orientation",
        ),
        ({"router": {"kernel": W}}, "router"),
        ({"moe": {"gate": {"kernel": W}}}, "router"),
        ({"opt_state": {"mu": {"a": {"kernel": W}}}}, "optimiser"),
        ({"lm_head": {"kernel": W}}, "skip="),
        ({"a": {"kernel": np.ones((3, 4), np.float32)}}, r"grow from 48 to \d+ bytes"),
        ({"a": {"kernel": np.ones((64, 64), np.int32)}}, "int32"),
        ({"a": {"bias": W[0]}}, "fewer than two axes"),
        ({"a": {"table": W}}, "no known name"),
        (["a", [W]], "no known name"),
        (nn.Dense(3), "Dense, not an array"),
        (nn.Dense, "a type, not an array"),
        (None, "no arrays"),
        ({}, "no arrays"),
        (nnx.Embed(64, 64, rngs=nnx.Rngs(0)), "table"),
        (nnx.Conv(3, 4, (3,), rngs=nnx.Rngs(0)), "convolution"),
    ],
)
def test_nothing_is_never_silent(tree, reason):
    with pytest.raises(TypeError, match=reason) as error:
        fdk_jax.quantise(tree)
    assert "infer_axes" in str(error.value) and "axes=" in str(error.value)


def test_the_summary_says_why():
    tree = {"a": {"kernel": W}, "small": {"kernel": W[:3, :4]}, "tok": {"weight": W}}
    text = fdk_jax.summary(fdk_jax.quantise(tree))
    assert set(text.reasons) == {"small.kernel", "tok.weight"}
    assert "grow" in text.reasons["small.kernel"] and "table" in str(text)
    larger = fdk_jax.summary({"a": fdk_jax.quantise(W[:2, :4], 8)})
    assert "x larger" in str(larger)


def test_states_of_optimisers_are_left_alone():
    params = {"a": {"kernel": jnp.asarray(W)}}
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3))
    small = fdk_jax.quantise(state)
    assert isinstance(small, TrainState) and names(small) == {"params.a.kernel"}
    with pytest.raises(TypeError, match="optimiser"):
        fdk_jax.quantise(state.opt_state)
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    optimiser = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    with pytest.raises(TypeError, match="can be quantised"):
        fdk_jax.quantise(nnx.state(optimiser))


def test_rules_name_themselves():
    tree = {"q_proj": {"kernel": W, "bias": W[0]}}
    assert names(fdk_jax.quantise(tree, axes={"q_proj": "nk"})) == {"q_proj.kernel"}
    with pytest.raises(TypeError, match=re.escape("the rule 'q_proj': 'knn'")):
        fdk_jax.quantise(tree, axes={"q_proj": "knn"})
    with pytest.raises(TypeError, match=r"the rule 'q_proj': None"):
        fdk_jax.quantise(tree, axes={"q_proj": None})
    with pytest.raises(ValueError, match="the rule 'q_proj': 'xy'"):
        fdk_jax.quantise(tree, axes={"q_proj": "xy"})
    with pytest.raises(ValueError, match=r"the rule '\('"):
        fdk_jax.quantise(tree, axes={"(": "kn"})


class Holder(nnx.Module):
    """Layers in a tuple, tied ones, and a parameter of its own."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.pair = nnx.data((nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 64, rngs=rngs)))
        self.tied = nnx.Linear(64, 64, rngs=rngs)
        self.tied.kernel = self.pair[0].kernel
        self.own = nnx.Param(jnp.asarray(W))

    def __call__(self, x):
        for layer in (*self.pair, self.tied):
            x = jnp.tanh(layer(x))
        return x @ self.own


def test_nnx_models_with_tuples_ties_and_parameters_of_their_own():
    model, x = Holder(), jnp.ones((2, 64))
    small = fdk_jax.quantise(model, 8)
    assert isinstance(small.pair[1], fdk_jax.QuantisedLinear)
    assert small.tied.weight is small.pair[0].weight
    assert "Holder is no layer whose computation is known" in fdk_jax.summary(small).reasons["own"]
    all_of_it = fdk_jax.quantise(model, 8, axes={"^own$": "kn"})
    expected = np.asarray(model(x), np.float64)
    for got in (small(x), all_of_it(x), jax.jit(lambda m, x: m(x))(all_of_it, x)):
        assert oracle.relative_rms(got, expected) < 3e-2
    with pytest.raises(TypeError, match="no layer whose computation is known"):
        fdk_jax.quantise(_Own())


def test_weights_in_containers_are_named():
    model = _Own()
    model.own = nnx.data({"a": nnx.Param(jnp.asarray(W))})
    with pytest.raises(TypeError, match=r"own\.a \(in a container"):
        fdk_jax.quantise(model)
    model.own = nnx.Dict(a=nnx.Param(jnp.asarray(W)))
    with pytest.raises(TypeError, match=r"own\.a \(Dict is no layer whose computation is known"):
        fdk_jax.quantise(model)


class _Own(nnx.Module):
    def __init__(self):
        self.own = nnx.Param(jnp.asarray(W))


def test_a_state_is_merged_and_runs():
    model, x = nnx.Linear(64, 64, rngs=nnx.Rngs(0)), jnp.ones((2, 64))
    graph, state = nnx.split(model)
    small = fdk_jax.quantise(state, 8)
    merged, exact = (nnx.merge(graph, tree) for tree in (small, fdk_jax.dequantise(small)))
    fused = fdk_jax.quantised_apply(lambda m, x: m(x), unfused="raise")
    np.testing.assert_allclose(fused(merged, x), exact(x), rtol=1e-5, atol=1e-5)
    with pytest.warns(fdk_jax.UnfusedWarning):
        np.testing.assert_allclose(merged(x), exact(x), rtol=1e-5, atol=1e-5)


class Same(nnx.Linear):
    """Computes what nnx.Linear computes, and says so."""

    computes_as = nnx.Linear

    def __call__(self, x):
        return x @ self.kernel[...] + self.bias[...][None]


class Other(Same):
    """Inherits the word, not the computation."""

    def __call__(self, x):
        return 2 * super().__call__(x)


def test_a_subclass_that_says_it_computes_what_its_base_does_is_replaced():
    x = jnp.ones((2, 64))
    same, other = (cls(64, 64, rngs=nnx.Rngs(0)) for cls in (Same, Other))
    assert type(fdk_jax.quantise(same, 8)) is fdk_jax.QuantisedLinear
    kept = fdk_jax.quantise(other, 8)
    assert isinstance(kept, Other)
    exact = fdk_jax.dequantise(kept.kernel[...])
    wanted = 2 * (x @ exact + other.bias[...][None])
    np.testing.assert_allclose(kept(x), wanted, rtol=1e-5, atol=1e-5)
    assert "say computes_as = nnx.Linear in its body" in str(fdk_jax.summary(other))
    for wrong in (nnx.LinearGeneral, "nnx.Linear"):
        made = type("Wrong", (nnx.Linear,), {"computes_as": wrong})(64, 64, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"Wrong: computes_as .* must be a base of it"):
            fdk_jax.quantise(made)


class Noting(nnx.Module):
    """Changes its attributes while it runs."""

    def __init__(self):
        self.w = nnx.Param(jnp.asarray(W))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
        self.kind, self.old = "new", nnx.Variable(jnp.ones(1))

    def __call__(self, x):
        self.calls[...] += 1
        self.kind = "called"
        if hasattr(self, "old"):
            del self.old
        self.sow(nnx.Intermediate, "seen", x.sum())
        return x @ self.w


@pytest.mark.filterwarnings("ignore:Using .Module.sow:DeprecationWarning")
def test_modules_that_change_themselves_do_so_on_packed_codes_too():
    model, x = Noting(), jnp.ones((2, 64))
    small = fdk_jax.quantise(model, 8, axes={"^w$": "kn"})
    for calls in (1, 2):
        model(x)
        small(x)
        assert small.calls[...] == calls and small.kind == "called" and not hasattr(small, "old")
        assert len(small.seen.get_value()) == calls and small.seen.get_value()[-1] == 128
    assert fdk_jax.is_quantised(small.w.get_value())
    assert nnx.state(model, nnx.Intermediate) == nnx.state(small, nnx.Intermediate)


@pytest.mark.parametrize("axes", ["nk", "kn", "nkn"])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_rule_with_other_axes_changes_no_computation(axes, prepared):
    """A square kernel fits its transpose, too: the layer went on with that, without a word."""
    module = nnx.Sequential(
        nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.Linear(64, 64, rngs=nnx.Rngs(1))
    )
    if axes == "nkn":
        module = nnx.LinearGeneral(8, (8, 8), rngs=nnx.Rngs(0))
    x = np.random.default_rng(1).standard_normal((3, 8 if axes == "nkn" else 64)).astype(np.float32)
    small = fdk_jax.quantise(module, 8, axes={"kernel": axes}, group_size=8)
    small = fdk_jax.prepare(small) if prepared else small
    if axes == "kn":
        y = small(x)
    else:
        with pytest.warns(fdk_jax.UnfusedWarning, match=f"was quantised as '{axes}'"):
            y = small(x)
    assert oracle.relative_rms(y, module(x)) < 2e-2


@pytest.mark.parametrize("key", ["net/~/a", ("net", "a"), "net.a"])
def test_inferred_axes_have_the_names_that_quantise_has(key):
    """Haiku's names have slashes, flat dictionaries tuples: rules of other names found no leaf."""
    tree, x = {key: {"odd": W}}, jnp.ones((2, 64))
    apply = lambda tree, x: x @ tree[key]["odd"].T  # noqa: E731
    small = fdk_jax.quantise(tree, 8, axes=fdk_jax.infer_axes(apply, tree, x))
    y = fdk_jax.quantised_apply(apply, unfused="raise")(small, x)
    assert small[key]["odd"].axes == "nk" and oracle.relative_rms(y, apply(tree, x)) < 2e-2


def test_axes_are_inferred_of_boxes_too():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("a", "b"))
    model, x = nn.Dense(32, kernel_init=init), jnp.ones((2, 64))
    boxed = model.init(jax.random.key(0), x)
    axes = fdk_jax.infer_axes(model.apply, boxed, x)
    assert axes == fdk_jax.infer_axes(model.apply, nn.unbox(boxed), x) != {}
    assert names(fdk_jax.quantise(boxed, 8, axes=axes)) == {"params.kernel"}


def test_numbers_in_the_other_order_of_bytes_are_the_same():
    codes = [fdk_jax.quantise(w, 4).packed for w in (W, W.astype(">f4"), W.astype(">f8"))]
    assert (codes[0] == codes[1]).all() and (codes[0] == codes[2]).all()


def test_inputs_that_flax_takes():
    """Lists, and float64 of numpy, which is float32 for JAX."""
    layer, x = (
        nnx.Linear(64, 64, rngs=nnx.Rngs(0)),
        np.random.default_rng(1).standard_normal((3, 64)),
    )
    small = fdk_jax.quantise(layer, 8)
    for inputs in (x, x.tolist(), x.astype(np.float16), (10 * x).astype(np.int32)):
        with jax.numpy_dtype_promotion("standard"):
            expected, got = layer(inputs), small(inputs)
        assert got.dtype == expected.dtype and oracle.relative_rms(got, expected) < 2e-2
