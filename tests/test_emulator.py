"""The emulator's instructions on small blocks of PTX, against what the PTX ISA says of each.

What is expected is calculated with Python's integers and fractions, an element at a time.
"""

import itertools
import math
from fractions import Fraction

import emulator
import ml_dtypes
import numpy as np
import pytest

WORDS = [
    0,
    1,
    2,
    7,
    31,
    32,
    33,
    63,
    64,
    65,
    255,
    0x80FF7F01,
    2**31 - 1,
    2**31,
    2**32 - 2,
    2**32 - 1,
]
DOUBLES = [0, 1, 63, 64, 65, 2**32, 2**63, 2**64 - 1, 0x123456789ABCDEF0]
HALVES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}
ADDRESS = "mad.wide.u32 {0}, thread, {1}, {2};"


def block(*lines, shared=1024):
    """A block of PTX that knows its `thread`."""
    declaration = f".shared .align 128 .b8 fdk_shared[{shared}];"
    return "\n".join(["{", declaration, "mov.u32 thread, %tid.x;", *lines, "}"])


def load(register, operand, bits=32):
    """Lines that load a thread's element of an operand."""
    register_of = f"of_{register}"
    return ADDRESS.format(
        register_of, bits // 8, operand
    ), f"ld.global.b{bits} {register}, [{register_of}+0];"


def store(operand, register, bits=32):
    """Lines that store a thread's element of an operand."""
    register_of = f"to_{register}"
    return ADDRESS.format(
        register_of, bits // 8, operand
    ), f"st.global.b{bits} [{register_of}+0], {register};"


