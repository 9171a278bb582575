#!/bin/sh
# The service of this bundle: sh service.sh PREFIX start|stop|restart|reload RELEASE|wait SECONDS|state
# Under systemd (root, or a user's own manager) by the unit, else as a process in the background.
set -eu
prefix=$1
what=$2
here=$(cd "$(dirname "$0")" && pwd -P)
pidfile=$prefix/run/serve.pid
log=$prefix/run/serve.log
export EDGEFT_HOME="$prefix/home"

systemd=""
if [ -d /run/systemd/system ] && command -v systemctl >/dev/null; then
    if [ "$(id -u)" = 0 ]; then systemd="systemctl"; units=/etc/systemd/system
    else
        [ -n "${XDG_RUNTIME_DIR:-}" ] || export XDG_RUNTIME_DIR="/run/user/$(id -u)"
        # A user's manager ends with the last session, and its services with it, unless the user lingers.
        lingers=/var/lib/systemd/linger/$(id -un)
        if systemctl --user show-environment >/dev/null 2>&1; then
            [ "$what" != start ] || [ -e "$lingers" ] || loginctl --no-ask-password enable-linger >/dev/null 2>&1 || true
            if [ -e "$lingers" ]; then systemd="systemctl --user"; units=$HOME/.config/systemd/user
            elif [ "$what" = start ]; then
                echo "runs without systemd, and not after a reboot; for that: sudo loginctl enable-linger $(id -un), and install again" >&2
            fi
        fi
    fi
fi
alive() {  # after a reboot the number may be another program's
    [ -f "$pidfile" ] && tr '\0' ' ' < "/proc/$(cat "$pidfile")/cmdline" 2>/dev/null | grep -qF -- "-m edgeft serve "
}
ask() {
    "$prefix/venvs/@venv/bin/python" -c '
import sys, urllib.request
try:
    sys.exit(urllib.request.urlopen(sys.argv[1], timeout=2).status != 200)
except Exception:
    sys.exit(1)' "http://127.0.0.1:@port$1"
}

reloads() {  # how often the running service took a configuration over; nothing where it can't, or the last one was wrong
    "$prefix/venvs/@venv/bin/python" -c '
import json, sys, urllib.request
told = json.load(urllib.request.urlopen(sys.argv[1], timeout=2)).get("reloads")
sys.exit(1) if not told or told["error"] else print(told["done"])' "http://127.0.0.1:@port/health/ready" 2>/dev/null
}
models() { grep ' artifacts/' "$1/SHA256SUMS"; }

case $what in
start)
    mkdir -p "$prefix/run" "$EDGEFT_HOME"
    if [ -n "$systemd" ]; then
        mkdir -p "$units"
        wanted=default.target; [ "$(id -u)" = 0 ] && wanted=multi-user.target
        sed -e "s|%PREFIX%|$prefix|g" -e "s|%WANTED%|$wanted|" "$here/edgeft.service" > "$units/edgeft.service"
        $systemd daemon-reload
        $systemd enable --quiet edgeft.service
        $systemd restart edgeft.service
    elif ! alive; then
        if ask /health/live; then echo "another process answers at port @port already" >&2; exit 1; fi
        cd "$prefix"
        # its own session, and no descriptor of the caller's: ssh would wait for them
        setsid "$prefix/venvs/@venv/bin/python" -m edgeft serve --policy current/policy --artifacts current/artifacts \
            --cache "$prefix/cache" @serve </dev/null >"$log" 2>&1 &
        echo $! > "$pidfile"
        n=0  # until it is the program that `alive` looks for
        while [ $n -lt 50 ] && kill -0 "$(cat "$pidfile")" 2>/dev/null && ! alive; do sleep 0.1; n=$((n + 1)); done
    fi ;;
stop)
    if [ -n "$systemd" ]; then $systemd stop edgeft.service 2>/dev/null || true; fi
    if alive; then  # also one that was started before systemd could
        pid=$(cat "$pidfile")
        kill "$pid" 2>/dev/null || true
        n=0
        while kill -0 "$pid" 2>/dev/null && [ $n -lt 300 ]; do sleep 0.1; n=$((n + 1)); done
        kill -9 "$pid" 2>/dev/null || true
    fi
    rm -f "$pidfile" ;;
restart)
    sh "$0" "$prefix" stop
    sh "$0" "$prefix" start ;;
reload)  # in place of a restart where the release that ran differs in its policy alone; fails where it does not
    old=$3
    cmp -s "$old/service.sh" "$here/service.sh" && cmp -s "$old/edgeft.service" "$here/edgeft.service" || exit 1
    [ "$(models "$old")" = "$(models "$here")" ] || exit 1
    before=$(reloads) || exit 1
    if [ -n "$systemd" ]; then
        ! alive || exit 1  # it was started before systemd could
        $systemd reload edgeft.service
    else
        alive && kill -HUP "$(cat "$pidfile")"
    fi || exit 1
    n=0
    until now=$(reloads) && [ "$now" -gt "$before" ]; do
        n=$((n + 1))
        [ $n -lt 25 ] || exit 1
        sleep 0.2
    done ;;
wait)
    n=0
    limit=$((${3:-120} * 5))
    until ask /health/ready; do
        if [ -z "$systemd" ] && ! alive; then echo "its process has ended; see $log" >&2; exit 1; fi
        n=$((n + 1))
        [ $n -lt $limit ] || { echo "not ready within ${3:-120} s; see $log" >&2; exit 1; }
        sleep 0.2
    done ;;
state)
    if ask /health/ready; then echo ready; elif ask /health/live; then echo loading; else echo down; fi ;;
*)
    echo "service.sh: start, stop, restart, reload, wait or state, not '$what'" >&2
    exit 2 ;;
esac
