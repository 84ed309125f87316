# Runs on the device (any POSIX shell): prints what the rows say of it, "key value" a line.
get() { getprop "$1" 2>/dev/null; }
read_file() { cat "$1" 2>/dev/null; }
echo "machine $(uname -m)"
echo "kernel $(uname -r)"
echo "model $(get ro.product.manufacturer) $(get ro.product.model)"
echo "soc $(get ro.soc.manufacturer) $(get ro.soc.model) $(get ro.hardware)"
echo "android $(get ro.build.version.release)"
echo "features $(sed -n 's/^Features[^:]*: *//p' /proc/cpuinfo 2>/dev/null | head -n 1)"
echo "uptime $(read_file /proc/uptime)"
for cpu in /sys/devices/system/cpu/cpu[0-9]*; do
  [ -d "$cpu" ] || continue
  [ "$(read_file "$cpu/online")" = 0 ] && continue
  f=$cpu/cpufreq
  echo "core ${cpu##*/cpu} $(read_file "$cpu/cpu_capacity" || echo -) $(read_file "$f/cpuinfo_max_freq" || echo -) $(read_file "$f/scaling_cur_freq" || echo -) $(read_file "$f/scaling_governor" || echo -)"
done
for zone in /sys/class/thermal/thermal_zone*; do
  t=$(read_file "$zone/temp") && [ -n "$t" ] && echo "thermal $(read_file "$zone/type" | tr ' ' '_') $t"
done
status=$(dumpsys thermalservice 2>/dev/null | sed -n 's/.*Thermal Status: *//p' | head -n 1)
[ -n "$status" ] && echo "thermal_status $status"
exit 0
