"""cpu/run_on_device.sh against a real adbd on the loopback address, arm64 programs by emulation."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNNER = ROOT / "cpu" / "run_on_device.sh"
CACHE = Path(
    os.environ.get("FDK_TOOLCHAIN_DIR")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fdk_jax"
)
SMALL = "--k 256 --n 64 --m 1 --rounds 2 --round_ms 1 --rotate_mib 1 --arithmetic int8"
PROBE = """machine aarch64
model Maker  Phone 9
features fp asimd asimddp i8mm bf16
core 0 250 1800000 600000 schedutil
core 1 250 1800000 600000 schedutil
core 7 1024 3000000 900000 schedutil
core 3 - - - -
thermal cpu-0-0 41000
thermal battery 31500
thermal_status 0
nonsense
"""

_spec = importlib.util.spec_from_file_location("android_device", ROOT / "android" / "device.py")
assert _spec is not None and _spec.loader is not None
device = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(device)


def test_probe_is_read():
    probe = device.parse_probe(PROBE)
    assert probe["model"] == "Maker Phone 9"
    assert probe["cpu_features"] == ["fp", "asimd", "asimddp", "i8mm", "bf16"]
    assert [core["core"] for core in probe["cores"]] == [0, 1, 3, 7]
    assert probe["cores"][2]["capacity"] is None
    assert probe["thermal_c"] == {"cpu-0-0": 41.0, "battery": 31.5}
    assert device.hottest(probe) == 41.0
    assert device.hottest(device.parse_probe("machine x")) is None


@pytest.mark.parametrize(
    ("wanted", "cores"),
    [("big", [7]), ("little", [0, 1]), ("all", [0, 1, 7]), ("0-1", [0, 1]), ("7,0", [0, 7])],
)
def test_cores_are_chosen(wanted, cores):
    probe = device.parse_probe("\n".join(s for s in PROBE.splitlines() if " 3 " not in s))
    assert device.choose_cores(probe, wanted) == cores


@pytest.mark.parametrize("wanted", ["2", "0-2", "huge", "", "1,,7", "-1"])
def test_wrong_cores_are_refused(wanted):
    with pytest.raises(ValueError, match="core"):
        device.choose_cores(device.parse_probe(PROBE), wanted)


def test_estimate_counts_every_weight():
    """A phone that takes 1 us for a million weights, at two widths."""
    rows = [
        {"m": 1, "bits": bits, "k": 1000, "n": 1000, "median_us": 1.0, "threads": 1, "name": "x"}
        for bits in (8, 4)
    ]
    found = {(e["model"], e["bits"]): e["tokens_per_s"] for e in device.estimate(rows)}
    # 11.52 billion parameters, of which the embedding's 128256 * 4096 are not multiplied.
    weights = 11.52e9 - 128256 * 4096
    assert found["custom-llama-12B", 4] == pytest.approx(1e12 / weights, rel=0.01)
    assert all(e["estimated"] for e in device.estimate(rows))


# ---- With adb ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def adbd(toolchain) -> Path:
    """Everything that the tests below need, or a skip that says what is missing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs root on Linux: a network namespace and a handler for arm64 programs")
    toolchain("android-test")
    private = subprocess.run(["unshare", "-n", "-m", "true"], capture_output=True, text=True)
    if private.returncode:
        pytest.skip(f"no network namespace: {private.stderr.strip()}")
    return CACHE / "adbd" / "adbd"


@pytest.fixture
def session(adbd, tmp_path):
    """Runs a shell script in a network of its own with an adbd for each port; returns the result."""

    def run(
        script: str, *, cpu: str = "max", ports=(6555,), **options
    ) -> subprocess.CompletedProcess:
        lines = [
            "ip link set lo up",
            "mount -t binfmt_misc none /proc/sys/fs/binfmt_misc 2>/dev/null",
            "grep -qs enabled /proc/sys/fs/binfmt_misc/qemu-aarch64 ||"
            " sed -n 's/^:qemu-aarch64/&/p' /usr/lib/binfmt.d/qemu-aarch64.conf"
            " > /proc/sys/fs/binfmt_misc/register",
            # Ports beyond those where the client looks for emulators by itself.
            "export ANDROID_ADB_SERVER_PORT=5137",
            f"trap 'adb kill-server 2>/dev/null; kill $(cat {tmp_path}/adbd.*) 2>/dev/null' EXIT",
        ]
        for port in ports:
            lines += [
                f"(export ADBD_PORT={port} QEMU_CPU={cpu}; unset ANDROID_SERIAL;"
                f" exec {adbd}) >{tmp_path}/adbd-log.{port} 2>&1 &",
                f"echo $! > {tmp_path}/adbd.{port}",
                f"for i in 1 2 3 4 5 6 7 8 9; do adb connect 127.0.0.1:{port} 2>&1"
                " | grep -q 'connected to' && break; sleep 0.3; done",
            ]
        environment = os.environ | {
            "FDK_DEVICE_DIR": str(tmp_path / "on the device"),
            "FDK_NO_NDK": "1",
            "HOME": str(tmp_path),
            "FDK_TOOLCHAIN_DIR": str(CACHE),
            "PYTHON": sys.executable,
        }
        return subprocess.run(
            ["unshare", "-n", "-m", "bash", "-c", "\n".join([*lines, script])],
            capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path, **options,
        )  # fmt: skip

    (tmp_path / "on the device").mkdir()
    return run


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _left(tmp_path: Path) -> list[str]:
    return [p.name for p in (tmp_path / "on the device").iterdir()]


