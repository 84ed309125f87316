"""GPU programs without Pallas' Triton lowering, the day that it goes or by the switch: lowered, not run."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from backends import for_a_gpu

import fdk_jax
import pallas_kernels
from fdk_jax import models
from fdk_jax.models.config import ModelConfig
from pallas_kernels import choice, target
from pallas_kernels.case import Case
from pallas_kernels.target import H200, using

WITHOUT = H200.__class__(**(H200.__dict__ | {"triton": False}))


def _lower(program, *arguments):
    return jax.jit(program).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("m", [1, 16, 64, 1000])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_products_lower_without_triton(rng, bits, m):
    weight = jnp.asarray(rng.normal(size=(256, 1024)), jnp.bfloat16)
    w = fdk_jax.prepare(fdk_jax.quantise(weight, bits), "pallas")
    x = jax.ShapeDtypeStruct((m, 1024), jnp.bfloat16)
    with using(WITHOUT):
        text = _lower(fdk_jax.matmul, x, w)
    assert ("xla.gpu.ptx" in text or "mosaic_gpu" in text) and "xla.gpu.triton" not in text


def test_what_only_triton_runs_is_left_to_xla(rng):
    weight = jnp.asarray(rng.normal(size=(64, 512)), jnp.float32)
    w = fdk_jax.prepare(fdk_jax.quantise(weight, 4), "pallas")
    x = jnp.ones((3, 512), jnp.float32)
    with using(WITHOUT):
        text = _lower(fdk_jax.matmul, x, w)
        assert "custom_call @__gpu" not in text
        told = fdk_jax.explain(x, w, platform="cuda")
        assert told.backend == "xla" and "no Triton lowering" in told.reason
        arrays = (x, w.packed, w.scales, w.codebook)
        spec = dict(bits=4, group_size=64, out_features=64, uniform=w.uniform)
        product = functools.partial(pallas_kernels.matmul, **spec)
        with pytest.raises(NotImplementedError, match="no Triton lowering"):
            product(*arrays)
    with using(H200), for_a_gpu():
        assert "xla.gpu.triton" in _lower(product, *arrays)


def test_a_models_step_lowers_without_triton():
    config = ModelConfig(512, 64, 128, 2, 4, 2, 32)
    with using(WITHOUT):
        model = models.random_model(config, bits=4, backend="pallas")
        cache = models.KVCache(
            *[(jnp.zeros((1, 2, 64, 32), jnp.bfloat16),) * 2] * 2, jnp.asarray([3], jnp.int32)
        )
        text = _lower(lambda token, cache: model.decode(token, cache)[0], jnp.asarray([1]), cache)
    assert "xla.gpu.ptx" in text and "xla.gpu.triton" not in text


def test_the_switch_and_a_jax_without_the_lowering():
    """In processes of their own: the modules are taken away before they are imported."""
    root = Path(__file__).parent.parent
    gone = "import sys\n" + "".join(
        f"sys.modules[{name!r}] = None\n"
        for name in ("jax.experimental.pallas.triton", "jax._src.pallas.triton")
    )
    ask = (
        "from pallas_kernels import target, triton_compat\n"
        "import fdk_jax\n"
        "print(triton_compat.AVAILABLE, target.current().triton)\n"
    )
    for code, switch, told in ((ask, "0", "True False"), (gone + ask, "1", "False False")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=root,
            env=os.environ | {"FDK_JAX_TRITON": switch},
        )
        assert done.stdout.strip() == told, done.stderr


def test_a_switch_that_means_nothing_is_refused(monkeypatch):
    monkeypatch.setenv("FDK_JAX_TRITON", "no")
    with pytest.raises(ValueError, match="must be 0 or 1"):
        target._has_triton()


def test_plans_are_the_same_without_triton():
    half = jnp.dtype(jnp.bfloat16)
    case = Case(16, 4096, 4096, 4, 64, 1, half, half, None, half)
    assert choice.choose(case, WITHOUT) == choice.choose(case, H200)
