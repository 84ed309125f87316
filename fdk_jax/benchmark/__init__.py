"""Measurements of kernels and models; `bench.py` is the command line.

    flags -> cases -> suite.measure -> row -> JSONL -> table or plot

A suite is a module with

    make_cases(...) -> list of cases; a case has a unique `name` and `fields()`, the row's keys that say
        what is measured,
    group(case) -> cases next to each other with equal groups are sampled in turn, so that a machine whose
        speed drifts does not distort their ratios, and
    measure(case, session), a generator that yields a function to sample and returns the row's keys that
        say what came out (`timing.Measurement`). `NotImplementedError` makes the row "skipped", any other
        exception "failed"; a measurement that finds itself wrong yields nothing and returns
        {"status": "failed", "reason": ...} with what it knows.

`kernels` and `models` are suites. `records` fixes the keys of a row.
"""