@pytest.mark.parametrize(
    ("cpu", "isa"), [("cortex-a53", "neon"), ("cortex-a76", "dotprod"), ("max,sve=off", "bf16")]
)
def test_measures_old_and_new_cores(session, tmp_path, cpu, isa):
    """Self-tests and benchmark run on a core, with the instructions it has and no others."""
    output = tmp_path / "rows here.jsonl"
    script = f"'{RUNNER}' -s 127.0.0.1:6555 --cores all --cool-down 0 --test-share 0.002"
    script += f" --bits 4,1 --output '{output}' {SMALL}"
    found = session(script, cpu=cpu)
    assert found.returncode == 0, found.stderr[-3000:]
    rows = _rows(output)
    assert {row["bits"] for row in rows} >= {4, 1}
    assert {row["isa"] for row in rows} == {isa}
    assert all(row["emulated"] for row in rows)
    assert all(row["state"]["before"]["cores"] and row["state"]["after"]["cores"] for row in rows)
    assert all(row["toolchain"] == "android-static" and row["pinned"] == "all" for row in rows)
    assert "ESTIMATED" in found.stdout
    assert not _left(tmp_path)


def test_reports_the_benchmark_exit_status(session, tmp_path):
    command = f"'{RUNNER}' --cool-down 0 --test-share 0 --output rows"
    script = f"{command} --dtype float99; echo status $?; {command} --cores 99; echo status $?"
    found = session(script)
    assert "status 0" not in found.stdout, found.stdout
    assert "--dtype is" in found.stderr
    assert "the device has no core [99]" in found.stderr
    assert not _left(tmp_path)


def test_device_must_be_unambiguous(session):
    script = f"'{RUNNER}'; echo status $?; '{RUNNER}' -s elsewhere; echo status $?; adb disconnect"
    script += f" >/dev/null; '{RUNNER}'; echo status $?"
    found = session(script, ports=(6555, 6557))
    assert found.stdout.split().count("1") == 3, found.stdout
    assert "several devices: choose one with -s SERIAL" in found.stderr
    assert "does not see the device elsewhere" in found.stderr
    assert "no device is ready" in found.stderr


def test_emulated_times_are_not_published(session):
    found = session(f"'{RUNNER}' --test-share 0; echo status $?")
    assert "status 1" in found.stdout
    assert "rows of an emulated run are no results" in found.stderr


def test_interrupt_cleans_the_device(session, tmp_path):
    script = f"'{RUNNER}' --cool-down 0 --test-share 0 --output rows --rounds 100000 & runner=$!"
    script += "\nfor i in $(seq 100); do ls 'on the device'/*/pid >/dev/null 2>&1 && break;"
    script += " sleep 0.2; done; sleep 1; ls 'on the device'; kill -TERM $runner; wait $runner"
    script += "\necho status $?; ps -e -o args | grep -c '[.]/fdk_bench'"
    found = session(script)
    assert "fdk-" in found.stdout
    assert "status 143" in found.stdout, found.stdout + found.stderr
    assert not _left(tmp_path)


def test_rows_survive_a_lost_connection(session, tmp_path):
    output = tmp_path / "rows.jsonl"
    script = f"'{RUNNER}' --cool-down 0 --test-share 0 --bits 4,2 --output '{output}'"
    script += f" {SMALL} --repeats 1000 & runner=$!"
    script += f"\nfor i in $(seq 200); do [ -s '{output}' ] && break; sleep 0.2; done"
    script += f"\nkill $(cat {tmp_path}/adbd.6555); wait $runner; echo status $?"
    found = session(script)
    assert "was lost" in found.stderr, found.stderr[-2000:]
    assert "status 0" not in found.stdout
    assert len(_rows(output)) >= 4
