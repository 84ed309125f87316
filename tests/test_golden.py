"""The kernels' PTX is what was recorded: whoever means to change it records it anew, see `golden`."""

import json

import golden


def test_hashes_of_all_kernels():
    recorded = json.loads(golden.RECORDED.read_text(encoding="utf-8"))
    sources = dict(golden.sources())
    assert sorted(sources) == sorted(recorded), "other kernels: see tests/golden.py"
    changed = [n for n, source in sources.items() if not golden.is_recorded(source, recorded[n])]
    assert not changed, f"{len(changed)} kernels changed, see tests/golden.py: {changed[:5]}"


def test_names_and_comments_mean_nothing():
    source = "{\n.reg .b32 b32_<2>;\nadd.u32 b32_0, b32_1, %tid.x;\nfdk_end:\n}"
    other = "{\n.reg .b32 row, tile; // of what\nadd.u32 row, tile, %tid.x; // why\nover:\n}"
    assert golden.digest(source) == golden.digest(other)
    for line in ("add.u32 tile, tile, %tid.x;", "add.u32 row, tile, 1;", "sub.u32 row, tile, 1;"):
        assert golden.digest(source) != golden.digest(
            other.replace("add.u32 row, tile, %tid.x;", line)
        )
