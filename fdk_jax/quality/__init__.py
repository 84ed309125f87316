"""Evidence for the choice of a format: a small language model, quantised in every way.

python -m fdk_jax.quality
"""
