"""The emulator's memory, products of matrices, copies and barriers, against what the PTX ISA says of each."""

import emulator
import ml_dtypes
import numpy as np
import pytest
from test_emulator import block, store

HALVES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


def run(lines, operands, threads=32, **options):
    """Runs a block on one program, or one cluster."""
    shared = options.pop("shared", 4096)
    emulator.run(block(*lines, shared=shared), operands, (1, 1), threads, **options)


def both(seeds=4):
    """Lockstep, and warps in some orders of chance."""
    return (None, *map(np.random.default_rng, range(seeds)))


def vectors(name, count):
    """Names of registers, and those as PTX's vector."""
    names = [f"{name}{i}" for i in range(count)]
    return names, "{" + ", ".join(names) + "}"


def load_all(names, operand, bits=32):
    """Lines that load a thread's elements [threads, len(names)] of an operand."""
    size = len(names) * bits // 8
    yield f"mad.wide.u32 of_{names[0]}, thread, {size}, {operand};"
    for i, name in enumerate(names):
        yield f"ld.global.nc.b{bits} {name}, [of_{names[0]}+{i * bits // 8}];"


def store_all(operand, names):
    """Lines that store a thread's elements [threads, len(names)] of an operand."""
    yield f"mad.wide.u32 to_{names[0]}, thread, {4 * len(names)}, {operand};"
    for i, name in enumerate(names):
        yield f"st.global.b32 [to_{names[0]}+{4 * i}], {name};"


# --- loads and stores -------------------------------------------------------------------------


def test_vectors_and_halves_go_through_shared_memory(rng):
    values = rng.integers(0, 2**32, (32, 4), np.uint32)
    found, pairs, halves = (
        np.zeros((32, 4), np.uint32),
        np.zeros((32, 2), np.uint32),
        values[:, 0].copy(),
    )
    lines = (
        *("mad.wide.u32 p, thread, 16, $1;", "ld.global.v4.b32 {a, b, c, d}, [p+0];"),
        *("mov.u32 base, fdk_shared;", "mad.lo.u32 s, thread, 16, base;"),
        *("st.shared.v4.b32 [s+512], {d, c, b, a};", "ld.shared.v4.f32 {e, f, g, h}, [s+512];"),
        *("mad.wide.u32 q, thread, 16, $2;", "st.global.v4.b32 [q+0], {e, f, g, h};"),
        *("ld.shared.v2.b32 {i, j}, [s+520];", "mad.wide.u32 q, thread, 8, $3;"),
        *("st.global.v2.b32 [q+0], {i, j};", "ld.shared.b16 k, [s+526];"),
        *("mad.wide.u32 q, thread, 4, $4;", "st.global.b16 [q+2], k;"),
    )
    run(lines, [values, found, pairs, halves])
    assert (found == values[:, ::-1]).all()
    assert (pairs == values[:, 1::-1]).all()
    assert (halves & 0xFFFF == values[:, 0] & 0xFFFF).all()
    assert (halves >> 16 == values[:, 0] >> 16).all()


def test_additions_to_memory_are_each_seen_once():
    for chance in both():
        total, before = np.uint32([5]), np.zeros(64, np.uint32)
        lines = (
            *("mov.u64 p, $1;", "atom.relaxed.gpu.global.add.u32 a, [p+0], 3;"),
            *("red.release.gpu.global.add.u32 [p+0], 1;", *store("$2", "a")),
        )
        run(lines, [total, before], 64, chance=chance)
        assert total == 5 + 64 * 4
        assert len(set(before.tolist())) == 64 and before.min() == 5


def test_a_warp_waits_for_a_word_in_memory():
    """The first warp waits until the second has added to a word, and then reads what that wrote before."""
    for chance in both():
        flag, data, found = np.zeros(1, np.uint32), np.zeros(32, np.uint32), np.zeros(32, np.uint32)
        lines = (
            *("mov.u64 flag, $1;", "and.b32 lane, thread, 31;", "mad.wide.u32 p, lane, 4, $2;"),
            *("setp.ge.u32 second, thread, 32;", "@second bra write;", "again:"),
            *("ld.acquire.gpu.global.b32 seen, [flag+0];", "setp.lt.u32 early, seen, 32;"),
            *("@early bra again;", "ld.global.b32 v, [p+0];", *store("$3", "v"), "bra out;"),
            *("write:", "st.global.b32 [p+0], thread;"),
            *("red.release.gpu.global.add.u32 [flag+0], 1;", "out:"),
        )
        run(lines, [flag, data, found], 64, chance=chance)
        assert found.tolist() == list(range(32, 64))


