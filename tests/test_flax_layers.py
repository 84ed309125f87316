"""Every layer class of the installed Flax: quantised at 8 bits it computes what the float layer computes.

The walk takes each class that Flax exports, each constructor argument that changes a computation, and a
subclass with a computation of its own. A class that is new to Flax fails here until it is looked at.
"""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import fdk_jax

X = jax.random.normal(jax.random.key(1), (3, 64))
WORDS = jnp.asarray([[1, 2, 30], [4, 4, 0]])


def double(function):
    """A function of its own for arguments such as dot_general."""
    return lambda *args, **kwargs: 2 * function(*args, **kwargs)


def promote_nnx(args, **kwargs):
    first, *rest = nnx.nn.dtypes.promote_dtype(args, **kwargs)
    return (2 * first, *rest)


def promote_linen(*args, **kwargs):
    first, *rest = nn.dtypes.promote_dtype(*args, **kwargs)
    return [2 * first, *rest]


# Constructor arguments that change a computation, each with a value that is not its default.
ARGUMENTS = dict(
    dtype=jnp.bfloat16,
    precision="highest",
    preferred_element_type=jnp.float32,
    use_bias=False,
    dot_general=double(jax.lax.dot_general),
    dot_general_cls=lambda: double(jax.lax.dot_general),
    qkv_dot_general=double(jax.lax.dot_general),
    out_dot_general=double(jax.lax.dot_general),
    einsum_op=double(jnp.einsum),
    conv_general_dilated=double(jax.lax.conv_general_dilated),
    normalize_qk=True,
    attention_fn=double(nnx.dot_product_attention),
)


def nnx_variants(cls):
    names = inspect.signature(cls.__init__).parameters
    yield {}
    for name, value in ARGUMENTS.items():
        if name in names:
            yield {name: value}
    for name in names:
        if name.endswith("promote_dtype"):
            yield {name: promote_nnx}


R = lambda: nnx.Rngs(0)  # noqa: E731
CARRY = (X[:, :64], X[:, :64])
# For each class: a constructor that takes the variant's arguments, and the arguments of the call.
NNX = {
    "Linear": (lambda c, **k: c(64, 32, rngs=R(), **k), (X,)),
    "LinearGeneral": (lambda c, **k: c(64, (8, 4), rngs=R(), **k), (X,)),
    "Einsum": (lambda c, **k: c("ta,hab->thb", (4, 64, 16), (4, 16), rngs=R(), **k), (X,)),
    "LoRALinear": (lambda c, **k: c(64, 32, lora_rank=4, rngs=R(), **k), (X,)),
    "LoRA": (
        lambda c, **k: c(64, 4, 32, base_module=nnx.Linear(64, 32, rngs=R()), rngs=R(), **k),
        (X,),
    ),
    "MultiHeadAttention": (lambda c, **k: c(4, 64, decode=False, rngs=R(), **k), (X[None],)),
    "Conv": (lambda c, **k: c(64, 8, (3,), rngs=R(), **k), (X[None],)),
    "ConvTranspose": (lambda c, **k: c(64, 8, (3,), rngs=R(), **k), (X[None],)),
    "Embed": (lambda c, **k: c(40, 64, rngs=R(), **k), (WORDS,)),
    "LSTMCell": (lambda c, **k: c(64, 64, rngs=R(), **k), (CARRY, X)),
    "OptimizedLSTMCell": (lambda c, **k: c(64, 64, rngs=R(), **k), (CARRY, X)),
    "SimpleCell": (lambda c, **k: c(64, 64, rngs=R(), **k), (X, X)),
    "GRUCell": (lambda c, **k: c(64, 64, rngs=R(), **k), (X, X)),
    "RNN": (lambda c, **k: c(nnx.GRUCell(64, 64, rngs=R()), rngs=R(), **k), (X[None],)),
    "Bidirectional": (
        lambda c, **k: c(
            *(nnx.RNN(nnx.GRUCell(64, 64, rngs=R()), rngs=R()) for _ in range(2)), **k
        ),
        (X[None],),
    ),
    "Sequential": (lambda c, **k: c(nnx.Linear(64, 64, rngs=R()), jnp.tanh), (X,)),
    "WeightNorm": (lambda c, **k: c(nnx.Linear(64, 32, rngs=R()), rngs=R(), **k), (X,)),
    "SpectralNorm": (lambda c, **k: c(nnx.Linear(64, 32, rngs=R()), rngs=R(), **k), (X,)),
}
# Classes without a matrix, or without a computation.
NO_MATRIX = {
    *(
        "Module",
        "Object",
        "Pytree",
        "List",
        "Dict",
        "Rngs",
        "RngStream",
        "Optimizer",
        "ModelAndOptimizer",
    ),
    *(
        "Metric",
        "MultiMetric",
        "Average",
        "Accuracy",
        "Welford",
        "TrainState",
        "RNNCellBase",
        "PReLU",
    ),
    *(
        "Dropout",
        "BatchNorm",
        "LayerNorm",
        "RMSNorm",
        "GroupNorm",
        "InstanceNorm",
        "RMSPooling",
        "Identity",
    ),
    *(
        "Sow",
        "PytreeMeta",
        "Intermediate",
        "PathParts",
        "ToLinen",
        "ToNNX",
        "ToNNXModule",
        "Recorder",
    ),
    *("ToNNXFlat", "Set", "Tuple", "ModuleBase", "Flatten", "Embedding", "RoPE"),
}


