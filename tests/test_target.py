"""What kernels GPUs of every architecture get, without one."""

import dataclasses
import re
import types

import emulator
import jax
import jax.numpy as jnp
import numpy as np
import planar
import pytest
from golden import DECODERS

import fdk_jax
import pallas_kernels
from pallas_kernels import (
    attention,
    chain,
    choice,
    columns,
    dense,
    dequantise,
    matvec,
    norm,
    ring_arithmetic,
    target,
)
from pallas_kernels.case import Case
from pallas_kernels.target import H200, SHARED_BYTES, Target, using

HALF = jnp.dtype(jnp.bfloat16)
ALL = [Target.parse("sm_{}{}".format(*capability)) for capability in SHARED_BYTES]
SM80, SM89 = (Target.parse(name) for name in ("sm_80", "sm_89"))
# What PTX has from sm_90 on, and on sm_90 alone: PTX ISA, "Target ISA Notes" of each instruction.
_SINCE_90 = re.compile(
    r"(mul|sub|add)\.(rn\.)?bf16|griddepcontrol|cp\.async\.bulk|mapa|cluster|try_wait|expect_tx"
    r"|fence\.proxy\.async"
)


def _case(m, bits, uniform=False, dtype=HALF, n=4096, k=4096, group_size=64):
    return Case(m, n, k, bits, group_size, 1, dtype, dtype, None, dtype, uniform)


def _source(case, plan, gpu):
    if plan.kernel == "dequantise":
        return dequantise.source(case, gpu)
    if plan.kernel == "mosaic":
        return "wgmma"  # what it is made of; JAX writes the rest
    return choice.KERNELS[plan.kernel].source(case, plan.config, gpu)


