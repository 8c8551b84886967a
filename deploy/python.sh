# shellcheck shell=bash
# Sourced by quickstart.sh, install.sh and tests/run.sh: find a Python that fits and make a virtual environment.

# The agent's own range; see requires-python in pyproject.toml.
PYTHON_RANGE="3.10 to 3.13"

say() { printf '%s\n' "$*"; }
fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

fits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }

# Prints the name of a Python that fits: $PYTHON if set, else python3, else a numbered one.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if command -v "$candidate" >/dev/null && fits "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python from $PYTHON_RANGE found${PYTHON:+ under the name $PYTHON}." \
        "Debian 12, Ubuntu 22.04, Raspberry Pi OS 12 and newer have one: sudo apt-get install python3 python3-venv"
}

# need_packages REASON PACKAGE...: installs Debian packages as root, otherwise says how and ends.
need_packages() {
    local reason=$1
    shift
    command -v apt-get >/dev/null || fail "$reason Install the counterpart of these Debian packages: $*"
    [ "$(id -u)" -eq 0 ] || fail "$reason Install it with: sudo apt-get install $*"
    say "$reason Installing: $*"
    apt-get update -qq || say "apt-get update failed; trying with the package lists that are there."
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null ||
        fail "apt-get install $* failed; run it by hand to see why."
}

# make_venv PYTHON FOLDER: makes the environment, or leaves one alone that works. In one that was moved no program starts, pip
# neither.
make_venv() {
    local python=$1 folder=$2 version
    if [ -x "$folder/bin/python" ] && fits "$folder/bin/python" && "$folder/bin/pip" --version >/dev/null 2>&1; then
        return
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        need_packages "Python $version here cannot make virtual environments." "python$version-venv"
    fi
    say "Making the virtual environment $folder"
    "$python" -m venv --clear "$folder" || fail "could not make $folder with $python."
}
