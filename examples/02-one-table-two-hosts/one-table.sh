#!/bin/bash
# One table, two hosts: w1 writes an Arrow table into a tag that w1 and w2 share, w2 queries it with
# DuckDB where it lies. There is no network between them, and no copy.
#
# It starts a system of its own (`tagmem up`) in a folder that it removes again. Needs a Python with
# tagmem[arrow,duckdb]; PYTHON says which.
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-python3}
export TAGMEM_STATE_DIR
TAGMEM_STATE_DIR=$(mktemp -d)
TAG=$(cat /proc/sys/kernel/random/uuid)
trap 'tagmem down --purge >&2' EXIT

say() { printf '\n# %s\n' "$*"; }

tagmem up >&2

say "64 MiB for both hosts, whose caches do not know each other"
tagmem capacity create --size 64MiB --share software-coherent --host w1,w2 --tag "$TAG" -o table

say "w1 writes"
tagmem run "$TAG" --host w1 -- "$PYTHON" "$PWD/write_orders.py"

say "w2 finds it and queries it"
tagmem run "$TAG" --host w2 -- "$PYTHON" "$PWD/query_orders.py"
