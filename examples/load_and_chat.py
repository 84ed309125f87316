"""Loads a checkpoint in 4 bits and continues prompts: load_and_chat.py FOLDER [TOKEN...]."""

import sys

from fdk_jax import models

folder = sys.argv[1]
prompt = [int(token) for token in sys.argv[2:]] or [1, 2, 3]
model = models.load(folder, quantisation=models.Quantisation(bits=4, group_size=64))
answer = models.Generator(model).generate([prompt], max_tokens=8)
print("tokens", answer.tokens[0])
print(f"{answer.tokens_per_second:.0f} tokens a second")