@pytest.mark.parametrize("gpu", ALL, ids=lambda gpu: gpu.architecture)
@pytest.mark.parametrize(("bits", "uniform"), DECODERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_product_has_a_kernel_that_runs_there(gpu, bits, uniform, dtype):
    for m in (1, 4, 16, 40, 64, 200, 1000):
        case = _case(m, bits, uniform, jnp.dtype(dtype))
        plan = choice.choose(case, gpu)
        assert gpu.architecture in str(plan)
        if plan.config is not None:
            assert choice.unsupported_reason(case, plan.config, gpu) is None
        source = _source(case, plan, gpu)
        assert ("wgmma" not in source) or gpu.capability == (9, 0)
        if gpu.capability < (9, 0):
            assert not _SINCE_90.search(source)


@pytest.mark.parametrize("gpu", ALL, ids=lambda gpu: gpu.architecture)
def test_the_other_kernels_of_a_step_run_everywhere(gpu):
    assert attention.choose(HALF, (1, 8, 512, 128), 16, gpu) == ("short", "")
    kernel, reason = attention.choose(HALF, (1, 8, 4096, 128), 16, gpu)
    assert kernel == "split" and "4096 slots are not below" in reason
    assert dense.unsupported_reason(1, 4096, 4096, HALF, gpu) is None
    assert norm.unsupported_reason(4096, HALF, gpu) is None
    assert columns.unsupported_reason(16, gpu) is None


@pytest.mark.parametrize(
    ("changed", "kernel", "reason"),
    [
        (dict(capability=None, kind="AMD MI300"), None, "no NVIDIA GPU"),
        (dict(capability=(7, 5)), None, "older than sm_80"),
        (dict(capability=(15, 0)), "plain", "do not know"),
    ],
)
def test_why_the_other_kernels_of_a_step_do_not_run(changed, kernel, reason):
    gpu = dataclasses.replace(H200, **changed)
    assert attention.choose(HALF, (1, 8, 512, 128), 16, gpu)[0] == kernel
    assert reason in attention.choose(HALF, (1, 8, 512, 128), 16, gpu)[1]
    others = [
        dense.unsupported_reason(1, 4096, 4096, HALF, gpu),
        norm.unsupported_reason(4096, HALF, gpu),
        columns.unsupported_reason(16, gpu),
    ]
    assert all(other is None if kernel else reason in other for other in others)


@pytest.mark.parametrize(
    ("shape", "heads", "options", "kernel", "reason"),
    [
        ((1, 8, 512, 96), 16, {}, None, "heads of 96"),
        ((1, 8, 512, 32), 16, {}, "plain", "heads of 32"),
        ((1, 8, 500, 128), 16, {}, None, "500 slots"),
        ((9, 8, 512, 128), 16, {}, "split", "9 x 16 programs"),
        ((1, 1, 4096, 128), 17, {}, "plain", "17 query heads"),
        ((1, 8, 512, 128), 16, dict(alike=False), "plain", "several dtypes"),
        ((1, 8, 512, 128), 16, dict(window=100), "split", "sees all slots"),
        ((1, 8, 512, 128), 16, dict(window=100, alike=False), None, "several dtypes"),
    ],
)
def test_attention_of_a_shape(shape, heads, options, kernel, reason):
    found, why = attention.choose(HALF, shape, heads, H200, **options)
    assert found == kernel and reason in why
    without = dataclasses.replace(H200, triton=False)
    found, why = attention.choose(HALF, shape, heads, without, **options)
    assert found == (kernel if kernel == "split" else None)
    assert found or "no Triton lowering" in why


def test_a_refused_dense_product_says_why():
    with pytest.raises(ValueError, match="17 rows are not 1 to 16"):
        dense.matmul(jnp.ones((17, 128), HALF), jnp.ones((128, 128), HALF), out_dtype=HALF)


def test_hopper_has_its_own_kernels_and_others_have_not():
    kernels = {
        gpu.architecture: [choice.choose(_case(m, 1), gpu).kernel for m in (1, 64)] for gpu in ALL
    }
    assert kernels["sm_90"] == ["integer", "wgmma"]
    assert not any("wgmma" in found for name, found in kernels.items() if name != "sm_90")


def test_programs_follow_the_multiprocessors():
    slice_ = dataclasses.replace(H200, multiprocessors=16)
    for gpu in (H200, slice_, dataclasses.replace(H200, multiprocessors=114)):
        plan = choice.choose(_case(1, 1, n=8192, k=8192), gpu)
        assert plan.config.programs % gpu.multiprocessors == 0
        assert ring_arithmetic.config([_case(1, 4)], gpu).programs == gpu.multiprocessors


def test_what_a_kernel_asks_of_a_gpu_is_said():
    case = _case(1, 1)
    integer = choice.KERNELS["integer"].Config(16, 132)
    wgmma = choice.KERNELS["wgmma"].Config()
    products = [_case(1, 4)] * 3
    assert "sm_80 has no bulk copies" in chain.unsupported_reason(
        products, ring_arithmetic.config(products, SM80), SM80
    )
    for gpu in (SM89, Target.parse("sm_100"), Target.parse("sm_120")):
        reason = choice.unsupported_reason(_case(64, 4), wgmma, gpu)
        assert reason.startswith(f"{gpu.architecture} has no wgmma")
    cluster = matvec.Config(cluster=2)
    assert "no clusters" in choice.unsupported_reason(_case(4, 4), cluster, SM89)
    small = dataclasses.replace(H200, shared_bytes=10_000)
    assert "gives a thread block 10000" in choice.unsupported_reason(case, integer, small)
    with using(SM80), pytest.raises(NotImplementedError, match="sm_80 has no wgmma"):
        arrays, spec, _ = planar.product(np.random.default_rng(0), 1, 16, 512, 1, 64, "bfloat16")
        pallas_kernels.matmul(*arrays, **spec, uniform=False, config=wgmma)


def test_teams_are_no_more_than_the_barriers_of_a_thread_block():
    mma = choice.KERNELS["mma"].Config
    fits, too_many = mma(16, 1, 1, 15, 2, 2), mma(16, 1, 1, 16, 2, 2)
    assert choice.unsupported_reason(_case(16, 4), fits, H200) is None
    assert "barrier" in choice.unsupported_reason(_case(16, 4), too_many, H200)


def _device(capability, kind, platform="gpu", cores=40, shared=65536):
    return types.SimpleNamespace(
        compute_capability=capability,
        device_kind=kind,
        platform=platform,
        core_count=cores,
        shared_memory_per_block_optin=shared,
    )


@pytest.mark.parametrize(
    ("device", "kernel", "reason"),
    [
        (_device("7.5", "Tesla T4"), "xla", "older than sm_80"),
        (_device("gfx942", "AMD Instinct MI300X"), "xla", "no NVIDIA GPU"),
        (_device("13.0", "NVIDIA R100", shared=232448), "plain", "do not know"),
    ],
)
def test_gpus_that_nobody_thought_of(rng, device, kernel, reason, monkeypatch):
    gpu = Target.of(device)
    plan = choice.choose(_case(1, 4), gpu)
    assert plan.kernel == kernel and reason in plan.reason
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    target._at_hand.cache_clear()
    try:
        with pytest.warns(UserWarning, match=reason):
            target.current()
    finally:
        monkeypatch.undo()
        target._at_hand.cache_clear()
    w = fdk_jax.prepare(fdk_jax.quantise(jnp.asarray(rng.normal(size=(32, 128)), HALF)), "pallas")
    x = jnp.asarray(rng.normal(size=(3, 128)), HALF)
    with using(gpu):
        told = fdk_jax.explain(x, w, platform="cuda")
        assert told.backend == ("xla" if kernel == "xla" else "pallas")
        assert reason in str(told)
        program = jax.jit(fdk_jax.matmul).trace(x, w)
        if kernel == "xla":
            text = program.lower(lowering_platforms=("cuda",)).as_text()
            assert "custom_call @__gpu" not in text
            with pytest.raises(NotImplementedError, match="use backend='xla'"):
                arrays, spec, _ = planar.product(rng, 1, 16, 512, 4, 64, "bfloat16")
                pallas_kernels.matmul(*arrays, **spec, uniform=False)


def test_explain_names_the_architecture(rng):
    w = fdk_jax.prepare(fdk_jax.quantise(jnp.asarray(rng.normal(size=(64, 512)), HALF)), "pallas")
    with using(SM89):
        told = fdk_jax.explain(jax.ShapeDtypeStruct((64, 512), HALF), w, platform="cuda")
    assert told.backend == "pallas" and told.kernel.startswith("mma ")
    assert "for sm_89" in told.kernel or "sm_89 has" in told.kernel
    assert "sm_89" in told.reason


def test_explain_and_matmul_ask_for_the_kernel_of_one_case(rng, monkeypatch):
    """Both follow `choice.choose`: with a bias, codebooks of their own, another dtype of the result."""
    asked = []
    choose = choice.choose
    monkeypatch.setattr(
        choice, "choose", lambda case, gpu: (asked.append(case), choose(case, gpu))[1]
    )
    matrix = jnp.asarray(rng.normal(size=(64, 512)), HALF)
    w = fdk_jax.quantise(matrix, codebook="kmeans")
    joined = dataclasses.replace(w, codebook=jnp.stack([w.codebook, w.codebook * 2]))
    w = fdk_jax.prepare(joined, "pallas")
    x, bias = jnp.ones((2, 5, 512), HALF), jnp.ones(64, jnp.float32)
    options = dict(bias=bias, out_dtype=jnp.float32)
    with using(SM89):
        fdk_jax.explain(x, w, platform="cuda", **options)
        told = set(asked)
        asked.clear()
        jax.jit(lambda x: fdk_jax.matmul(x, w, **options)).trace(x)
    assert told == set(asked) and len(told) == 1
    assert next(iter(told)).codebooks == 2 and next(iter(told)).out_dtype == jnp.float32


def test_several_gpus_share_what_all_have():
    hopper, ada, blackwell = (Target.parse(name) for name in ("sm_90", "sm_89", "sm_100"))
    both = target.common([hopper, ada])
    assert (both.capability, both.shared_bytes) == ((8, 9), ada.shared_bytes)
    assert both.multiprocessors == 128
    assert not target.common([hopper, blackwell]).has_wgmma
    assert target.common([hopper, hopper]) == hopper
    assert target.common([hopper, Target.of(_device("gfx942", "AMD"))]).capability is None


@pytest.mark.parametrize(
    ("variable", "value", "kind", "reason"),
    [
        ("FDK_JAX_GRID_BARRIERS", "0", "NVIDIA H100", "FDK_JAX_GRID_BARRIERS=0"),
        ("CUDA_MPS_PIPE_DIRECTORY", "/tmp/mps", "NVIDIA H100", "other processes"),
        ("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "50", "NVIDIA H100", "other processes"),
        ("FDK_JAX_GRID_BARRIERS", "1", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "part of a GPU"),
        ("FDK_JAX_GRID_BARRIERS", "1", "NVIDIA H100", ""),
    ],
)
def test_programs_wait_for_each_other_only_where_all_run(
    monkeypatch, variable, value, kind, reason
):
    for name in target._MPS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    gpu = Target.of(_device("9.0", kind, cores=132, shared=232448))
    assert reason in gpu.no_grid_barriers and bool(reason) == bool(gpu.no_grid_barriers)
    products = [_case(1, 4, n=n, k=k) for n, k in ((1024, 1024), (4096, 1024), (1024, 2048))]
    refused = chain.unsupported_reason(products, ring_arithmetic.config(products, gpu), gpu)
    assert (refused is None) == (reason == "")
    assert reason in (refused or "")


def test_a_switch_that_means_nothing_is_refused(monkeypatch):
    monkeypatch.setenv("FDK_JAX_GRID_BARRIERS", "off")
    with pytest.raises(ValueError, match="must be 0 or 1"):
        Target.of(_device("9.0", "NVIDIA H100"))


@pytest.mark.parametrize("text", ["sm_75", "ampere", "sm_80:cores=3", "sm_80:multiprocessors=-1"])
def test_targets_that_do_not_parse(text):
    with pytest.raises(ValueError, match="FDK_JAX_TARGET="):
        Target.parse(text)


def test_parsed_targets():
    gpu = Target.parse("sm_89:multiprocessors=58,shared_bytes=50000", H200)
    assert (gpu.capability, gpu.multiprocessors, gpu.shared_bytes) == ((8, 9), 58, 50_000)
    assert Target.parse("sm_90", H200) == H200
    assert Target.parse("sm_80", H200).multiprocessors == 132
    assert [gpu.ptx_target(wgmma=False) for gpu in ALL[:6]] == [
        *("sm_80", "sm_86", "sm_87", "sm_89", "sm_90a", "sm_90")
    ]
    # One between two that PTX ISA 8.0 knows takes the older one, which its driver compiles anew.
    between = dataclasses.replace(ALL[0], capability=(8, 8))
    assert between.ptx_target(wgmma=False) == "sm_87"


@pytest.mark.parametrize(("bits", "uniform"), DECODERS)
@pytest.mark.parametrize(
    ("m", "n", "k", "group_size", "dtype"),
    [
        (1, 33, 1100, 64, "bfloat16"),
        (9, 20, 600, 16, "bfloat16"),
        (29, 40, 700, 64, "float16"),
        (64, 17, 1030, 32, "bfloat16"),
        (70, 33, 520, 128, "bfloat16"),
    ],
)
def test_values_of_older_architectures(rng, bits, uniform, m, n, k, group_size, dtype):
    """The kernels that sm_80 gets, on the emulator, against float64."""
    arrays, _, wanted = planar.product(rng, m, n, k, bits, group_size, dtype, uniform=uniform)
    half, single = jnp.dtype(dtype), jnp.dtype(jnp.float32)
    case = Case(m, n, k, bits, group_size, 1, half, half, None, single, uniform)
    plan = choice.choose(case, SM80)
    config = plan.config or choice.portable(case, SM80)
    out = np.full((m, n), np.nan, np.float32)
    x = np.pad(np.asarray(arrays[0]), ((0, 0), (0, case.blocks * case.span - k)))
    module = choice.KERNELS[choice.kernel_of(config)]
    emulator.run(
        module.source(case, config, SM80),
        [x, *map(np.asarray, arrays[1:]), out],
        module.grid(case, config),
        32 * config.warps,
    )
    wanted.check(out)


@pytest.mark.parametrize("opcode", ["multiply", "subtract"])
def test_products_and_differences_of_bfloat16_are_the_same_by_multiply_add(rng, opcode):
    """Rounded once either way, so equal to the bit; on the emulator."""
    bits = rng.integers(0, 2**32, (2, 256), np.uint32)
    bits[0, :4] = bits[1, 2:6] = [0x80000000, 0x00008000, 0x3F803F80, 0]
    found = []
    for gpu in (H200, SM80):
        ptx = pallas_kernels.ptx.Ptx(gpu)
        ptx.share(16)
        thread = ptx.op("mov.u32", "%tid.x")
        values = [
            ptx.op(
                "ld.global.nc.b32",
                pallas_kernels.ptx.at(ptx.op("mad.wide.u32", thread, 4, name, kind="b64")),
            )
            for name in ("$1", "$2")
        ]
        result = getattr(ptx, f"{opcode}_halves")("bf16", *values)
        address = ptx.op("mad.wide.u32", thread, 4, "$3", kind="b64")
        ptx.do("st.global.b32", pallas_kernels.ptx.at(address), result)
        out = np.zeros(256, np.uint32)
        with np.errstate(all="ignore"):
            emulator.run(ptx.text(), [bits[0], bits[1], out], (1, 1), 256)
        found.append(out.view(jnp.bfloat16))
    same = (found[0].view(np.uint16) == found[1].view(np.uint16)) | np.isnan(
        found[0].astype(np.float32)
    )
    assert same.all()
