"""Pallas kernels for GPUs: products with weights that stay packed. They take plain arrays."""

from pallas_kernels.choice import Plan, plan
from pallas_kernels.grouped import grouped_matmul
from pallas_kernels.grouped import unsupported_reason as grouped_unsupported_reason
from pallas_kernels.launch import (
    Scaled,
    chain_matmul,
    chain_plan,
    matmul,
    plan_of,
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
    "matmul",
    "plan",
    "plan_of",
    "residual_matmul",
    "residual_plan",
]
