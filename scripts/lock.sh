#!/bin/sh
# Writes requirements.lock anew: every package of every extra that `make` uses, with the hashes of
# all of its files, so that one lock serves Python 3.11 to 3.13. It names no package index; where
# packages come from is the business of the machine's own pip configuration.
#
# It is made with Python 3.11, the oldest that is supported, because back-ports that only 3.11
# needs are harmless later.
set -eu
cd "$(dirname "$0")/.."

python=${PYTHON:-python3.11}
tools=.cache/lock-venv
[ -x "$tools/bin/pip-compile" ] || {
    "$python" -m venv "$tools"
    "$tools/bin/python" -m pip install --quiet --disable-pip-version-check pip-tools
}
CUSTOM_COMPILE_COMMAND="make lock" "$tools/bin/pip-compile" --quiet --upgrade \
    --generate-hashes --allow-unsafe --strip-extras --no-header \
    --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options \
    --extra numpy --extra arrow --extra duckdb --extra demo --extra dev \
    --output-file .cache/requirements.new pyproject.toml
{
    echo "# Made by \`make lock\` from pyproject.toml; every file is pinned by hash. Do not edit."
    cat .cache/requirements.new
} > requirements.lock
rm .cache/requirements.new
