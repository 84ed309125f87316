"""Arguments of `Generator` that are odd: computed as they say, or refused by their names."""

import jax
import numpy as np
import pytest
from model_data import wide_config

from fdk_jax import models

PROMPT = [[1, 2, 3]]


@pytest.fixture(scope="module")
def generator():
    return models.Generator(models.random_model(wide_config()))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(prompts=[[1.5, 2.0]]), TypeError, r"list of numbers of tokens, got \[1.5, 2.0\]"),
        (dict(prompts=[1, 2]), TypeError, "list of numbers of tokens, got 1"),
        (dict(prompts=["abc"]), TypeError, "list of numbers of tokens, got 'abc'"),
        (dict(prompts=[[True]]), TypeError, "list of numbers of tokens"),
        (dict(prompts="abc"), TypeError, "list of lists of tokens, got str"),
        (dict(prompts=(p for p in PROMPT)), TypeError, "list of lists of tokens, got generator"),
        (dict(prompts=[[2**40]]), ValueError, "do not fit a vocabulary"),
        (dict(prompts=[[2**70]]), TypeError, "list of numbers of tokens"),
        (dict(max_tokens=2.5), TypeError, "max_tokens=2.5 must be an integer"),
        (dict(max_tokens=True), TypeError, "max_tokens=True must be an integer"),
        (dict(max_tokens=0), ValueError, "max_tokens=0 must be at least 1"),
        (dict(stop_tokens=7), TypeError, "stop_tokens=7 must be a list of numbers"),
        (dict(stop_tokens=["</s>"]), TypeError, "stop_tokens=.*must be a list of numbers"),
        (dict(stop_tokens=[1.5]), TypeError, "stop_tokens=.*must be a list of numbers"),
        (dict(speculate=2.5), TypeError, "speculate=2.5 must be an integer"),
        (dict(sampling=dict(temperature=1)), TypeError, "must be a fdk_jax.models.Sampling"),
        (dict(every=0), ValueError, "every=0 must be at least 1"),
        (dict(every=1.5), TypeError, "every=1.5 must be an integer"),
    ],
)
@pytest.mark.whole
def test_what_is_no_number_is_refused(generator, options, error, words):
    options = dict(prompts=PROMPT, max_tokens=2) | options
    with pytest.raises(error, match=words):
        list(generator.stream(**options))
    if "every" not in options:
        with pytest.raises(error, match=words):
            generator.generate(**options)


@pytest.mark.parametrize("context", [0, -1])
def test_a_context_of_nothing_is_refused(generator, context):
    with pytest.raises(ValueError, match=f"max_context={context} must be at least 1"):
        models.Generator(models.random_model(wide_config()), max_context=context)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(temperature="0.5"), "temperature='0.5' must be a number"),
        (dict(temperature=None), "temperature=None must be a number"),
        (dict(top_p="1"), "top_p='1' must be a number"),
        (dict(top_k=2.5), "top_k=2.5 must be an integer"),
        (dict(seed=1.5), "seed=1.5 must be an integer"),
    ],
)
def test_sampling_of_no_numbers_is_refused(options, words):
    with pytest.raises(TypeError, match=words):
        models.Sampling(**options)


def test_stop_tokens_of_any_kind_of_sequence(generator):
    expected = generator.generate(PROMPT, max_tokens=6).tokens[0]
    for stops in (
        {expected[2]},
        np.asarray([expected[2]]),
        iter([expected[2]]),
        [expected[2], 2**40],
    ):
        found = generator.generate(PROMPT, max_tokens=6, stop_tokens=stops)
        assert found.stopped == [True]
        assert found.tokens[0] == expected[: expected.index(expected[2])]


@pytest.mark.parametrize("temperature", [1e-31, 1e-45, 1e-320])
def test_a_temperature_next_to_nothing_takes_the_best_token(generator, temperature):
    """Quotients by it are infinite or NaN in float32, of which the first was taken, whatever its token."""
    expected = generator.generate(PROMPT, max_tokens=6).tokens
    for more in ({}, dict(top_k=5), dict(top_p=0.9)):
        sampling = models.Sampling(temperature=temperature, **more)
        assert generator.generate(PROMPT, max_tokens=6, sampling=sampling).tokens == expected


def test_every_bit_of_a_seed_counts():
    """JAX looks at 32 of them: seeds beyond drew what others did."""
    seeds = [0, 1, 2**32, 2**32 + 1, 2**40, 2**63 - 1, -1, 2**32 - 1, -(2**63)]
    keys = {bytes(np.asarray(jax.random.key_data(models.Sampling(seed=s).key))) for s in seeds}
    assert len(keys) == len(seeds)
    for seed in (0, 1, 2**32 - 1):
        assert (models.Sampling(seed=seed).key == jax.random.key(seed)).all()
