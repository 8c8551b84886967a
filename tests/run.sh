#!/usr/bin/env bash
# All checks of the project: makes .venv, installs what the tests need, then style, types, import directions and tests.
# Arguments go to pytest, for example: tests/run.sh tests/test_health.py -k watchdog
# Its last line is pytest's closing line; its exit code is 0 only when every check passed.
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=deploy/python.sh
. "$top/deploy/python.sh"
cd "$top"

venv=$top/.venv
bin=$venv/bin
stamp=$venv/.tests-installed

# Debian keeps servers in /usr/sbin, which is not in every user's PATH.
export PATH="$PATH:/usr/sbin:/sbin"
if ! command -v mosquitto >/dev/null; then
    need_packages "The tests talk to a real MQTT broker, mosquitto, which is missing." mosquitto
fi
# The tests of the central side run on PostgreSQL too, where it is there; otherwise they skip and say so.
if [ "$(id -u)" -eq 0 ] && ! compgen -G "/usr/lib/postgresql/*/bin/postgres" >/dev/null && ! command -v initdb >/dev/null; then
    (need_packages "Some tests talk to a real PostgreSQL, which is missing." postgresql) || say "Going on without PostgreSQL."
fi
# A report as PDF needs Pango, which is no Python package; without it those tests skip and say so.
if [ "$(id -u)" -eq 0 ] && ! ldconfig -p | grep -q libpangoft2-1.0; then
    (need_packages "Some tests make PDF reports with Pango, which is missing." libpango-1.0-0 libpangoft2-1.0-0 \
        libharfbuzz-subset0 fonts-dejavu-core) || say "Going on without Pango."
fi

python=$(find_python)
make_venv "$python" "$venv"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    say "Installing the agent and what its tests need"
    "$bin/python" -m pip install --quiet --quiet --disable-pip-version-check -e ".[dev,demo,report,central,export,web]" ||
        fail "pip could not install what the tests need; its message stands above."
    touch "$stamp"
    # An ordinary installation, as quickstart.sh makes it, is now replaced by this checkout itself.
    rm -f "$venv/.quickstart-installed"
fi

failed=0
check() {
    say "== $*"
    "$bin/$1" "${@:2}" || { failed=1 && say "FAILED: $*"; }
}
check ruff check .
check ruff format --check .
check mypy
check lint-imports
# The whole suite takes a process for each of two cores; a file's tests stay together, since they share servers.
[ "$#" -gt 0 ] || set -- --numprocesses 2 --dist loadfile
say "== pytest $*"
"$bin/python" -m pytest "$@" || failed=1
exit "$failed"
