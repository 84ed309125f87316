"""Generation and sampling."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdk_jax import models
from fdk_jax.models import loops, request
from fdk_jax.models.programs import Programs
from fdk_jax.models.request import cache_bucket, prompt_bucket
from fdk_jax.models.sampling import Sampling, choose

DATA = Path(__file__).parent / "data" / "models"
PROMPTS = [[5, 9, 2, 77, 31], [8], [3, 3, 60]]


@pytest.fixture(scope="module")
def generator():
    return models.Generator(models.load(DATA / "qwen2", dtype="float32"))


def test_batch_of_different_lengths_equals_single_prompts(generator):
    together = generator.generate(PROMPTS, max_tokens=9).tokens
    alone = [generator.generate([prompt], max_tokens=9).tokens[0] for prompt in PROMPTS]
    assert together == alone


def test_tokens_follow_from_the_logits_of_the_whole_sequence(generator):
    sequence = list(PROMPTS[0])
    for _ in range(6):
        sequence.append(int(np.argmax(generator.logits([sequence])[0, -1])))
    assert generator.generate(PROMPTS[:1], max_tokens=6).tokens == [sequence[5:]]


@pytest.mark.parametrize("every", [None, 3, 50])
@pytest.mark.parametrize("sampling", [None, Sampling(0.8, top_k=20, top_p=0.9, seed=4)])
def test_streaming_gives_the_same_tokens(generator, every, sampling):
    whole = generator.generate(PROMPTS, max_tokens=11, sampling=sampling)
    parts = list(generator.stream(PROMPTS, max_tokens=11, sampling=sampling, every=every))
    assert np.concatenate(parts, axis=1).tolist() == whole.tokens
    assert not any(whole.stopped)


@pytest.mark.parametrize("run", [1, 4, 16, 32])
def test_stop_tokens_end_each_sequence(generator, monkeypatch, run):
    wanted = generator.generate(PROMPTS, max_tokens=20).tokens
    monkeypatch.setattr("fdk_jax.models.loops.poll_every", lambda steps, may_stop: run)
    free = generator.generate(PROMPTS, max_tokens=20).tokens
    assert free == wanted
    stops = [free[0][7], free[1][2]]
    out = generator.generate(PROMPTS, max_tokens=20, stop_tokens=stops)
    for row, wanted, stopped in zip(out.tokens, free, out.stopped, strict=True):
        ends = [i for i, token in enumerate(wanted) if token in stops]
        assert stopped == bool(ends)
        assert row == wanted[: ends[0] if ends else None]
    if run == 1 and all(out.stopped):
        assert out.decode_steps < 19
    streamed = np.concatenate(list(generator.stream(PROMPTS, max_tokens=20, stop_tokens=stops)), 1)
    for row, wanted in zip(streamed.tolist(), out.tokens, strict=True):
        assert row[: len(wanted)] == wanted


@pytest.mark.parametrize(
    ("steps", "run"), [(0, 16), (1, 16), (16, 16), (30, 32), (33, 16), (64, 64), (255, 128)]
)
def test_looks_are_rare_where_nothing_stops_early(monkeypatch, steps, run):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert loops.poll_every(steps, False) == run
    assert loops.poll_every(steps, True) == 16
    assert -(-steps // run) * run == -(-steps // 16) * 16, "more surplus tokens"


def test_stop_tokens_are_padded_with_what_no_sequence_chooses():
    for count, size in ((0, 1), (1, 1), (2, 2), (3, 4), (5, 8)):
        padded = request.padded_stops(range(count)).tolist()
        assert padded == [*range(count), *[-1] * (size - count)]


def test_several_devices_stop_and_no_program_takes_an_empty_array(generator):
    """JAX 0.11.2 dies while it compiles `shard_map` with an argument of shape (0,)."""
    parallel = models.Parallel(jax.make_mesh((2,), ("model",)))
    two = models.Generator(models.load(DATA / "qwen2", dtype="float32", parallel=parallel))
    free = generator.generate(PROMPTS, max_tokens=6).tokens
    assert two.generate(PROMPTS, max_tokens=6).tokens == free
    stopped = [row[: row.index(free[0][3])] if free[0][3] in row else row for row in free]
    assert two.generate(PROMPTS, max_tokens=6, stop_tokens=[free[0][3]]).tokens == stopped
    for program in (*two.programs.values(), *generator.programs.values()):
        assert all(np.prod(aval.shape) > 0 for aval in jax.tree.leaves(program.in_avals))


@pytest.mark.parametrize("sampling", [None, Sampling(0.9, top_k=30, seed=2)])
def test_devices_that_share_weights_and_a_batch(generator, sampling):
    """The same tokens, also where sequences stop at different steps; no weight and no cache moves."""
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    parallel = models.Parallel(mesh, data="data")
    four = models.Generator(models.load(DATA / "qwen2", dtype="float32", parallel=parallel))
    prompts = [*PROMPTS, [1, 2]]
    options = dict(max_tokens=7, sampling=sampling)
    free = generator.generate(prompts, **options).tokens
    assert four.generate(prompts, **options).tokens == free
    assert np.concatenate(list(four.stream(prompts, **options)), axis=1).tolist() == free
    stops = [free[0][1]]
    wanted = generator.generate(prompts, **options, stop_tokens=stops)
    found = four.generate(prompts, **options, stop_tokens=stops)
    assert (found.tokens, found.decode_steps) == (wanted.tokens, wanted.decode_steps)
    # Four arrays a layer: sums of an activation [2, 64], and logits, never a weight.
    for name, program in four.programs.items():
        if name[0] == "decode":
            moved = re.findall(
                r"= \(?(\w+\[[\d,]*\])\S* (?:all-|collective|reduce-)", program.as_text()
            )
            assert moved and {s for s in moved if s[0] != "f"} <= {"s32[]", "pred[]"}
            assert max(np.prod(json.loads(s[3:])) for s in moved if s[0] == "f") <= 2 * 128
    with pytest.raises(ValueError, match="a batch of 3 must be divisible by the 2 parts"):
        four.generate(PROMPTS, max_tokens=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(axis="heads"), "axis='heads' is not one of"),
        (dict(data="rows"), "data='rows' is not one of"),
        (dict(data="model"), "need axes of their own"),
        (dict(), "may be larger than 1"),
    ],
)
def test_meshes_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        models.Parallel(jax.make_mesh((2, 2), ("data", "model")), **options)


def test_one_token_and_the_last_slot(generator):
    assert len(generator.generate([[1]], max_tokens=1).tokens[0]) == 1
    small = models.Generator(models.load(DATA / "qwen2", dtype="float32"), max_context=12)
    wanted = generator.generate([PROMPTS[0]], max_tokens=7).tokens
    assert small.generate([PROMPTS[0]], max_tokens=7).tokens == wanted


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([], {}, "every prompt"),
        ([[1], []], {}, "every prompt"),
        ([[1, 128]], {}, "vocabulary of 128"),
        ([[-1]], {}, "vocabulary"),
        ([[1]], dict(max_tokens=0), "max_tokens=0"),
        ([[1] * 200], dict(max_tokens=57), "do not fit a context of 256"),
    ],
)
def test_bad_calls_are_refused_before_anything_runs(generator, prompts, options, words):
    with pytest.raises(ValueError, match=words):
        generator.generate(prompts, **options)


def test_programs_are_kept(generator):
    generator.generate(PROMPTS, max_tokens=5)
    before = len(generator.programs)
    generator.generate([[1, 2, 3], [4, 4], [9]], max_tokens=30)
    assert len(generator.programs) == before


def test_the_cache_is_updated_in_place(generator):
    generator.generate([[1, 2]], max_tokens=5)
    program = next(p for name, p in generator.programs.items() if name[:1] == ("decode",))
    memory = program.memory_analysis()
    heads, capacity, width = 2, 128, 16
    assert memory.alias_size_in_bytes >= 2 * 2 * heads * capacity * width * 4


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(1, 16), (16, 16), (17, 32), (200, 256), (300, 300)]
)
def test_prompt_buckets(tokens, bucket):
    assert prompt_bucket(tokens, 300) == bucket


def test_prompts_are_padded_by_an_eighth_at_most_where_tokens_cost():
    for tokens in range(513, 70000, 61):
        bucket = prompt_bucket(tokens, 1 << 20)
        assert tokens <= bucket <= max(tokens * 9 / 8, tokens + 256)
    assert len({prompt_bucket(n, 1 << 20) for n in range(1, 8193)}) <= 6 + 2 + 4 + 8 + 8


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("batch", [1, 3, 16, 64, 1000])
def test_runs_hold_the_prompts_and_their_memory_has_a_bound(monkeypatch, platform, batch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    for longest in (1, 255, 1024, 8100, 8193, 20001, 131000):
        runs, capacity = request.plan_runs(batch, longest, 64, 131072)
        assert sum(runs) >= longest > sum(runs) - max(runs)
        assert capacity >= max(sum(runs), longest + 64)
        assert runs[:-1] == runs[:1] * (len(runs) - 1) and runs[-1] <= max(runs[0], 16)
        assert max(runs) * batch <= max(16384, 256 * batch)


def test_prompts_in_runs_give_the_same_tokens(generator, monkeypatch):
    prompts = [list(np.random.default_rng(0).integers(0, 128, n)) for n in (61, 9, 40)]
    wanted = generator.generate(prompts, max_tokens=6).tokens
    monkeypatch.setattr(request, "_CPU_RUN_TOKENS", 48)
    monkeypatch.setattr(request, "_SHORTEST_RUN", 16)
    assert request.plan_runs(3, 61, 6, 256)[0] == [16, 16, 16, 16]
    found = generator.generate(prompts, max_tokens=6)
    assert found.tokens == wanted
    assert {name[0] for name in generator.programs} >= {"begin", "resume", "finish"}


def test_as_many_programs_are_kept_as_the_bound_says():
    kept = Programs(models.load(DATA / "qwen2", dtype="float32"), max_programs=2)
    for name in "abac":
        kept.program(name, lambda model, x: (x,), (jax.Array,), jnp.zeros(2))
    assert list(kept) == ["a", "c"]


def test_cache_buckets_hold_what_they_must():
    for tokens in range(1, 5000, 13):
        assert tokens <= cache_bucket(tokens) and cache_bucket(tokens) % 64 == 0


# --- sampling ---------------------------------------------------------------------------------


def draws(logits, sampling: Sampling, count: int = 4000) -> np.ndarray:
    """Frequencies of the tokens drawn from one row of logits."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    tokens = choose(
        rows,
        jax.random.split(jax.random.key(0), count),
        jnp.float32(sampling.temperature),
        jnp.float32(sampling.top_p),
        sampling.method,
    )
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / count


