"""What the emulator refuses: what a GPU would not do, or not the same way every time."""

import emulator
import numpy as np
import pytest
from test_emulator import block, store
from test_emulator_memory import bulk, cluster, copied, exchange, group_operands, group_product, run

WORDS = np.arange(32, dtype=np.uint32)


def refused(match, lines, operands=None, **options):
    """The block is a fault, in lockstep."""
    with pytest.raises(emulator.Fault, match=match):
        run(lines, [WORDS.copy(), WORDS.copy()] if operands is None else operands, **options)


def found_by_chance(lines, wanted, **options):
    """Whether some order of warps and copies makes the block a fault, or its result another one."""
    for seed in range(20):
        operands = [np.arange(1024, dtype=np.uint32), np.zeros_like(wanted)]
        try:
            run(lines, operands, chance=np.random.default_rng(seed), **options)
        except emulator.Fault:
            return True
        if (operands[1] != wanted).any():
            return True
    return False


def test_accesses_outside_of_operands_and_misaligned_ones():
    address = "mad.wide.u32 p, thread, 4, $1;"
    for opcode in ("ld.global.nc.b32 v, [p+{}];", "st.global.b32 [p+{}], thread;"):
        refused("outside", (address, opcode.format(4)))
        refused("outside", (address, opcode.format(-4)))
        refused("misaligned", (address, opcode.format(2)))
        refused("outside", ("mov.u64 p, 0;", opcode.format(0)))
    # The word at 120 bytes is there, the next one is not.
    refused("outside", ("mov.u64 p, $1;", "ld.global.v2.b32 {a, b}, [p+128];"))
    refused("misaligned", ("mov.u64 p, $1;", "ld.global.v2.b32 {a, b}, [p+4];"))
    refused("misaligned", ("mov.u64 p, $1;", "ld.global.v4.b32 {a, b, c, d}, [p+8];"))
    shared = ("mov.u32 s, fdk_shared;", "mad.lo.u32 s, thread, 4, s;")
    refused("outside", (*shared, "st.shared.b32 [s+3976], thread;"))
    refused("misaligned", (*shared, "st.shared.b32 [s+1], thread;"))
    refused("outside", ("mov.u64 p, $1;", "red.release.gpu.global.add.u32 [p+128], 1;"))
    # Under a predicate that is false there is no access.
    run((address, "setp.lt.u32 in, thread, 31;", "@in ld.global.nc.b32 v, [p+4];"), [WORDS])


def test_copies_outside_of_operands_and_misaligned_ones():
    for line, match in (
        ("cp.async.cg.shared.global [s+0], [p+128], 16;", "outside"),
        ("cp.async.cg.shared.global [s+8], [p+0], 16;", "misaligned"),
        ("cp.async.ca.shared.global [s+0], [p+4], 8;", "misaligned"),
        ("cp.async.ca.shared.global [s+4096], [p+0], 4;", "outside"),
        ("cp.async.cg.shared.global [s+0], [p+0], 8;", "does not copy 8 bytes"),
    ):
        lines = ("mov.u32 s, fdk_shared;", "mov.u64 p, $1;", line, "cp.async.wait_group 0;")
        refused(match, lines)
    for change, match in (
        (("[p+16], 128", "[p+4], 128"), "misaligned"),
        (("[p+16], 128", "[p+16], 120"), "misaligned"),
        (("[p+16], 128", "[p+16], 0"), "of nothing"),
        (("[base+128], [p", "[base+4064], [p"), "outside"),
    ):
        lines = [line.replace(*change) for line in bulk()]
        refused(match, lines, [np.zeros(64, np.uint32), np.zeros(32, np.uint32)])


def test_what_depends_on_undefined_registers():
    for lines in (
        store("$1", "never"),
        ("add.u32 v, never, 1;", *store("$1", "v")),
        ("ld.global.b32 v, [never+0];",),
        ("setp.eq.u32 p, never, 0;", "@p bra out;", "out:"),
        ("bar.sync never, 32;",),
        # Only some of the threads have it.
        ("setp.lt.u32 p, thread, 31;", "@p mov.b32 v, 1;", *store("$1", "v")),
        ("setp.lt.u32 p, thread, 31;", "selp.b32 v, 1, never, p;", *store("$1", "v")),
        (
            *("setp.eq.u32 p, thread, 3;", "@!p mov.b32 v, 1;"),
            *("shfl.sync.bfly.b32 w, v, 1, 31, 0xffffffff;", *store("$1", "w")),
        ),
        # Shared memory hands it on, and has nothing of its own.
        (
            *("mov.u32 s, fdk_shared;", "st.shared.b32 [s+0], never;", "ld.shared.b32 v, [s+0];"),
            *store("$1", "v"),
        ),
        ("mov.u32 s, fdk_shared;", "ld.shared.b32 v, [s+0];", *store("$1", "v")),
    ):
        refused("undefined", lines)