def calculate(opcode, *sources, result=np.uint32, more=""):
    """What an instruction makes of arrays, an element a thread; `more` follows its registers."""
    arrays = [np.asarray(a) for a in sources]
    count = len(arrays[0])
    threads = -(-count // 32) * 32
    arrays = [np.resize(a, threads) for a in arrays]
    found, names, lines = np.zeros(threads, result), [], []
    for i, array in enumerate(arrays):
        names.append(f"source_{i}")
        lines += load(names[-1], f"${i + 1}", 8 * array.itemsize)
    lines += [f"{opcode} result, {', '.join(names)}{more};"]
    lines += store(f"${len(arrays) + 1}", "result", 8 * found.itemsize)
    emulator.run(block(*lines), [*arrays, found], (1, 1), threads)
    return found[:count]


def columns(*values, dtype=np.uint32):
    """Every combination of values, an array for each argument."""
    return np.ascontiguousarray(np.asarray(list(itertools.product(*values)), dtype).T)


def check(opcode, sources, wanted, result=np.uint32, more=""):
    """Compares an instruction with a function of Python's integers, modulo the result's width."""
    found = calculate(opcode, *sources, result=result, more=more)
    modulus = 1 << 8 * np.dtype(result).itemsize
    expected = [wanted(*map(int, row)) % modulus for row in zip(*sources, strict=True)]
    assert found.tolist() == expected, opcode


def signed(a, bits=32):
    """A number's bits as two's complement."""
    return a - (a >> bits - 1 << bits)


# --- integers ---------------------------------------------------------------------------------


def test_integers_of_two_operands():
    for opcode, wanted in {
        "add.u32": lambda a, b: a + b,
        "sub.u32": lambda a, b: a - b,
        "mul.lo.u32": lambda a, b: a * b,
        "mul.hi.u32": lambda a, b: a * b >> 32,
        "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
        "min.u32": min,
        "max.u32": max,
        "min.s32": lambda a, b: min(signed(a), signed(b)),
        "max.s32": lambda a, b: max(signed(a), signed(b)),
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "xor.b32": lambda a, b: a ^ b,
    }.items():
        check(opcode, columns(WORDS, WORDS), wanted)


def test_shifts_by_more_than_the_width_leave_nothing_but_signs():
    for opcode, wanted in {
        "shl.b32": lambda a, b: a << min(b, 32),
        "shr.u32": lambda a, b: a >> min(b, 32),
        "shr.b32": lambda a, b: a >> min(b, 32),
        "shr.s32": lambda a, b: signed(a) >> min(b, 32),
    }.items():
        check(opcode, columns(WORDS, WORDS), wanted)
    wide, by = columns(DOUBLES, WORDS, dtype=np.uint64)
    for opcode, wanted in {
        "shl.b64": lambda a, b: a << min(b, 64),
        "shr.u64": lambda a, b: a >> min(b, 64),
        "shr.s64": lambda a, b: signed(a, 64) >> min(b, 64),
    }.items():
        check(opcode, [wide, by.astype(np.uint32)], wanted, np.uint64)


def test_multiply_add_and_wide_integers():
    some = WORDS[::3]
    check("mad.lo.u32", columns(some, some, some), lambda a, b, c: a * b + c)
    pairs = columns(WORDS, WORDS)
    check("mul.wide.u32", pairs, lambda a, b: a * b, np.uint64)
    check("mul.wide.s32", pairs, lambda a, b: signed(a) * signed(b), np.uint64)
    added = np.resize(np.asarray(DOUBLES, np.uint64), len(pairs[0]))
    check("mad.wide.u32", [*pairs, added], lambda a, b, c: a * b + c, np.uint64)
    wide = columns(DOUBLES, DOUBLES, dtype=np.uint64)
    check("add.u64", wide, lambda a, b: a + b, np.uint64)
    check("sub.u64", wide, lambda a, b: a - b, np.uint64)
    check("and.b64", wide, lambda a, b: a & b, np.uint64)
    check("mad.lo.u64", [*wide, wide[0]], lambda a, b, c: a * b + c, np.uint64)


def test_bytes_are_permuted_or_their_signs_repeated(rng):
    def permuted(a, b, selectors):
        source, result = (b << 32 | a).to_bytes(8, "little"), []
        for i in range(4):
            selector = selectors >> 4 * i & 15
            byte = source[selector & 7]
            result.append((255 if byte & 128 else 0) if selector & 8 else byte)
        return int.from_bytes(bytes(result), "little")

    sources = rng.integers(0, 2**32, (3, 512), np.uint32)
    sources[2, :16] = np.arange(16) * 0x1111
    check("prmt.b32", sources, permuted)


def test_logic_by_a_table_of_eight_bits(rng):
    words = rng.integers(0, 2**32, (3, 32), np.uint32)
    for table in (0x00, 0x01, 0x80, 0xE4, 0xEA, 0x96, 0xFF, *rng.integers(0, 256, 8).tolist()):

        def looked_up(a, b, c, table=table):
            entries = [(a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1) for i in range(32)]
            return sum((table >> entry & 1) << i for i, entry in enumerate(entries))

        check("lop3.b32", words, looked_up, more=f", 0x{table:02X}")


def test_bit_fields_end_at_the_top():
    def field(a, start, count, has_sign):
        start, count = start & 255, count & 255
        sign = a >> min(start + count - 1, 31) & 1 if has_sign and count else 0
        bits = [(a >> start + i & 1) if i < count and start + i < 32 else sign for i in range(32)]
        return sum(bit << i for i, bit in enumerate(bits))

    sources = columns([0x80FF7F01, 0x7F00FF80], WORDS, WORDS)
    check("bfe.u32", sources, lambda a, b, c: field(a, b, c, False))
    check("bfe.s32", sources, lambda a, b, c: field(a, b, c, True))


def test_dot_products_of_bytes(rng):
    sources = rng.integers(0, 2**32, (3, 64), np.uint32)
    for kinds in itertools.product("us", repeat=2):

        def dot(a, b, c, kinds=kinds):
            pairs = zip(a.to_bytes(4, "little"), b.to_bytes(4, "little"), strict=True)
            x, y = (signed if kind == "s" else lambda v, _: v for kind in kinds)
            return c + sum(x(i, 8) * y(j, 8) for i, j in pairs)

        check("dp4a.{}32.{}32".format(*kinds), sources, dot)


# --- floats -----------------------------------------------------------------------------------

FORMATS = {"f32": (24, -149), "bf16": (8, -133), "f16": (11, -24)}


def nearest(value, kind):
    """A fraction rounded to the nearest number of a format, to an even one if two are."""
    digits, lowest = FORMATS[kind]
    if not value:
        return value
    exponent = math.floor(math.log2(abs(value)))
    exponent += (abs(value) >= Fraction(2) ** (exponent + 1)) - (
        abs(value) < Fraction(2) ** exponent
    )
    unit = Fraction(2) ** max(exponent - digits + 1, lowest)
    return round(value / unit) * unit


def some_floats(rng, count=256):
    """Numbers of few and of many digits, large and small ones, so that sums meet ties."""
    digits = rng.integers(-(2**24), 2**24, count) >> rng.integers(0, 24, count)
    return np.ldexp(digits, rng.integers(-60, 20, count)).astype(np.float32)


def test_float_arithmetic_is_rounded_once(rng):
    a, b, c = (some_floats(rng) for _ in range(3))
    # Products halfway between two float32, and sums that say on which side: float64 cannot hold them.
    a[:3], b[:3], c[:3] = 24929 / 2**14, 673 / 2**10, [2.0**-60, -(2.0**-60), 0]
    for opcode, count, wanted in (
        ("add.f32", 2, lambda a, b: a + b),
        ("sub.f32", 2, lambda a, b: a - b),
        ("mul.f32", 2, lambda a, b: a * b),
        ("div.rn.f32", 2, lambda a, b: a / b if b else Fraction(0)),
        ("fma.rn.f32", 3, lambda a, b, c: a * b + c),
    ):
        values = (a, np.where(b == 0, np.float32(1), b), c)[:count]
        found = calculate(opcode, *(v.view(np.uint32) for v in values)).view(np.float32)
        for y, *x in zip(found.tolist(), *(v.tolist() for v in values), strict=True):
            assert Fraction(y) == nearest(wanted(*map(Fraction, x)), "f32"), (opcode, x)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_arithmetic_of_halves_is_rounded_once(rng, kind):
    a, b, c = (np.ldexp(*rng.integers([[-200], [-9]], [[200], [0]], (2, 128))) for _ in range(3))
    # Products halfway between two halves.
    a[:3], b[:3] = (9 / 8, 29 / 32) if kind == "bf16" else (1.5, 683 / 512)
    c[:3] = 2.0**-24, -(2.0**-24), 0
    if kind == "bf16":
        c[:2] = 2.0**-40, -(2.0**-60)
    values = [v.astype(HALVES[kind]) for v in (a, b, c)]
    for opcode, count, wanted in (
        ("add", 2, lambda a, b: a + b),
        ("sub", 2, lambda a, b: a - b),
        ("mul", 2, lambda a, b: a * b),
        ("fma", 3, lambda a, b, c: a * b + c),
    ):
        words = (v.view(np.uint32) for v in values[:count])
        found = calculate(f"{opcode}.rn.{kind}x2", *words).view(HALVES[kind])
        for y, *x in zip(found, *values[:count], strict=True):
            expected = nearest(wanted(*(Fraction(float(v)) for v in x)), kind)
            assert Fraction(float(y)) == expected, (opcode, x)


def test_products_of_halves_keep_the_sign_of_a_zero():
    halves = np.asarray([0.0, -0.0], ml_dtypes.bfloat16)
    a, b = (np.tile(halves, 2), np.repeat(halves, 2))
    for opcode, wanted in (("mul", [0, 1, 1, 0]), ("add", [0, 0, 0, 1]), ("sub", [0, 1, 0, 0])):
        words = (v.view(np.uint32) for v in (a, b))
        found = calculate(f"{opcode}.rn.bf16x2", *words).view(np.uint16)
        assert (found >> 15).tolist() == wanted, opcode


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_conversions_round_to_nearest_even(rng, kind):
    values = np.clip(some_floats(rng), -60000, 60000)
    digits = FORMATS[kind][0]
    for i in range(8):  # ties, and just above and below
        values[i] = (1 + (i % 4 * 2 + 1) * 2.0**-digits) * 2.0**-i + (i // 4) * 2.0**-30
    bits = values.view(np.uint32)
    found = calculate(f"cvt.rn.{kind}.f32", bits, result=np.uint16)
    for x, y in zip(values.tolist(), found.view(HALVES[kind]), strict=True):
        assert Fraction(float(y)) == nearest(Fraction(x), kind), x
    # The first source is the upper half.
    pairs = calculate(f"cvt.rn.{kind}x2.f32", bits, bits[::-1].copy())
    assert (pairs >> 16).tolist() == found.tolist()
    assert (pairs & 0xFFFF).tolist() == found[::-1].tolist()
    if kind == "f16":
        assert calculate("cvt.rn.f16.f32", np.float32([65520]).view(np.uint32)) == 0x7C00
        back = calculate("cvt.f32.f16", found).view(np.float32)
        assert back.tolist() == found.view(np.float16).astype(float).tolist()


def test_integers_become_floats():
    numbers = [0, 1, 2**24 + 1, 2**24 + 3, 2**31 - 1, 2**31, 2**32 - 1]
    for kind, number in (("s32", signed), ("u32", lambda a: a)):
        found = calculate(f"cvt.rn.f32.{kind}", np.asarray(numbers, np.uint32)).view(np.float32)
        wanted = [nearest(Fraction(number(a)), "f32") for a in numbers]
        assert [Fraction(y) for y in found.tolist()] == wanted


def test_approximate_functions_are_close(rng):
    positive = np.abs(some_floats(rng)) + np.float32(2.0**-60)
    for name, wanted, values in (
        ("rcp", lambda a: 1 / a, positive),
        ("rsqrt", lambda a: a**-0.5, positive),
        ("ex2", lambda a: 2.0**a, rng.uniform(-120, 120, 256).astype(np.float32)),
    ):
        found = calculate(f"{name}.approx.f32", values.view(np.uint32)).view(np.float32)
        for x, y in zip(values.tolist(), found.tolist(), strict=True):
            assert abs(y / wanted(x) - 1) < 2**-22, (name, x)
    special = np.asarray([0.0, -0.0, np.inf, -np.inf], np.float32)
    for name, wanted in (
        ("rcp", [np.inf, -np.inf, 0, 0]),
        ("ex2", [1, 1, np.inf, 0]),
        ("rsqrt", [np.inf, -np.inf, 0, np.nan]),
    ):
        found = calculate(f"{name}.approx.f32", special.view(np.uint32)).view(np.float32)
        np.testing.assert_array_equal(found, np.asarray(wanted, np.float32), name)


def test_extremes_know_nans_and_signs_of_zero():
    nan, zero = 0x7FC00000, 0x80000000
    one, two = (int(np.float32(v).view(np.uint32)) for v in (1, -2))
    a, b = columns([nan, 0, zero, one, two], [nan, 0, zero, one, two])
    order = [two, zero, 0, one]
    for opcode, choose in (("max", max), ("min", min)):
        found = calculate(f"{opcode}.f32", a, b)
        kept = calculate(f"{opcode}.NaN.f32", a, b)
        for x, y, z, w in zip(a.tolist(), b.tolist(), found.tolist(), kept.tolist(), strict=True):
            numbers = [v for v in (x, y) if v != nan]
            wanted = choose(numbers, key=order.index) if numbers else nan
            assert z == wanted, (opcode, x, y)
            assert w == (wanted if len(numbers) == 2 else nan), (opcode, x, y)
    assert calculate("abs.f32", np.uint32([two, zero])).tolist() == [two ^ 2**31, 0]


# --- predicates, lanes ------------------------------------------------------------------------


def test_comparisons_select():
    tests = dict(eq="==", ne="!=", lt="<", le="<=", gt=">", ge=">=")
    a, b = columns(WORDS, WORDS)
    values = np.asarray([np.nan, 0.0, -0.0, 1, -1, np.inf], np.float32).view(np.uint32)
    x, y = columns(values, values)
    for kind, number, first, second in (
        ("u32", lambda a: a, a, b),
        ("s32", signed, a, b),
        ("f32", lambda a: float(np.uint32(a).view(np.float32)), x, y),
    ):
        for test, symbol in tests.items():
            found = np.zeros(len(first), np.uint32)
            lines = (
                *(*load("a", "$1"), *load("b", "$2"), f"setp.{test}.{kind} p, a, b;"),
                *("selp.b32 r, 5, 6, p;", "@p add.u32 r, r, 10;", "@!p add.u32 r, r, 20;"),
                *("not.pred q, p;", "and.pred q, p, q;", "@q mov.b32 r, 0;", *store("$3", "r")),
            )
            count = len(first) // 32 * 32
            emulator.run(block(*lines), [first, second, found], (1, 1), count)
            for i in range(count):
                left, right = number(int(first[i])), number(int(second[i]))
                true = eval(f"left {symbol} right") and left == left and right == right
                assert found[i] == (15 if true else 26), (test, kind, left, right)


def test_halves_are_packed_and_taken_apart(rng):
    words = rng.integers(0, 2**32, 32, np.uint32)
    out, wide = np.zeros(32, np.uint32), np.zeros(32, np.uint64)
    lines = (
        *load("a", "$1"),
        *("mov.b32 {low, high}, a;", "mov.b32 b, {high, low};", "mov.b64 c, {a, b};"),
        *(*store("$2", "b"), *store("$3", "c", 64)),
    )
    emulator.run(block(*lines), [words, out, wide], (1, 1), 32)
    swapped = [w >> 16 | (w & 0xFFFF) << 16 for w in words.tolist()]
    assert out.tolist() == swapped
    assert wide.tolist() == [b << 32 | a for a, b in zip(words.tolist(), swapped, strict=True)]


def test_shuffles_and_votes():
    values = np.arange(100, 164, dtype=np.uint32)

    def source(mode, lane, b, c):
        clamp, segment = c & 31, c >> 8 & 31
        last = lane & segment | clamp & ~segment
        first = lane & segment
        other = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | b & ~segment}
        inside = other[mode] >= last if mode == "up" else other[mode] <= last
        return other[mode] if inside else lane

    for mode, (b, c) in itertools.product(
        ("up", "down", "bfly", "idx"), ((1, 31), (3, 0), (5, 0x181F), (16, 31), (7, 0x1807))
    ):
        found = calculate(f"shfl.sync.{mode}.b32", values, more=f", {b}, {c}, 0xffffffff")
        wanted = [100 + i // 32 * 32 + source(mode, i % 32, b, c) for i in range(64)]
        assert found.tolist() == wanted, (mode, b, c)
    for vote, wanted in (("any", [0, 1, 1]), ("all", [0, 0, 1])):
        found, bits = np.zeros(96, np.uint32), np.repeat(np.uint32([0, 0, 1]), 32)
        bits[40] = 1
        lines = (
            *(*load("a", "$1"), "setp.ne.u32 p, a, 0;"),
            *(f"vote.sync.{vote}.pred q, p, 0xffffffff;", "selp.b32 r, 1, 0, q;"),
            *store("$2", "r"),
        )
        emulator.run(block(*lines), [bits, found], (1, 1), 96)
        assert found.reshape(3, 32).all(1).tolist() == found.reshape(3, 32).any(1).tolist()
        assert found[::32].tolist() == wanted


def test_branches_loop_until_all_threads_are_through():
    """Each thread adds up the numbers below its own."""
    lines = (
        *("mov.b32 i, 0;", "mov.b32 sum, 0;", "again:", "setp.ge.u32 p, i, thread;"),
        *("@p bra out;", "add.u32 sum, sum, i;", "add.u32 i, i, 1;", "bra again;", "out:"),
        *store("$1", "sum"),
    )
    for chance in (None, np.random.default_rng(1)):
        found = np.zeros(64, np.uint32)
        emulator.run(block(*lines), [found], (1, 1), 64, chance=chance)
        assert found.tolist() == [i * (i - 1) // 2 for i in range(64)]
