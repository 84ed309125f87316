"""Pallas kernels for GPUs: products with weights that stay packed. They take plain arrays."""

from pallas_kernels.launch import Scaled, matmul, residual_matmul, residual_plan
from pallas_kernels.tuning import Plan, plan

__all__ = ["Plan", "Scaled", "matmul", "plan", "residual_matmul", "residual_plan"]