# --- products of matrices ---------------------------------------------------------------------


def lanes():
    """Each lane, its group and its index in the group."""
    return ((lane, lane // 4, lane % 4) for lane in range(32))


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_products_of_halves(rng, kind):
    """Fragments of m16n8k16: a0, a1, a4, a5 are of row g, the last four of columns 8 further; and so on."""
    left, right, added = (rng.integers(-9, 9, s) for s in ((16, 16), (16, 8), (16, 8)))
    a, b, c = (np.zeros((32, n), HALVES[kind]) for n in (8, 4, 4))
    c = c.astype(np.float32)
    for lane, g, t in lanes():
        for i in range(8):
            row, column = g + 8 * (i in (2, 3, 6, 7)), 2 * t + (i & 1) + 8 * (i >= 4)
            a[lane, i] = left[row, column]
        for i in range(4):
            b[lane, i] = right[2 * t + (i & 1) + 8 * (i >= 2), g]
            c[lane, i] = added[g + 8 * (i >= 2), 2 * t + (i & 1)]
    (of_a, a_names), (of_b, b_names), (of_c, c_names) = (
        vectors(n, k) for n, k in (("a", 4), ("b", 2), ("c", 4))
    )
    opcode = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    lines = (
        *(*load_all(of_a, "$1"), *load_all(of_b, "$2"), *load_all(of_c, "$3")),
        *(f"{opcode} {c_names}, {a_names}, {b_names}, {c_names};", *store_all("$4", of_c)),
    )
    found = np.zeros((32, 4), np.float32)
    run(lines, [a, b, c, found])
    wanted = left @ right + added
    for lane, g, t in lanes():
        for i in range(4):
            assert found[lane, i] == wanted[g + 8 * (i >= 2), 2 * t + (i & 1)]


@pytest.mark.parametrize("kinds", ["us", "su"])
def test_products_of_bytes(rng, kinds):
    """Fragments of m16n8k32: a0 to a3 and a8 to a11 are of row g, the last eight of columns 16 further."""
    dtypes = [np.uint8 if kind == "u" else np.int8 for kind in kinds]
    left, right = (
        rng.integers(np.iinfo(d).min, np.iinfo(d).max, s, d, endpoint=True)
        for d, s in zip(dtypes, ((16, 32), (32, 8)), strict=True)
    )
    added = rng.integers(-(2**31), 2**31, (16, 8))
    a, b, c = (
        np.zeros((32, 16), dtypes[0]),
        np.zeros((32, 8), dtypes[1]),
        np.zeros((32, 4), np.uint32),
    )
    for lane, g, t in lanes():
        for i in range(16):
            row, column = g + 8 * (i % 8 >= 4), 4 * t + (i & 3) + 16 * (i >= 8)
            a[lane, i] = left[row, column]
        for i in range(8):
            b[lane, i] = right[4 * t + (i & 3) + 16 * (i >= 4), g]
        for i in range(4):
            c[lane, i] = added[g + 8 * (i >= 2), 2 * t + (i & 1)] % 2**32
    (of_a, a_names), (of_b, b_names), (of_c, c_names) = (
        vectors(n, k) for n, k in (("a", 4), ("b", 2), ("c", 4))
    )
    opcode = "mma.sync.aligned.m16n8k32.row.col.s32.{}8.{}8.s32".format(*kinds)
    lines = (
        *(*load_all(of_a, "$1"), *load_all(of_b, "$2"), *load_all(of_c, "$3")),
        *(f"{opcode} {c_names}, {a_names}, {b_names}, {c_names};", *store_all("$4", of_c)),
    )
    found = np.zeros((32, 4), np.uint32)
    run(lines, [a, b, c, found])
    wanted = left.astype(np.int64) @ right.astype(np.int64) + added
    for lane, g, t in lanes():
        for i in range(4):
            assert found[lane, i] == wanted[g + 8 * (i >= 2), 2 * t + (i & 1)] % 2**32


# Cores of B, 8 tokens x 16 bytes: bytes from one to the next along K, and along the tokens.
BY_K, BY_TOKEN, TOKENS = 272, 640, 16


def group_product(before=(), after=("wgmma.wait_group.sync.aligned 0;",)):
    """A warpgroup's product with what is at `fdk_shared`: B from $1, A from $2, sums from and to $3."""
    (of_a, a_names), (of_d, d_names) = vectors("a", 4), vectors("d", TOKENS // 2)
    descriptor = BY_K // 16 << 16 | BY_TOKEN // 16 << 32
    return (
        *(
            "mov.u32 base, fdk_shared;",
            "mad.lo.u32 s, thread, 16, base;",
            "mad.wide.u32 p, thread, 16, $1;",
        ),
        *("ld.global.v4.b32 {w, x, y, z}, [p+0];", "st.shared.v4.b32 [s+0], {w, x, y, z};"),
        *("fence.proxy.async.shared::cta;", "bar.sync 0;", *load_all(of_a, "$2")),
        *load_all_sums(of_d),
        *("shr.u32 start, base, 4;", "mul.wide.u32 b, start, 1;", f"add.u64 b, b, {descriptor};"),
        *("setp.eq.u32 true, 0, 0;", "wgmma.fence.sync.aligned;", *before),
        f"wgmma.mma_async.sync.aligned.m64n{TOKENS}k16.f32.bf16.bf16 {d_names}, {a_names}, b, true, 1, 1, 0;",
        *("wgmma.commit_group.sync.aligned;", *after, *store_all("$3", of_d)),
    )


def load_all_sums(names):
    """Lines that load the sums, which are stored to later."""
    return (line.replace(".nc", "") for line in load_all(names, "$3"))


def group_operands(rng):
    """B as the warpgroup reads it, A and the sums in fragments; and the sums that are wanted."""
    left, right = rng.integers(-9, 9, (64, 16)), rng.integers(-9, 9, (16, TOKENS))
    shared = np.zeros(1024, ml_dtypes.bfloat16)
    for k, token in np.ndindex(16, TOKENS):
        address = k // 8 * BY_K + token // 8 * BY_TOKEN + token % 8 * 16 + k % 8 * 2
        shared[address // 2] = right[k, token]
    a, sums = np.zeros((128, 8), ml_dtypes.bfloat16), rng.integers(-9, 9, (128, TOKENS // 2))
    wanted, product = sums.copy(), left @ right
    for thread in range(128):
        row, t = thread // 32 * 16 + thread % 32 // 4, thread % 4
        for i in range(8):
            a[thread, i] = left[row + 8 * (i % 4 >= 2), 2 * t + (i & 1) + 8 * (i >= 4)]
        for i in range(TOKENS // 2):
            wanted[thread, i] += product[row + 8 * (i % 4 >= 2), i // 4 * 8 + 2 * t + (i & 1)]
    return [shared, a, sums.astype(np.float32)], wanted


def test_products_of_a_warpgroup(rng):
    for chance in both(2):
        operands, wanted = group_operands(rng)
        run(group_product(), operands, 128, chance=chance)
        assert (operands[2] == wanted).all()


# --- copies and barriers ----------------------------------------------------------------------

SLOTS = (
    "mov.u32 base, fdk_shared;",
    "mad.lo.u32 s, thread, 16, base;",
    "mad.wide.u32 p, thread, 16, $1;",
)


def copied(left):
    """Two groups of copies, of which so many may be under way when the first is read."""
    return (
        *(*SLOTS, "cp.async.cg.shared.global [s+0], [p+0], 16;", "cp.async.commit_group;"),
        *("cp.async.ca.shared.global [s+1024], [p+8], 8;", "cp.async.commit_group;"),
        *(f"cp.async.wait_group {left};", "ld.shared.b32 v, [s+12];", *store("$2", "v")),
    )


def test_groups_of_copies_arrive_in_order(rng):
    values = rng.integers(0, 2**32, (32, 4), np.uint32)
    for chance in both():
        for left in (0, 1):
            found = np.zeros(32, np.uint32)
            run(copied(left), [values, found], chance=chance)
            assert (found == values[:, 3]).all()


BULK = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"


def bulk(
    wait=(
        "again:",
        "mbarrier.try_wait.parity.shared::cta.b64 done, [base+0], 0;",
        "@!done bra again;",
    ),
):
    """A thread copies 128 bytes for its warp, which waits for them."""
    return (
        *("mov.u32 base, fdk_shared;", "setp.eq.u32 first, thread, 0;", "mov.u64 p, $1;"),
        *("@first mbarrier.init.shared::cta.b64 [base+0], 1;", "bar.sync 0;"),
        *("@first mbarrier.arrive.expect_tx.shared::cta.b64 _, [base+0], 128;",),
        f"@first {BULK} [base+128], [p+16], 128, [base+0];",
        *(*wait, "mad.lo.u32 s, thread, 4, base;", "ld.shared.b32 v, [s+128];", *store("$2", "v")),
    )


def test_bulk_copies_turn_their_barrier(rng):
    values = rng.integers(0, 2**32, 64, np.uint32)
    for chance in both(8):
        found = np.zeros(32, np.uint32)
        run(bulk(), [values, found], chance=chance)
        assert (found == values[4:36]).all()


def lanes_copy(count, wait=True):
    """Each lane copies 16 bytes for its neighbour and arrives at a barrier of so many; all wait for it."""
    looks = (
        "again:",
        "mbarrier.test_wait.parity.shared::cta.b64 done, [base+0], 0;",
        "@!done bra again;",
    )
    return (
        *("mov.u32 base, fdk_shared;", "setp.eq.u32 first, thread, 0;"),
        *(f"@first mbarrier.init.shared::cta.b64 [base+0], {count};", "bar.sync 0;"),
        *("mad.wide.u32 p, thread, 16, $1;", "mad.lo.u32 s, thread, 16, base;"),
        "cp.async.cg.shared.global [s+128], [p+0], 16;",
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [base+0];",
        *(looks if wait else ()),
        *("xor.b32 other, thread, 1;", "mad.lo.u32 s, other, 16, base;"),
        *("ld.shared.b32 v, [s+128];", *store("$2", "v")),
    )


def test_copies_of_lanes_turn_their_barrier(rng):
    values = rng.integers(0, 2**32, (32, 4), np.uint32)
    wanted = values[np.arange(32) ^ 1, 0]
    for chance in both(8):
        found = np.zeros(32, np.uint32)
        run(lanes_copy(32), [values, found], chance=chance)
        assert (found == wanted).all()
    with pytest.raises(emulator.Fault, match="never written"):
        for chance in both(8):  # copies are not late each time
            run(lanes_copy(32, wait=False), [values, found], chance=chance)
    with pytest.raises(emulator.Fault, match="deadlock"):
        run(lanes_copy(33), [values, np.zeros(32, np.uint32)])


def exchange(*between):
    """Each of two warps reads what the other one wrote."""
    return (
        *(
            "mov.u32 base, fdk_shared;",
            "mad.lo.u32 s, thread, 4, base;",
            "st.shared.b32 [s+0], thread;",
        ),
        *(*between, "xor.b32 other, thread, 32;", "mad.lo.u32 s, other, 4, base;"),
        *("ld.shared.b32 v, [s+0];", *store("$1", "v")),
    )


def test_barriers_of_a_program_order_what_warps_write():
    # By the number of a register too, which is another one for the upper two warps.
    pairs = ("shr.u32 number, thread, 6;", "add.u32 number, number, 1;", "bar.sync number, 64;")
    for barrier, threads in (
        (("bar.sync 0;",), 64),
        (("barrier.sync 3, 64;",), 64),
        (pairs, 128),
        # The third warp leaves without waiting, and is no longer counted.
        (("setp.ge.u32 p, thread, 64;", "@p bra out;", "bar.sync 0;"), 96),
    ):
        for chance in both(8):
            found = np.zeros(threads, np.uint32)
            run((*exchange(*barrier), "out:"), [found], threads, chance=chance)
            some = threads if threads != 96 else 64
            assert (found[:some] == np.arange(some) ^ 32).all()


def cluster(*between):
    """Each of two programs reads the other one's shared memory."""
    return (
        *("mov.u32 base, fdk_shared;", "mad.lo.u32 s, thread, 4, base;", "mov.u32 rank, %ctaid.x;"),
        *("mad.lo.u32 v, rank, 100, thread;", "st.shared.b32 [s+0], v;", *between),
        *("mapa.shared::cluster.u32 first, s, 0;", "mapa.shared::cluster.u32 second, s, 1;"),
        *("ld.shared::cluster.b32 a, [first+0];", "ld.shared::cluster.b32 b, [second+0];"),
        *("mad.lo.u32 v, a, 1000, b;", "mad.lo.u32 index, rank, 32, thread;"),
        *("mad.wide.u32 q, index, 4, $1;", "st.global.b32 [q+0], v;"),
    )


def test_programs_of_a_cluster_read_each_other():
    meet = ("barrier.cluster.arrive.release;", "barrier.cluster.wait.acquire;")
    for chance in both(8):
        found = np.zeros((2, 32), np.uint32)
        run(cluster(*meet), [found], cluster=2, chance=chance)
        assert (found == [1000 * i + 100 + i for i in range(32)]).all()
