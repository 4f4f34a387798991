#!/bin/bash
# The seven steps by hand: a tag is offered, accepted, used by an unmodified memcached, given back,
# wiped, and the same bytes go to another host, which finds nothing in them.
#
# It starts a system of its own (`tagmem up`) in a folder that it removes again. Needs bash,
# memcached and tagmem; nothing else.
set -euo pipefail

export TAGMEM_STATE_DIR
TAGMEM_STATE_DIR=$(mktemp -d)
PORT=${PORT:-11999}
TAG=$(cat /proc/sys/kernel/random/uuid)
NEXT_TAG=$(cat /proc/sys/kernel/random/uuid)
trap 'tagmem down --purge >&2' EXIT

say() { printf '\n# %s\n' "$*"; }

say "a system on this machine: one appliance, one orchestrator, two hosts"
tagmem up

say "1. where would 64 MiB for host w1 go?"
tagmem explain 64MiB --host w1 -o table

say "2, 3. offer them under a tag; w1 checks the offer and accepts"
tagmem capacity create --size 64MiB --host w1 --tag "$TAG" --region 0 -o table
tagmem appliance show a0 -o table

say "4. memcached on the tag, as Debian ships it ({dax} is filled in on the host)"
user=(); [ "$(id -u)" -ne 0 ] || user=(-u root)
tagmem run --detach "$TAG" -o table -- \
    memcached "${user[@]}" -e '{dax}' -m 64 -l 127.0.0.1 -p "$PORT" -U 0

say "5. it keeps what it is given in the tag's bytes"
for _ in $(seq 100); do
    exec 3<>"/dev/tcp/127.0.0.1/$PORT" && break || sleep 0.1
done 2>/dev/null
printf 'set motto 0 0 21\r\nmemory, lent by name.\r\nget motto\r\nquit\r\n' >&3
tr -d '\r' <&3
exec 3<&-
DAX=$(tagmem capacity show "$TAG" -o json | grep -o '/[^"]*/dax[0-9.]*/dax[0-9.]*' | head -1)
grep -c 'memory, lent by name.' "$DAX"

say "6, 7. stop it, prove that nobody holds the tag, give it back, wipe it"
tagmem capacity release "$TAG" -o table

say "the same bytes of the pool for w2, which compares them with zeros"
tagmem capacity create --size 64MiB --host w2 --tag "$NEXT_TAG" --region 0 -o table
tagmem run "$NEXT_TAG" -- cmp -n 67108864 '{dax}' /dev/zero
echo "all zero"
tagmem capacity release "$NEXT_TAG" -o table

say "what happened"
tagmem events --subject "$TAG" -o table
