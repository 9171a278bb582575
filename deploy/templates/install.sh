#!/bin/sh
# Install this bundle and start it: sh install.sh [PREFIX]     (PREFIX is ~/edgeft if left out)
#
# Nothing is switched before everything is checked and installed. What ran before stays as PREFIX/previous.
set -eu
umask 022
here=$(cd "$(dirname "$0")" && pwd -P)
prefix=${1:-$HOME/edgeft}
case $prefix in /*) ;; *) prefix=$PWD/$prefix ;; esac
fail() { echo "install.sh: $1" >&2; exit "${2:-1}"; }

cd "$here"
sha256sum --quiet --strict -c SHA256SUMS >&2 || fail "a file is damaged; copy the bundle again" 3
id=$(sed -n 's/^ "id": "\([0-9a-f]*\)",$/\1/p' bundle.json)
[ -n "$id" ] || fail "bundle.json names no id" 3

mkdir -p "$prefix/releases" "$prefix/venvs" "$prefix/run"
prefix=$(cd "$prefix" && pwd -P)
release=$prefix/releases/$id
if [ "$here" != "$release" ]; then
    rm -rf "$release.part" "$release"
    cp -R "$here" "$release.part" && mv "$release.part" "$release" || fail "the bundle could not be copied to $release" 4
fi

venv=$prefix/venvs/@venv
if [ ! -e "$venv/.ready" ]; then
    python=$(command -v python@python || command -v python3) || fail "there is no python3" 5
    seen=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    [ "$seen" = "@python" ] || fail "python3 is $seen, and the wheels are for @python" 5
    rm -rf "$venv"
    "$python" -m venv --without-pip "$venv" || fail "no virtual environment could be made (apt install python3-venv)" 5
    cd "$release"
    pip=$(ls wheels/pip-*.whl 2>/dev/null || true)
    if [ -n "$pip" ]; then
        PYTHONPATH=$release/$pip "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-index \
            --find-links wheels --no-compile --require-hashes --no-deps -r requirements.lock >&2 \
            || { rm -rf "$venv"; fail "the packages could not be installed" 6; }
    else
        "$python" -m venv "$venv" || fail "no pip in a new environment (apt install python3-venv)" 5
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements.lock >&2 \
            || { rm -rf "$venv"; fail "the packages could not be installed" 6; }
    fi
    : > "$venv/.ready"
fi

# The switch: one rename. Installing the same again keeps what was there before it.
before=$(readlink "$prefix/current" 2>/dev/null || true)
if [ -n "$before" ] && [ "$before" != "releases/$id" ]; then
    ln -sfn "$before" "$prefix/previous.new" && mv -T "$prefix/previous.new" "$prefix/previous"
fi
ln -sfn "releases/$id" "$prefix/current.new" && mv -T "$prefix/current.new" "$prefix/current"
# What differs in the policy alone is taken over while requests run; else the service is started anew.
if [ -z "$before" ] || ! sh "$release/service.sh" "$prefix" reload "$prefix/$before" 2>/dev/null; then
    sh "$release/service.sh" "$prefix" restart
fi
sh "$release/service.sh" "$prefix" wait "${EDGEFT_WAIT_S:-120}" || fail "it did not become ready; see $prefix/run/serve.log" 7
echo "ready: http://127.0.0.1:@port/v1"
