"""Pallas kernels for GPUs: products with weights that stay packed. They take plain arrays."""

from pallas_kernels.launch import matmul
from pallas_kernels.tuning import Plan, plan

__all__ = ["Plan", "matmul", "plan"]