def test_undefined_registers_that_nothing_depends_on():
    found = WORDS.copy()
    lines = (
        *("setp.lt.u32 p, thread, 16;", "@p mov.b32 v, 7;", "add.u32 w, v, 1;"),
        *("selp.b32 x, w, 5, p;", *store("$1", "x"), "@p add.u32 x, w, w;", *store("$1", "x")),
    )
    run(lines, [found])
    assert found.tolist() == [16] * 16 + [5] * 16


def test_columns_of_a_product_are_undefined_one_by_one():
    """Of B only the first lanes have anything: column 0, which lanes of c = 0 hold of D."""
    opcode = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    lines = (
        *("mov.b32 zero, 0;", "setp.lt.u32 p, thread, 4;", "@p mov.b32 b, 0;"),
        f"{opcode} {{d, e, f, g}}, {{zero, zero, zero, zero}}, {{b, b}}, {{zero, zero, zero, zero}};",
        *("and.b32 c, thread, 3;", "setp.eq.u32 q, c, 0;", "mad.wide.u32 to, thread, 4, $1;"),
    )
    found = WORDS.copy()
    run((*lines, "@q st.global.b32 [to+0], d;", "@q st.global.b32 [to+0], f;"), [found])
    assert found.tolist() == [0 if i % 4 == 0 else i for i in range(32)]
    refused("undefined", (*lines, "@q st.global.b32 [to+0], e;"))
    refused("undefined", (*lines, "st.global.b32 [to+0], d;"))


def test_constants_that_the_kernel_changes():
    address = "mad.wide.u32 p, thread, 4, $1;"
    load, change = "ld.global.nc.b32 v, [p+0];", "st.global.b32 [p+0], thread;"
    refused("as a constant", (address, load, change))
    refused("has written", (address, change, load))
    run((address, change, load.replace(".nc", "")), [WORDS.copy()])
    # Programs of the same launch count too, and an operand that is also a result.
    found = np.zeros(64, np.uint32)
    lines = (
        *("mov.u32 x, %ctaid.x;", "mad.wide.u32 p, x, 128, $1;", "mad.wide.u32 q, thread, 4, p;"),
        *("st.global.b32 [q+0], thread;", "ld.global.nc.b32 v, [p+0];"),
    )
    with pytest.raises(emulator.Fault, match="has written"):
        emulator.run(block(*lines), [found], (2, 1), 32)
    same = WORDS.copy()
    refused("has written", (address, change, address.replace("$1", "$2"), load), [same, same])


def test_deadlocks_and_wrong_barriers():
    for lines, match in (
        (("barrier.sync 1, 64;",), "deadlock"),
        (("setp.lt.u32 p, thread, 16;", "@p bra out;", "bar.sync 0, 32;", "out:"), "deadlock"),
        (("barrier.sync 1, 16;",), "whole warps"),
        (("barrier.sync 16;",), "no barrier 16"),
        (("trap;",), "trap"),
    ):
        refused(match, lines)
        with pytest.raises(emulator.Fault, match=match):
            run(lines, [WORDS], chance=np.random.default_rng(0))
    lines = ("setp.lt.u32 p, thread, 32;", "@p bar.sync 1, 96;", "@!p bar.sync 1, 64;")
    refused("one of", lines, threads=96)
    refused("96 threads are at a barrier of 64", ("barrier.sync 1, 64;",), threads=96)
    refused("without having come", ("barrier.cluster.wait;",), cluster=2)
    refused("comes twice", ("barrier.cluster.arrive;", "barrier.cluster.arrive;"), cluster=2)
    half = ("mov.u32 x, %ctaid.x;", "setp.eq.u32 p, x, 0;", "@p barrier.cluster.arrive;")
    refused("deadlock", (*half, "@p barrier.cluster.wait;", "@!p bar.sync 0, 64;"), cluster=2)
    operands = [np.zeros(64, np.uint32), np.zeros(32, np.uint32)]
    lines = [line for line in bulk() if "cp.async.bulk" not in line]
    refused("deadlock", lines, operands)
    refused("there is no barrier", [line for line in bulk() if "init" not in line], operands)
    extra = [line.replace("@first mbarrier.arrive", "mbarrier.arrive") for line in bulk()]
    refused("more arrivals", extra, operands)


