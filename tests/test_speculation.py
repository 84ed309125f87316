"""Tokens guessed from the text so far: the same text in fewer steps."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from fdk_jax import models
from fdk_jax.models import request, speculation
from fdk_jax.models.config import LayerOptions, ModelConfig, RopeScaling
from fdk_jax.models.sampling import Sampling

DATA = Path(__file__).parent / "data" / "models"
REPEATED = [[5, 9, 2, 77, 31, 8, 5, 9, 2, 77, 31, 8, 5, 9]]
SAMPLED = Sampling(0.7, top_k=20, top_p=0.9, seed=4)


@pytest.fixture(scope="module")
def generator():
    return models.Generator(models.load(DATA / "qwen2", dtype="float32"))


def _guesses(text, count):
    """By looking at every place, the newest first."""
    for size in (3, 2):
        for end in range(len(text) - 2, size - 2, -1):
            if len(text) > size and text[end + 1 - size : end + 1] == text[-size:]:
                return text[end + 1 : end + 1 + count]
    return []


@pytest.mark.parametrize("count", [1, 4, 16])
def test_guesses_are_what_followed_the_newest_tokens(rng, count):
    room, found = np.zeros(64, np.int32), 0
    for length in [*range(1, 40), *[40] * 60]:
        text = rng.integers(0, 4, length).tolist()
        room[:] = rng.integers(0, 4, 64)  # what is after the text is no part of it
        room[:length] = text
        tokens, known = speculation.guess(jnp.asarray(room), jnp.int32(length), count)
        assert np.asarray(tokens)[: int(known)].tolist() == _guesses(text, count)
        found += int(known) > 0
    assert found > 30


@pytest.mark.parametrize("guesses", [1, 4, 16])
@pytest.mark.parametrize("sampling", [None, SAMPLED])
@pytest.mark.parametrize("prompt", [REPEATED, [[8]], [[3, 3, 3, 3, 3, 3]]])
def test_the_tokens_are_the_models_own(generator, prompt, sampling, guesses):
    options = dict(max_tokens=40, sampling=sampling)
    wanted = generator.generate(prompt, **options)
    found = generator.generate(prompt, speculate=guesses, **options)
    assert found.tokens == wanted.tokens
    assert found.stopped == wanted.stopped == [False]
    assert wanted.model_steps == 39 and found.model_steps <= 39


def test_a_text_that_repeats_itself_takes_fewer_steps(generator):
    """What a small model chooses by itself ends in a cycle."""
    found = generator.generate(REPEATED, max_tokens=100, speculate=8)
    assert found.model_steps < 70 and found.decode_steps == 99
    assert found.tokens == generator.generate(REPEATED, max_tokens=100).tokens


@pytest.mark.parametrize("place", [0, 1, 7, 22])
def test_a_stop_token_among_the_guesses_ends_the_text(generator, place):
    free = generator.generate(REPEATED, max_tokens=30).tokens[0]
    stops = [free[place]]
    options = dict(max_tokens=30, stop_tokens=stops)
    wanted = generator.generate(REPEATED, **options)
    found = generator.generate(REPEATED, speculate=6, **options)
    assert (found.tokens, found.stopped) == (wanted.tokens, wanted.stopped)
    assert found.stopped == [True]


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 17])
@pytest.mark.parametrize("every", [None, 1, 5])
@pytest.mark.parametrize("sampling", [None, SAMPLED])
def test_streaming_gives_the_same_tokens(generator, every, sampling, max_tokens):
    options = dict(max_tokens=max_tokens, sampling=sampling)
    wanted = generator.generate(REPEATED, **options).tokens
    parts = list(generator.stream(REPEATED, every=every, speculate=4, **options))
    assert np.concatenate(parts, axis=1).tolist() == wanted


def test_a_stream_ends_with_a_stop_token(generator):
    free = generator.generate(REPEATED, max_tokens=60).tokens[0]
    parts = generator.stream(REPEATED, max_tokens=60, stop_tokens=[free[5]], speculate=4)
    row = np.concatenate(list(parts), axis=1)[0].tolist()
    assert free[5] in row and len(row) < 60
    assert row[: row.index(free[5])] == free[: free.index(free[5])]


@pytest.mark.parametrize("run", [1, 4, 9])
def test_steps_between_two_polls(generator, monkeypatch, run):
    monkeypatch.setattr(request.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(request, "_GUESS_RUN", run)
    wanted = generator.generate(REPEATED, max_tokens=33).tokens
    assert generator.generate(REPEATED, max_tokens=33, speculate=3).tokens == wanted


def test_the_last_slot_of_the_context():
    small = models.Generator(models.load(DATA / "qwen2", dtype="float32"), max_context=32)
    prompt = [[5, 9] * 8]
    wanted = small.generate(prompt, max_tokens=16).tokens
    assert small.generate(prompt, max_tokens=16, speculate=16).tokens == wanted


@pytest.mark.parametrize(
    "change",
    [
        dict(layers=(LayerOptions(window=5),) * 2),
        dict(rope_scaling=RopeScaling("dynamic", factor=2.0, original_context=16)),
    ],
    ids=["window", "dynamic RoPE"],
)
def test_what_depends_on_the_place(change):
    config = ModelConfig(128, 64, 64, 2, 4, 2, 16, dtype="float32")
    config = dataclasses.replace(config, **change)
    generator = models.Generator(models.random_model(config, seed=3))
    for prompt in REPEATED, [[1, 2] * 12]:
        wanted = generator.generate(prompt, max_tokens=40)
        found = generator.generate(prompt, max_tokens=40, speculate=5)
        assert found.tokens == wanted.tokens


@pytest.mark.parametrize(
    ("prompts", "guesses", "words"),
    [
        (REPEATED, -1, "speculate=-1 must be between 0 and 16"),
        (REPEATED, 17, "speculate=17"),
        (REPEATED * 2, 3, "one prompt on one device, not for 2 prompts"),
    ],
)
def test_what_it_is_not_for(generator, prompts, guesses, words):
    with pytest.raises(ValueError, match=words):
        generator.generate(prompts, speculate=guesses)
    with pytest.raises(ValueError, match=words):
        next(generator.stream(prompts, speculate=guesses))
