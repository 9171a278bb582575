# What deploying asks of a box, one word at a time: sh -s -- WORD PREFIX …, this file on standard input. POSIX sh and coreutils.
set -eu
umask 022
word=$1
prefix=$2
case $prefix in "~/"*) prefix=$HOME/${prefix#"~/"} ;; esac
store=$prefix/store

memory() {  # the smallest of the machine's memory and the limits of this session's control groups, in bytes
    total=$(awk '/^MemTotal:/ {printf "%.0f", $2 * 1024}' /proc/meminfo)
    group=$(awk -F: '$2 == "memory" {print $3}' /proc/self/cgroup)
    unified=$(awk -F: '$1 == "0" {print $3}' /proc/self/cgroup)
    for file in "/sys/fs/cgroup/memory$group/memory.limit_in_bytes" "/sys/fs/cgroup$unified/memory.max"; do
        if [ -r "$file" ]; then
            limit=$(cat "$file")
            case $limit in max | *[!0-9]*) ;; *) [ "${#limit}" -lt 18 ] && [ "$limit" -lt "$total" ] && total=$limit ;; esac
        fi
    done
    echo "$total"
}

unused() {  # bytes that programs may still take: the machine's, or less where a control group of this session leaves less
    free=$(awk '/^MemAvailable:/ {printf "%.0f", $2 * 1024}' /proc/meminfo)
    v1=/sys/fs/cgroup/memory$(awk -F: '$2 == "memory" {print $3}' /proc/self/cgroup)
    v2=/sys/fs/cgroup$(awk -F: '$1 == "0" {print $3}' /proc/self/cgroup)
    left "$v1/memory.limit_in_bytes" "$v1/memory.usage_in_bytes" "$v1/memory.stat" total_inactive_file
    left "$v2/memory.max" "$v2/memory.current" "$v2/memory.stat" inactive_file
    echo "$free"
}
left() {  # LIMIT USED STAT DROPPABLE, of one group: what it may still take, file pages that it would drop counted
    if [ -r "$1" ] && [ -r "$2" ]; then
        limit=$(cat "$1")
        case $limit in max | *[!0-9]*) return ;; esac
        [ "${#limit}" -lt 18 ] || return 0
        more=$((limit - $(cat "$2") + $(awk -v name="$4" '$1 == name {print $2}' "$3")))
        if [ "$more" -lt "$free" ]; then free=$more; fi
    fi
}
ours() {  # bytes that the service of this prefix holds and gives back when it is replaced; the kernel drops file pages by itself
    total=0
    for proc in /proc/[0-9]*; do
        if tr '\0' ' ' < "$proc/cmdline" 2>/dev/null | grep -qF "$1/venvs/"; then
            held=$(awk '/^RssAnon:|^RssShmem:/ {sum += $2} END {printf "%.0f", sum * 1024}' "$proc/status" 2>/dev/null || echo 0)
            total=$((total + ${held:-0}))
        fi
    done
    echo "$total"
}

lock=$prefix/.deploying

case $word in
lock)  # TOKEN WHO: one deployment at a time; one that was broken off holds it for a quarter of an hour
    mkdir -p "$prefix"
    if ! mkdir "$lock" 2>/dev/null; then
        [ "$(cat "$lock/token" 2>/dev/null)" != "$3" ] || exit 0
        if [ -z "$(find "$lock" -maxdepth 0 -mmin +15)" ]; then
            echo "another deployment ($(cat "$lock/who" 2>/dev/null)) is under way; when it is dead: rm -r $lock" >&2
            exit 4
        fi
        rm -rf "$lock"
        mkdir "$lock"
    fi
    echo "$3" > "$lock/token"
    echo "$4" > "$lock/who" ;;
unlock)  # TOKEN
    if [ "$(cat "$lock/token" 2>/dev/null)" = "$3" ]; then rm -rf "$lock"; fi ;;
