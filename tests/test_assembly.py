"""NVIDIA's assembler takes every kernel for every architecture; see `assemble`, which tries more of them."""

import assemble
import pytest

ASSEMBLERS = assemble.assemblers()


@pytest.mark.skipif(not ASSEMBLERS, reason="no ptxas: neither on PATH nor of nvidia-cuda-nvcc")
@pytest.mark.whole
@pytest.mark.parametrize(
    ("architecture", "which"),
    [("sm_80", 0), ("sm_89", -1), ("sm_90a", 0), ("sm_90a", -1), ("sm_100", -1), ("sm_120", 0)],
)
def test_kernels_assemble_without_spills(architecture, which):
    """By the oldest assembler that there is, or the newest: CUDA 12's and 13's where both are installed."""
    version, ptxas = list(ASSEMBLERS.items())[which]
    if not assemble.knows(ptxas, architecture):
        pytest.skip(f"ptxas {version} does not know {architecture}")
    lines, wrong = assemble.check(ptxas, architecture, quick=True)
    print(*lines, sep="\n")
    assert not wrong, "\n".join(wrong)


def test_what_is_wrong_is_said():
    kernel = assemble.Kernel("integer", "1 m=1", "", 2000)
    assert not assemble.faults(assemble.Report(kernel, 64), 2000)
    for report, limit, fault in (
        (assemble.Report(kernel, 64, spilled=4), 2000, "spills 4 bytes"),
        (assemble.Report(kernel, 64), 1999, "2000 bytes of shared memory are more than 1999"),
        (assemble.Report(kernel, error="line 3; error"), 2000, "line 3; error"),
    ):
        assert assemble.faults(report, limit) == [f"integer 1 m=1: {fault}"]


@pytest.mark.skipif(not ASSEMBLERS, reason="no ptxas: neither on PATH nor of nvidia-cuda-nvcc")
def test_a_kernel_that_does_not_assemble_is_found():
    kernel = next(iter(assemble.kernels("sm_80", quick=True)))
    ptxas = next(iter(ASSEMBLERS.values()))
    broken = assemble.dataclasses.replace(
        kernel, entry=kernel.entry.replace("ret;", "mul.rn.bf16x2 b32_0, b32_0, b32_0;\nret;")
    )
    [report] = assemble.assemble(ptxas, "sm_80", [broken])
    assert "mul" in report.error or "bf16" in report.error
