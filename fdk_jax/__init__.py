"""Fused dequantise-matmul for low-bit weights in JAX."""
