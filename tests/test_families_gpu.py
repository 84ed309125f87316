"""Every model family on a GPU: tiny random models against transformers' logits and a CPU's float32."""

import jax
import numpy as np
import pytest
from test_families import expected, golden, relative, write

from fdk_jax import models

if jax.default_backend() != "gpu":
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

__all__ = ["expected"]  # a fixture
QUANTISATION = models.Quantisation(4, 32)
# Of a token that is not the best one, in standard deviations of the logits: bfloat16 leaves no order among
# those that are nearer, or nearer than what it loses.
NEAR = 0.15


def generator(folder, quantisation=None, **options) -> models.Generator:
    """Of the model in a folder, for as many tokens as the expected values have."""
    model = models.load(folder, quantisation=quantisation, **options)
    return models.Generator(model, max_context=golden.TOKENS)


@pytest.mark.parametrize("name", golden.MODELS)
def test_float32_equals_transformers(name, expected, tmp_path):
    folder = write(name, expected, tmp_path)
    tokens = expected[f"{name}/tokens"].astype(np.int32)
    with jax.default_matmul_precision("highest"):
        logits = generator(folder, dtype="float32").logits(tokens)[:, ::4]
    error = relative(logits, expected[f"{name}/logits"])
    print(f"{name}: {error:.1e}")
    assert error < 5e-5


@pytest.mark.parametrize("name", golden.MODELS)
def test_quantised_weights_in_the_kernels(name, expected, tmp_path):
    """No further from float32 than XLA's own products in bfloat16 on a CPU; decoding follows its own logits."""
    folder = write(name, expected, tmp_path)
    tokens, config = expected[f"{name}/tokens"].astype(np.int32), str(expected[f"{name}/config"])
    with jax.default_device(jax.devices("cpu")[0]):
        kind = dict(quantisation=QUANTISATION, backend="xla")
        exact = generator(folder, dtype="float32", **kind).logits(tokens)
        plain = rms(generator(folder, dtype="bfloat16", **kind).logits(tokens), exact)
    ours = generator(folder, QUANTISATION, dtype="bfloat16", backend="pallas")
    error = rms(ours.logits(tokens), exact)
    print(f"{name}: {error:.1e}, plain {plain:.1e}")
    assert error < 1.5 * plain + 2e-3

    prompt, count = golden.prompt_of(name), expected[f"{name}/greedy"].shape[1]
    found = ours.generate(tokens[:, :prompt].tolist(), max_tokens=count).tokens
    whole = np.concatenate([tokens[:, :prompt], np.asarray(found)], axis=1)
    logits = np.asarray(ours.logits(whole), np.float64)[:, prompt - 1 : -1]
    chosen = np.take_along_axis(logits, np.asarray(found)[..., None], -1)[..., 0]
    # Two logits of two passes that round in other places: each is off by `plain`, so their order by twice that.
    far = np.mean(logits.max(-1) - chosen > max(NEAR, 2 * plain) * logits.std())
    if "dynamic" in name:
        return  # cached keys keep the rotation of the length that the text had then
    # Where two experts are nearly tied, one roundings' difference takes the other one.
    assert far <= (0.03 if "num_experts" in config or "num_local_experts" in config else 0)


def rms(found, wanted) -> float:
    """||found - wanted|| / ||wanted||."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