class Root(nnx.Module):
    """Puts a layer under a name."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, *args):
        return self.layer(*args)


def nnx_classes():
    for name in dir(nnx):
        cls = getattr(nnx, name)
        if inspect.isclass(cls) and issubclass(cls, nnx.Module) and cls.__name__ == name:
            yield name


def agree(got, expected, what):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, what
        assert oracle.relative_rms(a, np.asarray(b, np.float64)) < 2e-2, what


def check_nnx(layer, args, what):
    for path, module in nnx.iter_modules(layer):
        if isinstance(module, nnx.LoRA):
            module.lora_b[...] = jax.random.normal(jax.random.key(len(path)), module.lora_b.shape)
    model = Root(layer)
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    before = fdk_jax.summary(model, 8)
    try:
        small = fdk_jax.quantise(model, 8)
    except TypeError as error:
        assert "can be quantised" in str(error), what
        assert set(before.reasons) >= {n for n in names if n in before.kept and n in before.reasons}
        return None
    with jax.numpy_dtype_promotion("standard"):
        agree(small(*args), model(*args), what)
    after = fdk_jax.summary(small, 8)
    assert all("left out" not in reason for reason in after.reasons.values()), after.reasons
    repr(small)
    return small


def nnx_subclass(cls):
    """A subclass with a computation of its own."""

    def call(self, *args, **kwargs):
        return jax.tree.map(lambda a: 3 * a, cls.__call__(self, *args, **kwargs))

    return type("Mine", (cls,), {"__call__": call})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fdk_jax.UnfusedWarning")
@pytest.mark.parametrize("name", NNX)
def test_every_nnx_class(name):
    cls, (make, args) = getattr(nnx, name), NNX[name]
    for kwargs in nnx_variants(cls):
        check_nnx(make(cls, **kwargs), args, (name, kwargs))
    check_nnx(make(nnx_subclass(cls)), args, (name, "subclass"))


def test_arguments_and_subclasses_of_linear():
    """The quick part of the walk."""
    make, args = NNX["Linear"]
    own = dict(dot_general=ARGUMENTS["dot_general"], promote_dtype=promote_nnx)
    for name, value in own.items():
        assert check_nnx(make(nnx.Linear, **{name: value}), args, name) is not None
    assert check_nnx(make(nnx_subclass(nnx.Linear)), args, "subclass") is not None


@pytest.mark.parametrize(
    "name", ["Linear", "LinearGeneral", "Einsum", "LoRALinear", "MultiHeadAttention"]
)
def test_what_is_quantised_by_default(name):
    make, args = NNX[name]
    small = check_nnx(make(getattr(nnx, name)), args, name)
    text = fdk_jax.summary(small)
    assert text.quantised
    assert all("lora" in n or why == "a bias" for n, why in text.reasons.items()), text


def linen_variants(cls):
    fields = cls.__dataclass_fields__
    yield {}
    for name, value in ARGUMENTS.items():
        if name in fields:
            yield {name: double(nn.dot_product_attention) if name == "attention_fn" else value}
    for name in fields:
        if name.endswith("promote_dtype"):
            yield {name: promote_linen}


LINEN = {
    "Dense": (lambda c, **k: c(32, **k), (X,)),
    "DenseGeneral": (lambda c, **k: c((8, 4), **k), (X,)),
    "Einsum": (lambda c, **k: c((4, 64, 16), "ta,hab->thb", **k), (X,)),
    "MultiHeadDotProductAttention": (lambda c, **k: c(4, **k), (X[None], X[None])),
    "MultiHeadAttention": (lambda c, **k: c(4, **k), (X[None], X[None])),
    "SelfAttention": (lambda c, **k: c(4, deterministic=True, **k), (X[None],)),
    "Conv": (lambda c, **k: c(8, (3,), **k), (X[None],)),
    "ConvTranspose": (lambda c, **k: c(8, (3,), **k), (X[None],)),
    "ConvLocal": (lambda c, **k: c(8, (3,), **k), (X[None],)),
    "Embed": (lambda c, **k: c(40, 64, **k), (WORDS,)),
    "LSTMCell": (lambda c, **k: c(64, **k), (CARRY, X)),
    "OptimizedLSTMCell": (lambda c, **k: c(64, **k), (CARRY, X)),
    "SimpleCell": (lambda c, **k: c(64, **k), (X, X)),
    "GRUCell": (lambda c, **k: c(64, **k), (X, X)),
    "MGUCell": (lambda c, **k: c(64, **k), (X, X)),
    "RNN": (lambda c, **k: c(nn.GRUCell(64), **k), (X[None],)),
    "Bidirectional": (
        lambda c, **k: c(nn.RNN(nn.GRUCell(64)), nn.RNN(nn.GRUCell(64)), **k),
        (X[None],),
    ),
    "Sequential": (lambda c, **k: c([nn.Dense(64), jnp.tanh]), (X,)),
    "WeightNorm": (lambda c, **k: c(nn.Dense(32), **k), (X,)),
}
LINEN_NO_MATRIX = {
    *(
        "Module",
        "RNNCellBase",
        "ConvLSTMCell",
        "PReLU",
        "Dropout",
        "BatchNorm",
        "LayerNorm",
        "RMSNorm",
    ),
    *(
        "GroupNorm",
        "InstanceNorm",
        "SpectralNorm",
        "Fp8DotGeneralOp",
        "Fp8DotGeneral",
        "Fp8DirectDotGeneralOp",
    ),
    *("Fp8Einsum", "NANOOFp8DotGeneralOp", "NANOOFp8DotGeneral", "CompactNameScope"),
}


def linen_classes():
    for name in dir(nn):
        cls = getattr(nn, name)
        if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__name__ == name:
            yield name


def check_linen(model, args, what):
    with jax.numpy_dtype_promotion("standard"):
        variables = model.init(jax.random.key(0), *args)
        try:
            small = fdk_jax.quantise(variables, 8)
        except TypeError as error:
            assert "can be quantised" in str(error), what
            return
        agree(
            fdk_jax.quantised_apply(model.apply)(small, *args), model.apply(variables, *args), what
        )


def linen_subclass(cls):
    """A subclass with a computation of its own."""

    class Mine(cls):
        @nn.compact
        def __call__(self, *args, **kwargs):
            return jax.tree.map(lambda a: 3 * a, super().__call__(*args, **kwargs))

    return Mine


def test_no_class_of_flax_is_forgotten():
    for found, known in (
        (nnx_classes(), {*NNX} | NO_MATRIX),
        (linen_classes(), {*LINEN} | LINEN_NO_MATRIX),
    ):
        new = set(found) - known
        assert not new, f"Flax has new classes {new}: are they layers with a matrix?"


def test_arguments_and_subclasses_of_dense():
    """The quick part of the walk."""
    make, args = LINEN["Dense"]
    own = dict(dot_general=ARGUMENTS["dot_general"], promote_dtype=promote_linen)
    for name, value in own.items():
        check_linen(make(nn.Dense, **{name: value}), args, name)
    check_linen(make(linen_subclass(nn.Dense)), args, "subclass")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fdk_jax.UnfusedWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LINEN)
def test_every_linen_class(name):
    cls, (make, args) = getattr(nn, name), LINEN[name]
    for kwargs in linen_variants(cls):
        check_linen(make(cls, **kwargs), args, (name, kwargs))
    if name not in ("RNN", "Bidirectional", "Sequential", "SelfAttention", "MultiHeadAttention"):
        check_linen(make(linen_subclass(cls)), args, (name, "subclass"))
