"""What a byte of memory buys at each width: language models of several sizes, trained at 16, 4, 2 and 1 bits.

python -m fdk_jax.quality.scaling --text corpus.xz --out results/scaling.jsonl
python -m fdk_jax.quality.scaling --report                table, fit and figure of the rows

All models see the same tokens. A run that was stopped goes on from its last checkpoint, with the same
losses; runs whose rows are in --out are not repeated. Several processes, each with its own --out, may share the
grid.
"""

import sys
import time
from pathlib import Path

from absl import app, flags, logging

from fdk_jax import compilation_cache, usage
from fdk_jax.quality import scaling_report, scaling_runs
from fdk_jax.quality.scaling_runs import SIZES, Plan

_PROGRAM = "fdk_jax.quality.scaling"
_TEXT = flags.DEFINE_string("text", None, "a text, see fdk_jax.quality.corpus")
_OUT = flags.DEFINE_multi_string("out", ["results/scaling.jsonl"], "JSONL file of the rows")
_FIGURE = flags.DEFINE_string("figure", "results/scaling.svg", "figure of --report")
_REPORT = flags.DEFINE_bool("report", False, "table, fit and figure of all --out; train nothing")
_SIZES = flags.DEFINE_list("sizes", list(SIZES), "in this order")
_BITS = flags.DEFINE_list("bits", ["16", "4", "2", "1"], "in this order, for each size")
_TOKENS = flags.DEFINE_integer("tokens", 40_000_000, "of training", lower_bound=1)
_SECONDS = flags.DEFINE_float(
    "seconds", None, "stops by then, to be gone on with by the same command"
)
_FOLDER = flags.DEFINE_string("folder", scaling_runs.FOLDER, "of checkpoints and of the tokens")
_DRY = flags.DEFINE_bool("dry_run", False, "a few steps of everything, and an estimate; no rows")
_SMALL = flags.DEFINE_bool("small", False, "with short sequences and small batches, for a CPU")
_SEED = flags.DEFINE_integer("seed", 0, "of weights and order")
_REFRESH = flags.DEFINE_integer(
    "refresh_every", 25, "steps between refreshed codebooks; 0 for never", lower_bound=0
)
_RATE = flags.DEFINE_float("rate", 0.05, "the peak learning rate is this / sqrt(hidden size)")
_START = flags.DEFINE_integer("start_step", 0, "steps before it see float weights", lower_bound=0)
_EMBEDDING = flags.DEFINE_enum(
    "embedding_bits", "4", ["16", "8", "4"], "of the embedding of quantised models, at least"
)
_SAME = flags.DEFINE_bool("reproducible", False, "sums in one order on a GPU, too")


def main(argv: list[str]) -> None:
    """Trains what is missing, or reports."""
    if len(argv) > 1:
        usage.fail(_PROGRAM, f"unexpected arguments: {argv[1:]}")
    if _REPORT.value:
        print(scaling_report.report([Path(p) for p in _OUT.value], Path(_FIGURE.value)))
        return
    if not _TEXT.value or not Path(_TEXT.value).exists():
        usage.fail(_PROGRAM, f"a text that exists is needed, got --text={_TEXT.value}")
    unknown = set(_SIZES.value) - set(SIZES) | set(_BITS.value) - {"16", "8", "4", "2", "1"}
    if unknown:
        usage.fail(
            _PROGRAM, f"{sorted(unknown)} are no sizes ({', '.join(SIZES)}) or bits (16 to 1)"
        )
    start = time.monotonic()

    def note(text: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {text}", file=sys.stderr, flush=True)

    logging.set_verbosity(logging.WARNING)  # of the writer of checkpoints
    compilation_cache.keep()
    plan = Plan(
        tokens=_TOKENS.value,
        seed=_SEED.value,
        refresh_every=_REFRESH.value,
        rate=_RATE.value,
        start_step=_START.value,
        embedding_bits=int(_EMBEDDING.value),
        reproducible=_SAME.value,
    )
    if _SMALL.value:
        plan = plan.small()
    fine = scaling_runs.run(
        plan,
        Path(_TEXT.value),
        Path(_OUT.value[0]),
        Path(_FOLDER.value),
        [(size, int(bits)) for size in _SIZES.value for bits in _BITS.value],
        note,
        deadline=None if _SECONDS.value is None else start + _SECONDS.value,
        dry=_DRY.value,
    )
    if not fine:
        sys.exit(1)


if __name__ == "__main__":
    app.run(main, flags_parser=usage.flags_parser(_PROGRAM))
