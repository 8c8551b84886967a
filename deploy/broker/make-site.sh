#!/usr/bin/env bash
# Certificates, rights and mosquitto configuration of one site, in one folder. Run it again to add, renew or remove.
#
#   deploy/broker/make-site.sh --site haematology --host broker.lan --device microscope-1 --receiver collector \
#       --operator anna FOLDER
#   deploy/broker/make-site.sh --device microscope-2 FOLDER
#
# What the folder holds and where it goes: docs/security.md. All options: --help
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=deploy/python.sh
. "$here/../python.sh"

# A Python that has the library which makes certificates: one that is there, else our own environment with it.
has_library() { "$1" -c 'from cryptography.x509 import Certificate as c; c.not_valid_after_utc' 2>/dev/null; }

venv=$here/../../.venv
if [ -x "$venv/bin/python" ] && has_library "$venv/bin/python"; then
    python=$venv/bin/python
else
    python=$(find_python)
    if ! has_library "$python"; then
        make_venv "$python" "$venv" >&2
        python=$venv/bin/python
        say "Installing cryptography, the library that makes certificates" >&2
        "$python" -m pip install --quiet --quiet --disable-pip-version-check 'cryptography>=42' ||
            fail "pip could not install it; its message stands above."
    fi
fi
exec "$python" "$here/make_site.py" "$@"
