"""Pallas kernels for GPUs: products with weights that stay packed. They take plain arrays."""

from pallas_kernels.choice import Plan, plan
from pallas_kernels.grouped import grouped_matmul
from pallas_kernels.grouped import unsupported_reason as grouped_unsupported_reason
from pallas_kernels.launch import (
    Scaled,
    chain_matmul,
    chain_plan,
    has_kernel,
    matmul,
    residual_matmul,
    residual_plan,
)

__all__ = [
    "Plan",
    "Scaled",
    "chain_matmul",
    "chain_plan",
    "grouped_matmul",
    "grouped_unsupported_reason",
    "has_kernel",
    "matmul",
    "plan",
    "residual_matmul",
    "residual_plan",
]
