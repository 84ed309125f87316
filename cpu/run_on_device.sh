#!/usr/bin/env bash
# Builds the benchmark for arm64, runs its self-tests and itself on a phone, brings the rows back.
#
#   cpu/run_on_device.sh [options] [flags of fdk_bench, see --help of build/fdk_bench]
#
#   -s SERIAL         the device, when adb sees several (or ANDROID_SERIAL)
#   --cores WHICH     big, little, all or a list such as 4-6,7: the cores to run on (big)
#   --repeats N       runs of every case (1)
#   --cool-down S     waits before a case until the device is as cool as at the start, at most S
#                     seconds (60; 0: never)
#   --test-share F    share of the self-tests' products that is run (0.2; 0: no self-tests)
#   --output FILE     where the rows go (results/android/DEVICE-DATE.jsonl)
#
# Every number of bits is a case and a run of fdk_bench of its own; its rows are kept as soon as it
# ends, so that a lost connection costs one case. What was copied to the device is removed at the
# end, on an interrupt too. The exit status is the benchmark's (the self-tests', if they fail).
# FDK_DEVICE_DIR is the folder on the device (/data/local/tmp); PYTHON (.venv/bin/python) prints the table.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
say() { printf '%s\n' "$*" >&2; }
die() { say "run_on_device.sh: $*"; exit 1; }
usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

serial=${ANDROID_SERIAL:-} cores=big repeats=1 cool_down=60 share=0.2 output='' bits=8,4,2,1 bench_flags=()
while [ $# -gt 0 ]; do
  case $1 in
    -s | --cores | --repeats | --cool-down | --test-share | --output | --bits)
      [ $# -ge 2 ] || die "$1 needs a value"
      case $1 in
        -s) serial=$2 ;;
        --cores) cores=$2 ;;
        --repeats) repeats=$2 ;;
        --cool-down) cool_down=$2 ;;
        --test-share) share=$2 ;;
        --output) output=$2 ;;
        --bits) bits=$2 ;;
      esac
      shift 2
      ;;
    --bits=*) bits=${1#*=}; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; bench_flags+=("$@"); break ;;
    *) bench_flags+=("$1"); shift ;;
  esac
done
[[ $repeats =~ ^[1-9][0-9]*$ ]] || die "--repeats is a positive number, not $repeats"
[[ $cool_down =~ ^[0-9]+$ ]] || die "--cool-down is a number of seconds, not $cool_down"
command -v adb >/dev/null || die "adb is missing (Debian: apt install adb)"
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || python=python3
helper() { "$python" "$root/android/device.py" "$@"; }

# The only usable device, or the one asked for.
choose_device() {
  local list count state
  list=$(adb devices | sed -n 's/^\([^[:space:]]\{1,\}\)[[:space:]]\{1,\}\([a-z].*\)$/\1 \2/p' | grep -v '^List of ')
  if [ -z "$serial" ]; then
    count=$(grep -c ' device$' <<<"$list")
    [ "$count" -le 1 ] || die "several devices: choose one with -s SERIAL"$'\n'"$list"
    [ "$count" -eq 1 ] || die "no device is ready (adb devices)${list:+: $list}"
    serial=$(sed -n 's/ device$//p' <<<"$list")
  fi
  state=$(awk -v serial="$serial" '$1 == serial { $1 = ""; print substr($0, 2) }' <<<"$list")
  [ -n "$state" ] || die "adb does not see the device $serial"
  [ "$state" = device ] || die "the device $serial is $state"
}

# adb reads standard input otherwise, and with it the rest of this script's caller.
on_device() { adb -s "$serial" "$@" </dev/null; }
quote() { printf "'%s'" "${1//\'/\'\\\'\'}"; }

choose_device
folder=$("$root/android/build.sh") || die "the build failed"
work=$(mktemp -d)
remote=${FDK_DEVICE_DIR:-/data/local/tmp}/fdk-$$-$RANDOM
started='' child=''

