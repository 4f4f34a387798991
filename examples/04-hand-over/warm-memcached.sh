#!/bin/sh
# An unmodified memcached on a tag, which stops on one host and goes on, warm, on the next.
#
#   warm-memcached.sh DAX SIZE_BYTES FOLDER [memcached's own options]
#
# Asked to stop by SIGUSR1, memcached leaves a few hundred bytes about its memory beside the memory
# file (`memory.meta`), and the next one that starts on the same memory takes up every record. Here
# the memory file is a link to the DAX device, in a folder that both hosts see, so the bytes stay
# where they are and the note goes along. Only the agent's SIGTERM has to become a SIGUSR1.
set -eu
dax=$1 size_bytes=$2 folder=$3
shift 3
mkdir -p "$folder"
ln -sfn "$dax" "$folder/memory"
# memcached takes nothing up within the second in which the last one stopped.
stopped=$(sed -n 's/^Kstop_time //p' "$folder/memory.meta" 2>/dev/null || true)
while [ "$(date +%s)" -le "${stopped:-0}" ]; do
    sleep 0.1
done
[ "$(id -u)" != 0 ] || set -- -u root "$@"
# A session of its own: the agent signals the whole group, and SIGTERM would forget the records.
setsid memcached -e "$folder/memory" -m $((size_bytes >> 20)) "$@" &
cache=$!
trap 'kill -USR1 $cache' TERM
while kill -0 $cache 2>/dev/null; do
    wait $cache || true
done
