"""The tuned table and the rule by which products find a row: the next larger m, then the nearest shape."""

import dataclasses
import itertools
import math

import pytest
from golden import case

from pallas_kernels import choice, integer, tuning
from pallas_kernels.target import H200, Target

ROWS = choice.table()
DEVICES = sorted({(row["device"], choice.architecture_of(row)) for row in ROWS})
FEW = 64  # tokens: above, every row says Mosaic, which chooses for itself


def _target(device, architecture):
    return Target.parse(
        architecture, Target((9, 0), 132, H200.shared_bytes, device.split(" as ")[0])
    )


def _rows(device):
    return [row for row in ROWS if row["device"] == device]


def _first(row, target, m=None, stretch=1.0):
    """The row that a product follows first: of the shape and width of a row, or of one a little larger."""
    n, k = (round(row[name] * stretch) for name in ("n", "k"))
    product = case(m or row["m"], n, k, row["bits"], choice.is_uniform(row))
    return choice.nearest_rows(product, target)[0]


def _levels(row, target):
    """Numbers of tokens for which there are rows that a product of this width may follow, ascending."""
    product = case(1, row["n"], row["k"], row["bits"])
    levels, m = [], 1
    while rows := choice.nearest_rows(product, target):
        levels.append(rows[0]["m"])
        m = levels[-1] + 1
        product = case(m, row["n"], row["k"], row["bits"])
    return levels


@pytest.mark.parametrize(("device", "architecture"), DEVICES)
def test_no_row_is_hidden_from_its_product_and_its_neighbours(device, architecture):
    """Fewer tokens, down to the next row's, and shapes 3% off."""
    target = _target(device, architecture)
    assert target.kind == device
    for row in _rows(device):
        below = max([0, *(m for m in _levels(row, target) if m < row["m"])])
        for m in {row["m"], (row["m"] + below + 1) // 2, below + 1}:
            for stretch in (1.0, 0.97, 1.03):
                found = _first(row, target, m, stretch)
                assert choice.row_key(found) == choice.row_key(row), (m, stretch, found)


@pytest.mark.parametrize(("device", "architecture"), DEVICES)
def test_a_row_for_many_more_tokens_has_the_kernel_of_those_below(device, architecture):
    """A kernel that is better from some number of tokens on has a row for no more than twice as many."""
    target = _target(device, architecture)
    for row in _rows(device):
        levels = [m for m in _levels(row, target) if m <= FEW]
        for below, above in itertools.pairwise(levels):
            if above > 2 * below + 2:
                few, many = (_first(row, target, m)["kernel"] for m in (below, above))
                # `integer` multiplies one token alone, whatever those above take.
                assert few in (many, "integer"), (row, below, above, few, many)


@pytest.mark.parametrize(("device", "architecture"), [d for d in DEVICES if "H200" in d[0]])
def test_no_row_of_another_shape_comes_between_two_that_agree(device, architecture):
    """H100's rows are older than the Mosaic kernel: there one of the H200 may."""
    target = _target(device, architecture)
    own = {}
    for row in _rows(device):
        key = row["n"], row["k"], row["bits"], choice.is_uniform(row)
        own.setdefault(key, []).append(row)
    for rows in own.values():
        rows.sort(key=lambda row: row["m"])
        for fewer, more in itertools.pairwise(rows):
            if fewer["kernel"] == more["kernel"]:
                for m in _levels(fewer, target):
                    if fewer["m"] < m < more["m"]:
                        assert _first(fewer, target, m)["kernel"] == fewer["kernel"], (fewer, m)


def _apart(row, product, weight):
    """How far a row is from a product where a factor of tokens counts like so many factors of a shape."""
    if row["m"] < product["m"]:
        return math.inf
    others = (row["device"] != product["device"]) + (
        choice.is_uniform(row) != choice.is_uniform(product)
    )
    sizes = sum(abs(math.log(row[name] / product[name])) for name in ("n", "k"))
    return sizes + choice.ANOTHER * others + weight * math.log(row["m"] / product["m"])


def test_rows_that_are_left_out_are_guessed_as_well_as_by_any_weight_of_tokens(monkeypatch):
    """What the rule says for a product without its own rows, beside what was measured for it.

    With tokens that count less than shapes do, another number of tokens of the same shape comes first.
    """
    rows = [row for row in ROWS if choice.architecture_of(row) == "sm_90"]
    few = [row for row in rows if row["m"] <= FEW]
    right = dict.fromkeys(("rule", 0.5, 1, 2, 4), 0)
    for row in few:
        point = [row[name] for name in ("m", "n", "k", "bits")]
        rest = [r for r in rows if [r[name] for name in ("m", "n", "k", "bits")] != point]
        monkeypatch.setattr(choice, "table", lambda rest=rest: rest)
        found = _first(row, _target(row["device"], "sm_90"))
        right["rule"] += found["kernel"] == row["kernel"]
        alike = [r for r in rest if r["bits"] == row["bits"]]
        for weight in (0.5, 1, 2, 4):
            nearest = min(alike, key=lambda r, w=weight: _apart(r, row, w))
            right[weight] += nearest["kernel"] == row["kernel"]
    print(f"of {len(few)} rows the kernel of {right}")
    assert right["rule"] >= max(right.values()) - 0.01 * len(few), right
    assert right["rule"] > right[0.5] + 0.05 * len(few), right
    assert right["rule"] > 0.8 * len(few), right


def test_rows_of_older_files_are_read():
    """Those that the search has left in a user's folder."""
    row = {"kernel": "integer", "config": {"workers": 12, "programs": 264}}
    half = Target.parse("sm_90:multiprocessors=66", H200)
    assert choice.configuration(row, half) == integer.Config(consumers=12, programs=132)


def test_a_row_may_ask_for_copies_by_lanes(monkeypatch):
    """Plans say so, groups that have a configuration of their own keep it, and the search records it."""
    config = {"consumers": 24, "programs_each": 1, "lane_copies": True}
    row = dict(device=H200.kind, bits=1, m=1, n=8192, k=8192, kernel="integer", config=config)
    monkeypatch.setattr(choice, "table", lambda: [row])
    product = case(1, 8192, 8192, 1)
    plan = choice.choose(product, H200)
    assert plan.config == integer.Config(24, 132, lane_copies=True)
    assert str(plan).startswith("integer Config(consumers=24, programs=132, lane_copies=True): ")
    assert tuning._recorded(plan.config, H200) == config
    small = choice.choose(dataclasses.replace(product, group_size=16), H200)
    assert small.config == integer.Config(16, 132, lane_copies=True)


def test_the_search_tries_copies_by_lanes_where_there_are_others():
    for architecture, ways in (("sm_90", {False, True}), ("sm_80", {False})):
        target = Target.parse(architecture)
        tried = [c for k, c in tuning.candidates(case(1, 512, 512, 1), target) if k == "integer"]
        assert {config.lane_copies for config in tried} == ways
        assert len(tried) == len(set(tried)) == len(ways) * len(tuning._INTEGER)
