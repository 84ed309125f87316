"""Pallas kernels for GPUs: products with weights that stay packed. They take plain arrays."""

from pallas_kernels.launch import matmul, norm_matmul, norm_plan
from pallas_kernels.tuning import Plan, plan

__all__ = ["Plan", "matmul", "norm_matmul", "norm_plan", "plan"]
