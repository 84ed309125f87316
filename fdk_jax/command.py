"""The command `fdk-jax`: one name for the commands of the package."""

import os
import subprocess
import sys

MODULES = {
    "generate": "fdk_jax.generate",
    "evaluate": "fdk_jax.evaluate_command",
    "bench": "fdk_jax.benchmark",
    "doctor": "fdk_jax.doctor",
    "quality": "fdk_jax.quality",
    "tune": "pallas_kernels.tuning",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs `python -m` of the command's module with the other arguments; returns its exit status.

    On POSIX systems this process becomes that one, and there is no return.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    usage = (
        f"usage: fdk-jax {{{','.join(MODULES)}}} [arguments]; `fdk-jax COMMAND --help` says which"
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0 if arguments else 2
    module = MODULES.get(arguments[0])
    if module is None:
        print(f"fdk-jax: error: no command {arguments[0]!r}; {usage}", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", module, *arguments[1:]]
    if os.name == "posix":
        os.execv(sys.executable, command)  # signals are the command's then: Ctrl-C in a talk, say
    return subprocess.call(command)


if __name__ == "__main__":
    sys.exit(main())
