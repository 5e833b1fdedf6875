#!/bin/sh
# Side by side with qemu-img on the same images: map, compare, check. Wall time in seconds, the best of three.
# Usage: beside-qemu.sh PLEACH [DIR]; DIR should be in memory and needs 1.5 GiB.
set -eu
pleach=$1
dir=$(mktemp -d -p "${2:-/dev/shm}")
trap 'rm -rf "$dir"' EXIT
cd "$dir"
qemu-img create -q -f qcow2 -o preallocation=metadata large.qcow2 1T
qemu-img create -q -f qcow2 a.qcow2 1G
qemu-io -f qcow2 -c 'write -q -P 5 0 256M' a.qcow2
qemu-img convert -O qcow2 a.qcow2 copy.qcow2
qemu-img convert -c -O qcow2 a.qcow2 packed.qcow2
qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 left.qcow2
qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 right.qcow2
best() {
    for _ in 1 2 3; do
        start=$(date +%s%N)
        "$@" >/dev/null
        echo $(($(date +%s%N) - start))
    done | sort -n | awk 'NR == 1 { printf "%.3f", $1 / 1e9 }'
}
row() {
    name=$1
    shift
    echo "$name: pleach $(best "$pleach" "$@"), qemu-img $(best qemu-img "$@")"
}
row 'map, 1 TiB preallocated' map large.qcow2
row 'check, 1 TiB preallocated' check large.qcow2
row 'compare, two copies of 256 MiB' compare a.qcow2 copy.qcow2
row 'compare, one of them compressed' compare a.qcow2 packed.qcow2
row 'compare, overlays of one base' compare left.qcow2 right.qcow2
