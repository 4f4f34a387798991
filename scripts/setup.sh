#!/bin/sh
# Makes this checkout ready to run: the Debian packages that are missing, a virtual environment in
# .venv with every package of requirements.lock, and tagmem itself in it.
#
# It may be called as often as one likes: a stamp in .venv says what was set up, and when nothing
# changed since, this ends in a few milliseconds. As root on Debian it installs what is missing
# with apt-get; as anybody else it says what to install, and fails. It starts no service: a
# freshly installed memcached is left stopped and disabled.
#
#   PYTHON=/path/to/python   use this interpreter (3.11 or later) instead of looking for one
set -eu
cd "$(dirname "$0")/.."
here=$(pwd -P)
venv=.venv
stamp=$venv/tagmem-setup
place=$venv/tagmem-place

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# An interpreter is good when it is new enough and can make environments; a name on PATH alone
# proves neither.
usable_python() {
    "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13}; do
        if usable_python "$candidate"; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

missing_packages() {
    while read -r package probe; do
        case $package in ''|'#'*) continue ;; esac
        eval "$probe" >/dev/null 2>&1 || printf '%s ' "$package"
    done < scripts/debian-packages.txt
}

# What the environment was filled from.
wanted() {
    sha256sum requirements.lock pyproject.toml hatch_build.py scripts/setup.sh \
        scripts/debian-packages.txt $(find src -name '*.c' | sort)
}

# An environment does not survive being moved, so it says where it was made.
in_place() {
    [ -x "$venv/bin/python" ] && [ -f "$place" ] && [ "$(cat "$place")" = "$here" ]
}

up_to_date() {
    in_place && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted)" ] \
        && [ -x "$venv/bin/tagmem" ] && [ -z "$(missing_packages)" ]
}

# Debian starts a daemon as soon as its package is configured. While ours are, a policy file says
# no; what was there before comes back whatever happens.
policy=/usr/sbin/policy-rc.d
forbid_services() {
    # A saved one that is still there is from a run that was killed: it is the original, and the
    # other is ours.
    if [ ! -e "$policy.tagmem-saved" ] && [ -e "$policy" ]; then
        mv "$policy" "$policy.tagmem-saved"
    fi
    trap restore_services EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
}
restore_services() {
    rm -f "$policy"
    if [ -e "$policy.tagmem-saved" ]; then mv "$policy.tagmem-saved" "$policy"; fi
    trap - EXIT INT TERM
}

# Says what to install, and ends, where we cannot do it ourselves.
refuse_to_install() {
    command -v apt-get >/dev/null 2>&1 \
        || die "these are missing, and there is no apt-get to install them with: ${1% }"
    if [ "$(id -u)" -ne 0 ]; then
        say "these Debian packages are missing; install them, then run this again:"
        say "    sudo apt install ${1% }"
        exit 1
    fi
}

install_packages() {
    say "installing Debian packages: ${1% }"
    export DEBIAN_FRONTEND=noninteractive
    forbid_services
    apt-get update -qq >&2 || say "apt-get update failed; going on with the lists that are here"
    # shellcheck disable=SC2086  # one word per package is meant
    apt-get -o DPkg::Lock::Timeout=120 install -y -qq --no-install-recommends $1 >&2
    restore_services
    case " $1" in
        *" memcached "*)
            if command -v systemctl >/dev/null 2>&1; then
                systemctl --quiet disable memcached.service >/dev/null 2>&1 \
                    || say "memcached.service stays enabled at boot; tagmem does not need it"
            fi ;;
    esac
}

make_environment() {
    python=$(find_python) || die "no Python 3.11 or later that can make environments was found"
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if ! in_place; then
        say "making $venv with $python ($version)"
        rm -rf "$venv"
        "$python" -m venv "$venv"
        printf '%s\n' "$here" > "$place"
    fi
    rm -f "$stamp"
    say "installing the locked packages"
    pip="$venv/bin/python -m pip --disable-pip-version-check --no-input"
    $pip install --quiet --require-hashes --no-deps -r requirements.lock
    $pip install --quiet --no-deps --no-build-isolation --editable .
    wanted > "$stamp"
}

up_to_date && exit 0

missing=$(missing_packages)
[ -z "$missing" ] || refuse_to_install "$missing"

# Two runs at once would step on each other's environment; the second waits, and then finds
# nothing to do.
if [ -z "${TAGMEM_SETUP_LOCKED:-}" ] && command -v flock >/dev/null 2>&1; then
    mkdir -p .cache
    TAGMEM_SETUP_LOCKED=1 exec flock .cache/setup.lock "$here/scripts/setup.sh"
fi

if [ -n "$missing" ]; then
    install_packages "$missing"
    missing=$(missing_packages)
    [ -z "$missing" ] || die "still missing after the installation: $missing"
fi
make_environment
say "ready"
