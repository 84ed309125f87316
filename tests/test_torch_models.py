"""A model of transformers becomes rows like those of the models suite."""

import pytest

from fdk_jax.benchmark import records, torch_models
from fdk_jax.models import ModelConfig

pytest.importorskip("torch")
pytest.importorskip("transformers")


def test_prompts_and_steps_have_times():
    config = ModelConfig(512, 64, 128, 2, 4, 2, 16, max_context=256)
    model = torch_models.make_model(config, "cpu")
    case = torch_models.Case("custom-llama-4B", 2, 5, 3)
    found = torch_models.measure(model, case, "cpu", 3)
    row = records.make_row(case.fields(), found)
    assert row["status"] == "ok" and (row["batch"], row["prompt"]) == (2, 5)
    assert len(row["samples_us"]) == len(row["first_token_samples_us"]) == 3
    assert row["first_token_us"] > 0 and row["tokens_per_s"] > 0
    # Two square matrices of two layers alone have so many.
    assert row["bytes_rw"] > 2 * 2 * 2 * 64 * 64
