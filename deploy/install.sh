#!/usr/bin/env bash
# Installs HematoVision as a service on Raspberry Pi OS, Debian or Ubuntu (arm64, x86-64). Run it again to update.
#
#   sudo deploy/install.sh [--device NAME] [--site NAME] [--no-start] [--from WHEEL]
#   sudo deploy/install.sh --uninstall [--purge]
#
#   --device NAME  the microscope's name in MQTT topics (a-z, 0-9, hyphen); default: this computer's name.
#   --site NAME    the laboratory's name in MQTT topics; default: site.
#                  Both are only written when there is no configuration yet.
#   --from WHEEL   install this file instead of the checkout that the script lies in.
#   --no-start     enable the service for the next boot, but do not start it now.
#   --uninstall    remove program and service; configuration and stored results stay. The program stays too while the
#                  collector (docs/central.md) is installed on this computer: both use it.
#   --purge        with --uninstall: remove configuration, stored results and the user too.
#
# Program: /opt/hematovision    configuration: /etc/hematovision    results waiting for the broker: /var/lib/hematovision
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(dirname "$here")
# shellcheck source=deploy/python.sh
. "$here/python.sh"

program=/opt/hematovision
venv=$program/venv
settings=/etc/hematovision
results=/var/lib/hematovision
units=/etc/systemd/system
unit=$units/hematovision.service
collector=hematovision-collector.service
command=/usr/local/bin/hematovision
account=hematovision

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

device="" site="" source=$top start=yes action=install purge=no
while [ $# -gt 0 ]; do
    case $1 in
        --device | --site | --from)
            [ $# -ge 2 ] || fail "$1 needs a value; see --help"
            case $1 in --device) device=$2 ;; --site) site=$2 ;; --from) source=$(realpath -- "$2") ;; esac
            shift ;;
        --no-start) start=no ;;
        --uninstall) action=uninstall ;;
        --purge) purge=yes ;;
        -h | --help) usage && exit 0 ;;
        *) fail "unknown argument $1; see --help" ;;
    esac
    shift
done

is_identifier() { [[ $1 =~ ^[a-z0-9-]{1,63}$ ]]; }
[ -z "$device" ] || is_identifier "$device" || fail "--device $device: allowed are 1 to 63 of a-z, 0-9 and hyphen"
[ -z "$site" ] || is_identifier "$site" || fail "--site $site: allowed are 1 to 63 of a-z, 0-9 and hyphen"
[ "$purge" = no ] || [ "$action" = uninstall ] || fail "--purge goes with --uninstall"
[ "$(id -u)" -eq 0 ] || fail "installing a service needs root: sudo $0"

# systemctl talks to a running systemd; while an image is being made there is none, and only links are written.
has_systemd() { [ -d /run/systemd/system ]; }

# The collector is installed by hand, see docs/central.md; it runs from the same program.
has_collector() { [ -e "$units/$collector" ]; }

uninstall() {
    if has_systemd; then systemctl disable --now hematovision.service 2>/dev/null || true; fi
    rm -f "$unit" "$units/multi-user.target.wants/hematovision.service"
    if has_systemd; then systemctl daemon-reload; fi
    if has_collector; then
        say "Removed the service. Kept $program: $collector works with it. To remove that too, then run this again:"
        say "  sudo systemctl disable --now $collector && sudo rm $units/$collector"
    else
        rm -rf "$program" "$command"
        say "Removed the service and $program."
    fi
    if [ "$purge" = yes ]; then
        rm -rf "$settings" "$results"
        userdel "$account" 2>/dev/null || true
        say "Removed $settings, $results and the user $account."
    else
        say "Kept the configuration in $settings and results in $results; --uninstall --purge removes them too."
    fi
}

check_machine() {
    command -v apt-get >/dev/null || fail "this is not Raspberry Pi OS, Debian or Ubuntu: no apt-get found"
    command -v systemctl >/dev/null || fail "no systemd here; use deploy/quickstart.sh, or run the agent another way"
    # Not what the kernel says: that of a 32-bit Raspberry Pi OS has 64 bits.
    local architecture
    architecture=$(dpkg --print-architecture)
    case $architecture in
        arm64 | amd64) ;;
        *) fail "$architecture is not supported: the interpreter of the models comes for arm64 and x86-64. On a" \
            "Raspberry Pi 3 or newer install the 64-bit Raspberry Pi OS" ;;
    esac
    command -v python3 >/dev/null || need_packages "Python is missing." python3 python3-venv
}