def test_warps_that_have_diverged():
    some = ("mov.b32 v, 1;", "setp.lt.u32 p, thread, 31;", "mov.b32 w, 0;")
    for line in (
        "@p shfl.sync.bfly.b32 w, v, 1, 31, 0xffffffff;",
        "@p vote.sync.any.pred q, p, 0xffffffff;",
        "@p mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {v,v,v,v}, {v,v,v,v}, {v,v}, {v,v,v,v};",
    ):
        refused("diverged", (*some, line))


def test_registers_of_products_under_way(rng):
    operands, _ = group_operands(rng)
    refused("not been waited for", group_product(after=()), operands, threads=128)
    for change in ("mov.b32 a0, 0;", "mov.b32 d1, 0;", "add.f32 e, d0, d0;"):
        wait = "wgmma.wait_group.sync.aligned 0;"
        refused("not been waited for", group_product(after=(change, wait)), operands, threads=128)
    for change in ("mov.b32 a0, 0;", "mov.b32 d1, 0;"):
        refused(
            "after the last wgmma.fence", group_product(before=(change,)), operands, threads=128
        )


def test_what_the_emulator_does_not_know():
    for line in (
        "popc.b32 v, thread;",
        "add.sat.s32 v, thread, 1;",
        "setp.gtu.f32 p, thread, thread;",
        "mul.rz.f32 v, thread, thread;",
        "ld.local.b32 v, [thread+0];",
        "mov.u32 v, %laneid;",
    ):
        with pytest.raises(NotImplementedError, match="is not known"):
            run((line,), [])
    with pytest.raises(ValueError, match="semicolon"):
        run(("add.u32 v, thread, 1",), [])
    refused("shared memory", (), [], shared=300_000)


def test_chance_shows_races():
    """What nothing orders is wrong in some order; what the same block orders is not."""
    wanted = np.arange(64, dtype=np.uint32) ^ 32
    lines = [line.replace("$1", "$2") for line in exchange()]
    assert found_by_chance(lines, wanted, threads=64)
    lines = [line.replace("$1", "$2") for line in exchange("bar.sync 0;")]
    assert not found_by_chance(lines, wanted, threads=64)
    # The same through global memory, where nothing is undefined.
    lines = (
        "xor.b32 other, thread, 32;",
        "mad.wide.u32 p, thread, 4, $1;",
        "mad.wide.u32 q, other, 4, $1;",
    )
    lines += ("add.u32 v, thread, 5;", "st.global.b32 [p+0], v;", "{}", "ld.global.b32 w, [q+0];")
    lines += store("$2", "w")
    for barrier, found in (("", True), ("bar.sync 0;", False)):
        assert (
            found_by_chance([line.replace("{}", barrier) for line in lines], wanted + 5, threads=64)
            is found
        )


def test_chance_shows_copies_that_nobody_waits_for():
    values = np.arange(1024, dtype=np.uint32)
    assert not found_by_chance(copied(1), values[3:128:4])
    assert found_by_chance(copied(2), values[3:128:4])
    assert not found_by_chance(bulk(), values[4:36])
    assert found_by_chance(bulk(wait=()), values[4:36])
    # A wait without a loop: it may return before the phase is over.
    once = ("mbarrier.try_wait.parity.shared::cta.b64 done, [base+0], 0;",)
    assert found_by_chance(bulk(wait=once), values[4:36])


def test_chance_shows_clusters_that_do_not_meet():
    wanted = np.asarray([[1000 * i + 100 + i for i in range(32)]] * 2, np.uint32)
    lines = [line.replace("$1", "$2") for line in cluster()]
    assert found_by_chance(lines, wanted, cluster=2)