clean_up() {
  local status=$?
  trap - EXIT INT TERM HUP
  [ -z "$child" ] || kill "$child" 2>/dev/null
  if [ -n "$started" ]; then
    # The program is asked to stop before its folder goes.
    timeout 20 adb -s "$serial" shell "cd $(quote "$remote") 2>/dev/null && { [ ! -f pid ] || kill \$(cat pid) 2>/dev/null; cd /; rm -rf $(quote "$remote"); }" \
      </dev/null >/dev/null 2>&1 || say "could not remove $remote from the device"
  fi
  rm -rf "$work"
  exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

probe() { on_device shell sh "$(quote "$remote/probe.sh")" 2>/dev/null | tr -d '\r' >"$1"; }
connected() { [ "$(timeout 20 adb -s "$serial" get-state </dev/null 2>/dev/null)" = device ]; }

# Runs a program of the device's folder on the chosen cores. In the background and waited for, so
# that an interrupt is heard at once.
run_remote() {
  local command argument
  command="cd $(quote "$remote") && { echo \$\$ > pid; exec taskset $mask"
  for argument in "$@"; do command+=" $(quote "$argument")"; done
  adb -s "$serial" shell "$command; }" </dev/null &
  child=$!
  wait "$child"
  local status=$?
  child=''
  return "$status"
}

wait_until_cool() {
  local waited=0 now
  [ -n "$start_temperature" ] || return
  while [ "$waited" -lt "$cool_down" ]; do
    probe "$work/now" || return
    now=$(helper hottest "$work/now")
    [ -n "$now" ] || return
    awk -v now="$now" -v start="$start_temperature" 'BEGIN { exit !(now <= start + 2) }' && return
    [ "$waited" -gt 0 ] || say "cooling down: $now degrees, $start_temperature at the start"
    sleep 5 &
    wait $!
    waited=$((waited + 5))
  done
}

on_device shell "mkdir -p $(quote "$remote")" || die "cannot make $remote on the device"
started=1
on_device push "$folder/fdk_bench" "$folder/fdk_test" "$root/android/probe.sh" "$remote/" >/dev/null ||
  die "adb push failed"
on_device shell "chmod 755 $(quote "$remote")/fdk_bench $(quote "$remote")/fdk_test" || die "chmod failed"
probe "$work/start"
mask=$(helper cores "$work/start" "$cores") || exit 1
start_temperature=$(helper hottest "$work/start")
machine=$(sed -n 's/^machine //p' "$work/start")
emulated=false
case $machine in
  aarch64 | armv8*) ;;
  *)
    emulated=true
    say "the device is a $machine: the program is emulated there and its times mean nothing"
    [ -n "$output" ] || die "rows of an emulated run are no results: name a file with --output"
    ;;
esac
if [ -z "$output" ]; then
  mkdir -p "$root/results/android"
  output=$root/results/android/$(helper name "$work/start")-$(date -u +%Y%m%dT%H%M%SZ).jsonl
fi
: >>"$output" || die "cannot write $output"
say "device $serial, cores $cores (mask $mask), rows go to $output"

if [ "$share" != 0 ]; then
  say "self-tests"
  run_remote ./fdk_test --share "$share" >&2
  status=$?
  if [ "$status" -ne 0 ]; then say "the self-tests failed with exit status $status"; exit "$status"; fi
fi

digest=$(python3 "$root/fdk_jax/benchmark/source.py" --digest)
run=$(printf '{"pinned": "%s", "mask": "%s", "toolchain": "%s", "emulated": %s}' \
  "$cores" "$mask" "$(basename "$folder")" "$emulated")
status=0
IFS=, read -r -a cases <<<"$bits"
for ((repeat = 1; repeat <= repeats; repeat++)); do
  for width in "${cases[@]}"; do
    wait_until_cool
    say "case: $width bit, run $repeat of $repeats"
    probe "$work/before"
    run_remote ./fdk_bench --bits "$width" --suite kernels --digest "$digest" --output rows.jsonl \
      ${bench_flags[@]+"${bench_flags[@]}"} >&2
    status=$?
    # What was measured before the connection went is on this machine already.
    if ! connected; then
      say "the connection to $serial was lost: $(wc -l <"$output") rows that arrived are in $output"
      started=''
      [ "$status" -ne 0 ] || status=1
      break 2
    fi
    : >"$work/raw"
    on_device pull "$remote/rows.jsonl" "$work/raw" >/dev/null 2>&1
    on_device shell "rm -f $(quote "$remote/rows.jsonl")"
    probe "$work/after"
    helper complete "$work/raw" "$work/before" "$work/after" "$output" "$run"
    if [ "$status" -ne 0 ]; then say "fdk_bench failed with exit status $status"; break 2; fi
  done
done
helper table "$output" || say "no table: $output holds the rows"
exit "$status"