make_account() {
    id "$account" >/dev/null 2>&1 && return
    useradd --system --user-group --home-dir "$results" --no-create-home --shell /usr/sbin/nologin "$account"
    say "Made the user $account"
}

install_program() {
    local python extras=web
    python=$(find_python)
    if has_collector; then extras=web,central,export; fi
    install -d -m 755 "$program"
    make_venv "$python" "$venv"
    say "Installing from $source into $venv"
    "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --upgrade "${source}[$extras]" ||
        fail "pip could not install the agent; its message stands above."
    if [ -f "$source" ]; then # pip leaves a wheel of the same version alone, changed or not
        "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --force-reinstall --no-deps "$source"
    fi
    # The service's user may not write here, so Python could never store what it compiles.
    "$venv/bin/python" -m compileall -q "$venv/lib" >/dev/null || true
    chmod -R a+rX "$program" # for that user to read, whatever umask root has
    ln -sfn "$venv/bin/hematovision" "$command"
    say "Installed $("$venv/bin/hematovision" version | head -n 1)"
}

# One that runs still has the program of before in its memory.
restart_collector() {
    if ! has_collector || ! has_systemd; then return; fi
    if systemctl try-restart "$collector"; then
        say "Restarted $collector, if it was running: it uses this program too"
    else
        say "$collector did not start again; see: journalctl -u $collector"
    fi
}

# The computer's name in the letters that a topic allows.
name_of_computer() { uname -n | tr '[:upper:]_.' '[:lower:]--' | tr -cd 'a-z0-9-' | cut -c 1-63; }

# Prints the outbox.folder of the configuration that is there, None for none; nothing where it cannot be read.
configured_folder() {
    (cd / && "$venv/bin/python" -c 'import pathlib, sys, agent.config
print(agent.config.load_config(pathlib.Path(sys.argv[1])).outbox.folder)' "$settings/config.yaml" 2>/dev/null) || true
}

write_settings() {
    # Secrets lie here: root writes, the service reads, nobody else does.
    install -d -m 750 -o root -g "$account" "$settings"
    if [ -e "$settings/config.yaml" ]; then
        say "Kept your $settings/config.yaml"
        if [ "$(configured_folder)" = None ]; then
            say "It does not name the folder of the results. The service uses $results all the same; for commands in a"
            say "shell to find it too, add this line, or set folder in the section outbox that is there:"
            say "outbox: {folder: $results}"
        fi
        return
    fi
    [ -n "$device" ] || device=$(name_of_computer)
    local fresh
    fresh=$(mktemp "$settings/.config.XXXXXX")
    (cd / && "$venv/bin/python" -c 'from agent.config import template; print(template(), end="")') >"$fresh"
    # systemd tells the service its folder; to a command in a shell only the configuration can.
    sed -i -E "/^outbox:/,/^[a-z]/ s|^  folder: null\$|  folder: $results|" "$fresh"
    if [ -n "$device" ]; then sed -i -E "s/^device:[^#]*/device: $device  /; s/ +\$//" "$fresh"; fi
    if [ -n "$site" ]; then sed -i -E "s/^site:[^#]*/site: $site  /; s/ +\$//" "$fresh"; fi
    chown "root:$account" "$fresh"
    chmod 640 "$fresh"
    mv "$fresh" "$settings/config.yaml"
    say "Wrote $settings/config.yaml, device ${device:-as in the default}, results in $results"
}

install_unit() {
    install -m 644 "$top/systemd/hematovision.service" "$unit"
    systemctl enable --quiet hematovision.service
    say "Enabled hematovision.service: it starts with every boot"
    has_systemd || return 0
    systemctl daemon-reload
    if [ "$start" = yes ]; then
        if systemctl restart hematovision.service; then
            say "Started: $(systemctl show --property StatusText --value hematovision.service)"
        else
            journalctl --unit hematovision.service --lines 20 --no-pager --output cat >&2 || true
            fail "the service did not start; what it said stands above. Mend $settings/config.yaml and run: " \
                "sudo systemctl start hematovision"
        fi
    fi
}

if [ "$action" = uninstall ]; then
    uninstall
    exit 0
fi
check_machine
make_account
install_program
restart_collector
write_settings
install_unit
cat <<END

Next:
  choose camera and broker   sudo nano $settings/config.yaml
  try what it names          sudo -u $account hematovision check-config $settings/config.yaml
  use it                     sudo systemctl restart hematovision
  see what it does           journalctl -fu hematovision
END
