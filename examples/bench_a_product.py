"""Times one 4-bit product on this machine, checked against float64, beside the dense one."""

from fdk_jax.benchmark import cases, kernels, runner, table, timing

todo = cases.make_cases(backends=["xla"], m=[1], k=[256], n=["k"], bits=[16, 4])
session = timing.Session(repetitions=3, copies=2, max_seconds=1.0)
print(table.render(list(runner.measure(kernels, todo, session))))
