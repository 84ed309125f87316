"""Several real GPUs: sums through each other's memory, and what models make of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from model_data import in_float32, relative, wide_config, write_folder

from fdk_jax import models
from fdk_jax.benchmark import model_errors
from fdk_jax.models import peers
from pallas_kernels import chain

pytestmark = pytest.mark.skipif(
    sum(device.platform == "gpu" for device in jax.devices()) < 2, reason="needs two GPUs"
)


@pytest.fixture(params=[2, 4])
def parallel(request, monkeypatch):
    count = request.param
    if len(jax.devices()) < count:
        pytest.skip(f"needs {count} GPUs")
    monkeypatch.setenv("FDK_JAX_PEER_SUMS", "1")  # over more GPUs than are taken by default, too
    return models.Parallel(jax.make_mesh((count,), ("model",), devices=jax.devices()[:count]))


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_sums_are_those_of_the_values(rng, parallel, rows, dtype):
    assert peers.unsupported_reason(parallel, 1024) is None
    count, through = parallel.shards, peers.make(parallel, 1024)
    cut, spec = P("model"), peers.specs(parallel)

    def run(through, x):
        for _ in range(5):  # both parts of the mailbox
            total = through.total(x)
        return total

    program = jax.jit(
        jax.shard_map(run, mesh=parallel.mesh, in_specs=(spec, cut), out_specs=cut, check_vma=False)
    )
    x = jax.device_put(
        rng.standard_normal((count * rows, 1024)).astype(dtype), NamedSharding(parallel.mesh, cut)
    )
    found = np.asarray(program(through, x)).reshape(count, rows, 1024)
    assert all(rank.tobytes() == found[0].tobytes() for rank in found)
    terms = np.asarray(x, np.float64).reshape(count, rows, 1024)
    exact = terms.sum(0)
    half = float(jnp.finfo(dtype).eps) / 2
    # Rounded once to x's dtype, after sums in float32.
    allowed = 1.01 * half * np.abs(exact) + (count - 2) * 2.0**-24 * np.abs(terms).sum(0)
    assert (np.abs(np.asarray(found[0], np.float64) - exact) <= allowed).all()


@pytest.mark.parametrize(
    ("bits", "batch", "codebook"),
    [
        *(
            (1, 1, "kmeans"),
            (2, 1, "kmeans"),
            (2, 1, "uniform"),
            (4, 1, "kmeans"),
            (8, 1, "kmeans"),
        ),
        *((4, 7, "kmeans"), (16, 3, "kmeans")),
    ],
)
def test_a_step_of_each_plan_against_float32(monkeypatch, parallel, bits, batch, codebook):
    """By chains for one sequence of quantised weights, else by launches of their own; and by XLA's sums."""
    monkeypatch.setattr(chain, "OVER_DEVICES", (1, 2, 4, 8))
    config = models.ModelConfig(1024, 2048, 4096, 3, 16, 4, 128, dtype="bfloat16")
    model = models.random_model(
        config, bits=bits, codebook=codebook, backend="pallas", parallel=parallel
    )
    through = peers.make(parallel, config.hidden_size)
    for way in (through, None):
        errors = model_errors.measure(model, way, batch=batch, prompt=4)
        for name in ("rel_rms_error", "prefill_rel_rms_error"):
            assert errors[name] < 1.5 * errors[f"plain_{name}"] + 1e-3, errors


@pytest.mark.parametrize("bits", [1, 4, 16])
def test_generated_tokens_are_those_of_sums_by_xla(monkeypatch, parallel, rng, bits):
    config = models.ModelConfig(4096, 1024, 2048, 2, 8, 4, 128, dtype="bfloat16")
    model = models.random_model(config, bits=bits, backend="pallas", parallel=parallel)
    prompts = rng.integers(0, 4096, (1, 9)).tolist()
    found = models.Generator(model)
    assert found.programs.peers is not None
    again = [found.generate(prompts, max_tokens=40).tokens for _ in range(3)]
    assert again[0] == again[1] == again[2]
    monkeypatch.setenv("FDK_JAX_PEER_SUMS", "0")
    plain = models.Generator(model)
    assert plain.programs.peers is None
    other = plain.generate(prompts, max_tokens=40).tokens
    # Tokens that are nearly as good as each other may change places; then all later ones do.
    same = [a == b for a, b in zip(again[0][0], other[0], strict=True)]
    assert all(same[:4]), same


@pytest.mark.parametrize("bits", [1, 4, 16])
def test_logits_of_several_gpus_are_as_far_from_float32_as_those_of_one(tmp_path, parallel, bits):
    """What bfloat16 loses over many layers, in two orders of summation, and how far these are apart."""
    sizes = dict(vocab_size=4096, hidden_size=1024, intermediate_size=2048, num_layers=16)
    sizes |= dict(num_heads=8, num_kv_heads=4, head_dim=128, dtype="bfloat16")
    folder = write_folder(tmp_path / "model", wide_config(**sizes))
    quantisation = None if bits == 16 else models.Quantisation(bits, 64, "kmeans")
    one = models.load(folder, quantisation=quantisation)
    several = models.load(folder, quantisation=quantisation, parallel=parallel)
    tokens = np.random.default_rng(0).integers(0, 4096, (2, 20))
    with jax.default_matmul_precision("highest"):
        exact = np.asarray(models.Generator(in_float32(one)).logits(tokens))
    found = [np.asarray(models.Generator(model).logits(tokens)) for model in (one, several)]
    lost = [relative(logits, exact) for logits in found]
    apart = relative(*found)
    print(f"{bits} bits: one GPU {lost[0]:.4f}, several {lost[1]:.4f}, apart {apart:.4f}")
    assert lost[1] < 1.3 * lost[0] + 1e-3
    assert apart < 1.3 * np.hypot(*lost) + 1e-3