probe)
    mkdir -p "$store"
    echo "prefix=$(cd "$prefix" && pwd -P)"
    echo "machine=$(uname -m)"
    echo "memory_bytes=$(memory)"
    echo "unused_bytes=$(unused)"
    echo "ours_bytes=$(ours "$(cd "$prefix" && pwd -P)")"
    echo "disk_free_bytes=$(df -Pk "$prefix" | awk 'NR == 2 {printf "%.0f", $4 * 1024}')"
    echo "python=$(for p in "python${3:-3}" python3; do "$p" -c 'import sys, venv; print("%d.%d" % sys.version_info[:2])' 2>/dev/null && break; done || true)"
    echo "libraries=$(for lib in libstdc++.so.6 libgomp.so.1; do
        for p in "python${3:-3}" python3; do "$p" -c "import ctypes; ctypes.CDLL('$lib')" 2>/dev/null && printf '%s ' "$lib" && break; done
    done || true)"
    echo "cpu_flags=$(awk -F: '/^(flags|Features)/ {print $2; exit}' /proc/cpuinfo)"
    echo "current=$(readlink "$prefix/current" 2>/dev/null | sed 's|.*/||' || true)"
    echo "previous=$(readlink "$prefix/previous" 2>/dev/null | sed 's|.*/||' || true)"
    echo "venvs=$(for v in "$prefix"/venvs/*/.ready; do [ -e "$v" ] && basename "$(dirname "$v")"; done | tr '\n' ' ' || true)"
    echo "stored=$(ls "$store" | tr '\n' ' ')" ;;
size)  # HASH: bytes of it that arrived so far, moved to a file that no session of before still writes to
    if [ -e "$store/.$3.part" ]; then
        cp "$store/.$3.part" "$store/.$3.again" && mv "$store/.$3.again" "$store/.$3.part"
        stat -c %s "$store/.$3.part"
    elif [ -e "$store/$3" ]; then
        echo whole
    else
        echo 0
    fi ;;
assemble)  # ID, then 'HASH MODE NAME' lines after this script
    release=$prefix/releases/$3
    rm -rf "$release.part"
    mkdir -p "$release.part"
    while read -r hash mode name; do
        [ -n "$hash" ] || continue
        mkdir -p "$release.part/$(dirname "$name")"
        ln "$store/$hash" "$release.part/$name" 2>/dev/null || cp "$store/$hash" "$release.part/$name"
        chmod "$mode" "$release.part/$name"
    done <<LIST
$(printf '%s' "$4")
LIST
    cd "$release.part"
    sha256sum --quiet --strict -c SHA256SUMS >&2
    if [ -d "$release" ]; then rm -rf "$release"; fi
    mv "$release.part" "$release" ;;
install)  # ID SECONDS
    EDGEFT_WAIT_S=$4 sh "$prefix/releases/$3/install.sh" "$prefix" ;;
rollback)  # back to ID, or to nothing
    back=$3
    now=$(readlink "$prefix/current" 2>/dev/null || true)
    if [ -n "$now" ]; then sh "$prefix/$now/service.sh" "$prefix" stop || true; fi
    if [ -n "$back" ]; then
        [ -d "$prefix/releases/$back" ] || { echo "there is no release $back" >&2; exit 3; }
        if [ -n "$now" ] && [ "$now" != "releases/$back" ]; then ln -sfn "$now" "$prefix/previous.new" && mv -T "$prefix/previous.new" "$prefix/previous"; fi
        ln -sfn "releases/$back" "$prefix/current.new" && mv -T "$prefix/current.new" "$prefix/current"
        sh "$prefix/current/service.sh" "$prefix" start
        sh "$prefix/current/service.sh" "$prefix" wait "$4"
    else
        rm -f "$prefix/current"
    fi ;;
check)  # ID VENV SECONDS PORT
    cd "$prefix"
    EDGEFT_HOME=$prefix/home "$prefix/venvs/$4/bin/python" -m edgeft.deploy.check "http://127.0.0.1:$6" "$5" ;;
state)
    now=$(readlink "$prefix/current" 2>/dev/null || true)
    if [ -n "$now" ]; then sh "$prefix/$now/service.sh" "$prefix" state; else echo none; fi ;;
stop)
    now=$(readlink "$prefix/current" 2>/dev/null || true)
    if [ -n "$now" ]; then sh "$prefix/$now/service.sh" "$prefix" stop; fi ;;
tidy)  # what neither the current nor the previous release needs
    keep="$(readlink "$prefix/current" || true) $(readlink "$prefix/previous" || true)"
    for release in "$prefix"/releases/*; do
        [ -d "$release" ] || continue
        case " $keep " in *" releases/$(basename "$release") "*) ;; *) rm -rf "$release" ;; esac
    done
    used=$(cat "$prefix"/releases/*/bundle.json 2>/dev/null | sed -n 's/^ "venv": "\([0-9a-f]*\)",$/\1/p')
    for venv in "$prefix"/venvs/*; do
        [ -d "$venv" ] || continue
        case " $(echo "$used" | tr '\n' ' ') " in *" $(basename "$venv") "*) ;; *) rm -rf "$venv" ;; esac
    done
    find "$store" -type f -links 1 -delete ;;
*)
    echo "box.sh: what is '$word'?" >&2
    exit 2 ;;
esac
