#!/usr/bin/env bash
# From a fresh checkout to per-cell results scrolling by: makes .venv here, installs the agent into it, starts the demo.
# Run it again at any time. Arguments go to `hematovision demo`, for example: deploy/quickstart.sh --source PATH
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(dirname "$here")
# shellcheck source=deploy/python.sh
. "$here/python.sh"

venv=$top/.venv
stamp=$venv/.quickstart-installed

# What was installed is newer than everything it is made of, so nothing need be built again (nor the network asked).
is_installed() {
    [ -x "$venv/bin/hematovision" ] && [ -f "$stamp" ] || return 1
    [ -z "$(find "$top/pyproject.toml" "$top/config.yaml" "$top/agent" "$top/models" \
        -name __pycache__ -prune -o -type f -newer "$stamp" -print -quit)" ]
}

python=$(find_python)
make_venv "$python" "$venv"
if ! is_installed; then
    say "Installing HematoVision and what it needs (the first time takes a minute or two)"
    "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check "${top}[demo,web]" ||
        fail "pip could not install the agent; its message stands above. Without network, try again later."
    touch "$stamp"
fi
say "Starting: hematovision demo $* (Ctrl-C ends it)"
exec "$venv/bin/hematovision" demo "$@"
