#!/bin/bash
# Runs inside the booted test system (test_service_boot.py): looks at the service, writes what it saw to /probe, ends.
# A line of /probe/facts is NAME=VALUE; the test judges, this only looks.
exec 2>/probe/probe-errors
unit=hematovision.service

fact() { printf '%s=%s\n' "$1" "$2" >>/probe/facts; }
property() { systemctl show "$unit" --property "$1" --value; }
wait_for() { # SECONDS COMMAND...: 0 as soon as the command succeeds
    local left=$(($1 * 4))
    shift
    until "$@"; do
        left=$((left - 1))
        [ "$left" -gt 0 ] || return 1
        sleep 0.25
    done
}
is_active() { [ "$(property ActiveState)" = active ]; }
has_restarted() { [ "$(property NRestarts)" -ge 1 ] && is_active; }

wait_for 60 is_active
fact active "$(property ActiveState)"
fact status "$(property StatusText)"
fact waits_for_network "$(systemctl is-active network-online.target)"
pid=$(property MainPID)
fact user "$(ps -o user= -p "$pid")"
fact groups "$(ps -o supgrp= -p "$pid")"
fact capabilities "$(grep CapEff "/proc/$pid/status" | tr -d '\t ' | cut -d: -f2)"
fact no_new_privileges "$(grep NoNewPrivs "/proc/$pid/status" | tr -d '\t ' | cut -d: -f2)"
fact state_folder "$(stat -c '%U %a' /var/lib/hematovision)"
fact outbox_in_a_shell "$(runuser -u hematovision -- hematovision outbox --config /etc/hematovision/config.yaml status >/dev/null && echo found)"
fact settings "$(stat -c '%U %G %a' /etc/hematovision/config.yaml)"

mosquitto_sub -h 127.0.0.1 -t 'hv/1/#' -v -C 40 -W 60 >/probe/messages

# What the settings allow, tried from inside: a file of the video group opens, the system cannot be written.
install -m 640 -g video /dev/null /srv/of-the-video-group
systemd-run --wait --quiet --property=User=hematovision --property=Group=hematovision \
    --property=SupplementaryGroups=video --property=PrivateUsers=yes --property=ProtectSystem=strict \
    cat /srv/of-the-video-group && fact video_group yes

# The unit's own filter of system calls lets the clock be read: -1 would be a refusal.
mapfile -t filter < <(sed -n 's/^\(SystemCall.*\)/--property=\1/p' /etc/systemd/system/hematovision.service)
systemd-run --wait --quiet --pipe --property=User=hematovision --property=CapabilityBoundingSet= "${filter[@]}" \
    /opt/hematovision/venv/bin/python -c 'import ctypes
print("clock_answer=%d" % ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)))' >>/probe/facts

# The page within the unit's walls: what it shows, and the latest field as an uploaded picture, which another program examines.
/opt/hematovision/venv/bin/python - >>/probe/facts <<'PYTHON'
import json, time, urllib.request
page = "http://127.0.0.1:8080"
def ask(path, body=None):
    request = urllib.request.Request(page + path, body, {"Origin": page})
    return urllib.request.urlopen(request, timeout=90).read()
for _ in range(20):
    state = json.loads(ask("/api/state"))
    if state["frame"] and state["frame"]["cells"]:
        break
    time.sleep(0.5)
print("page_cells=%d" % len(state["frame"]["cells"]))
picture = ask("/api/frame/%d.jpg" % state["frame"]["number"])
print("page_examined_cells=%d" % len(json.loads(ask("/api/picture", picture))["cells"]))
PYTHON

# A frozen agent: the watchdog ends it, systemd starts it again, the boot counter goes on.
kill -STOP "$pid"
wait_for 90 has_restarted
fact restarts "$(property NRestarts)"
fact boot_after_watchdog "$(cat /var/lib/hematovision/boot)"
fact active_after_watchdog "$(property ActiveState)"

# A stop: drained, exit code 0, quickly.
began=$(date +%s)
systemctl stop "$unit"
fact stop_seconds $(($(date +%s) - began))
fact stop_result "$(property Result) $(property ExecMainStatus)"
mosquitto_sub -h 127.0.0.1 -t 'hv/1/+/+/state' -C 1 -W 5 >/probe/last-state

# A refused configuration: told, and not started for ever.
echo 'no-such-key: 1' >>/etc/hematovision/config.yaml
systemctl start "$unit"
sleep 1
fact refused "$(property ActiveState) $(property ExecMainStatus)"

journalctl --unit "$unit" --no-pager --output short-monotonic >/probe/journal
sync
systemctl poweroff --force --force
