"""Measurements of kernels and models; `bench.py` is the command line.

    flags -> cases -> suite.measure(case, session) -> row -> JSONL -> table or plot

A suite is a module with

    make_cases(...) -> list of cases; a case has a unique `name` and `fields()`, the row's keys that say
        what is measured, and
    measure(case, session) -> the row's keys that say what came out. `NotImplementedError` makes the row
        "skipped", any other exception "failed"; a measurement that finds itself wrong returns
        {"status": "failed", "reason": ...} with what it knows.

`kernels` and `models` are suites. `records` fixes the keys of a row.
"""
