"""Flax: quantised layers, and models and trees whose layers are replaced."""