def softmax(logits, temperature=1.0):
    """In float64."""
    wide = np.exp(np.asarray(logits, np.float64) / temperature)
    return wide / wide.sum()


LOGITS = [0.3, 2.0, -1.0, 1.1, 0.9]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature(temperature):
    found = draws(LOGITS, Sampling(temperature))
    np.testing.assert_allclose(found, softmax(LOGITS, temperature), atol=0.035)


def test_top_k_and_top_p():
    best = softmax([2.0, 1.1])
    np.testing.assert_allclose(
        draws(LOGITS, Sampling(1.0, top_k=2)), [0, best[0], 0, best[1], 0], atol=0.035
    )
    # Probabilities, best first: 0.51, 0.21, 0.17, 0.09, 0.03: the first three reach 0.8.
    three = softmax([2.0, 1.1, 0.9])
    np.testing.assert_allclose(
        draws(LOGITS, Sampling(1.0, top_p=0.8)), [0, three[0], 0, *three[1:]], atol=0.035
    )
    assert draws(LOGITS, Sampling(1.0, top_p=1e-6))[1] == 1
    assert draws(LOGITS, Sampling(1.0, top_k=1))[1] == 1
    assert draws(LOGITS, Sampling(0.0))[1] == 1


def test_seeds(generator):
    def run(seed):
        return generator.generate(PROMPTS, max_tokens=12, sampling=Sampling(2.0, seed=seed)).tokens

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize(
    "options", [dict(temperature=-1), dict(top_k=0), dict(top_p=0), dict(top_p=1.1)]
)
def test_sampling_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)
