#!/usr/bin/env bash
# Makes golden/ and matrix/: tiny qcow2 images by qemu-img and qemu-io, and beside each what QEMU says about it.
#
#   make.sh           makes them anew
#   make.sh --check   compares both with what QEMU says about their images today, and with images made anew
#
# Contents are written in patterns that change every few sectors, so that a cluster read from a wrong place shows.
set -euo pipefail
ulimit -c 0
export LC_ALL=C

# --- helpers: all work in the current directory -------------------------------------------------------------------

# create NAME SIZE OPTIONS [qemu-img create arguments]
create() {
    local name=$1 size=$2 options=$3
    shift 3
    qemu-img create -q -f qcow2 -o "$options" "$@" "$name.qcow2" "$size"
}

# io NAME COMMAND...: each COMMAND is one of qemu-io's
io() {
    local name=$1 arguments=()
    shift
    for command in "$@"; do
        arguments+=(-c "$command")
    done
    qemu-io -f qcow2 "${arguments[@]}" "$name.qcow2" >/dev/null
}

# stripe NAME OFFSET LENGTH STEP SEED: LENGTH bytes at OFFSET, another byte value every STEP bytes
stripe() {
    local name=$1 offset=$2 length=$3 step=$4 value=$5 at commands=()
    for ((at = offset; at < offset + length; at += step, value = value % 255 + 1)); do
        commands+=("write -P $value $at $step")
    done
    io "$name" "${commands[@]}"
}

# text FILE FIRST BYTES: numbers from FIRST on, one a line; compresses to about a third
text() {
    seq "$2" $(($2 + $3)) | head -c "$3" >"$1" || true
}

# --- the images ---------------------------------------------------------------------------------------------------

versions_and_cluster_sizes() {
    local version compat bytes
    for version in v2 v3; do
        compat=1.1
        [ $version = v3 ] || compat=0.10
        # The disk ends inside a cluster (but for 512), and its data spans several L2 tables (but for 64k).
        create $version-512 205312 compat=$compat,cluster_size=512
        stripe $version-512 0 8192 512 1
        stripe $version-512 32256 2048 512 40
        stripe $version-512 204800 512 512 90
        create $version-4k 4196864 compat=$compat,cluster_size=4k
        stripe $version-4k 6144 12288 1024 1
        stripe $version-4k 2093056 8192 512 60
        stripe $version-4k 4194304 2560 512 120
        create $version-64k 1049088 compat=$compat,cluster_size=64k
        stripe $version-64k 60000 12000 1000 1
    done
    stripe v3-64k 1048576 512 512 200
    create empty 1M cluster_size=512
    create size-0 0 cluster_size=512
}

refcount_widths() {
    local bits
    for bits in 1 2 4 8 16 32 64; do
        create refcount-$bits 100k cluster_size=512,refcount_bits=$bits
        stripe refcount-$bits 0 20480 512 $bits
        # A width of 1 bit has no room for a cluster that two states share.
        if [ $bits != 1 ]; then
            qemu-img snapshot -c first refcount-$bits.qcow2
            stripe refcount-$bits 5120 10240 512 100
        fi
    done
}

backing_files() {
    create base-512 128k cluster_size=512
    stripe base-512 0 131072 1024 3
    text base-raw.raw 1000 33333 # not a multiple of a sector
    create over-same 128k cluster_size=512 -b base-512.qcow2 -F qcow2
    stripe over-same 4096 4096 512 130
    create over-larger-clusters 128k cluster_size=4k -b base-512.qcow2 -F qcow2
    stripe over-larger-clusters 5120 1024 512 140
    create over-shorter 50k cluster_size=4k -b base-512.qcow2 -F qcow2
    stripe over-shorter 49152 2048 512 150
    create over-longer 300k cluster_size=4k -b base-512.qcow2 -F qcow2
    stripe over-longer 126976 8192 512 160
    create over-v2 128k compat=0.10,cluster_size=1k -b base-512.qcow2 -F qcow2
    stripe over-v2 0 2048 512 170
    create over-raw 40k cluster_size=1k -b base-raw.raw -F raw
    stripe over-raw 32768 512 512 180
    create over-raw-shorter 10k cluster_size=512 -b base-raw.raw -F raw
    # Longer than the short one in the middle: what that one cut off must not come back.
    create over-over-shorter 128k cluster_size=512 -b over-shorter.qcow2 -F qcow2
    stripe over-over-shorter 1024 1024 512 190
}

zero_clusters() {
    create zero 128k cluster_size=1k -b base-512.qcow2 -F qcow2
    stripe zero 65536 16384 512 20
    # In turn: never allocated; allocated and kept; allocated and given back; inside a cluster; discarded.
    io zero "write -z 4k 8k" "write -z 65k 3k" "write -z -u 70k 3k" "write -z 75264 512" "discard 77k 2k"
    create zero-v2 64k compat=0.10,cluster_size=1k
    stripe zero-v2 0 16384 512 20
    io zero-v2 "write -z 2k 3k" "discard 8k 2k"
    create preallocated 64k cluster_size=512,preallocation=metadata
    stripe preallocated 1024 2048 512 50
}

compressed_clusters() {
    text numbers.tmp 1 139264
    qemu-img convert -c -f raw -O qcow2 -o cluster_size=4k numbers.tmp compressed.qcow2
    qemu-img convert -c -f raw -O qcow2 -o cluster_size=64k numbers.tmp compressed-64k.qcow2
    qemu-img convert -c -f raw -O qcow2 -o cluster_size=512 numbers.tmp compressed-512.qcow2
    qemu-img convert -c -f raw -O qcow2 -o compat=0.10,cluster_size=4k numbers.tmp compressed-v2.qcow2
    qemu-img convert -c -f raw -O qcow2 -o cluster_size=4k,compression_type=zstd numbers.tmp zstd.qcow2
    qemu-img convert -c -f raw -O qcow2 -o cluster_size=16k,compression_type=zstd numbers.tmp zstd-16k.qcow2
    # Neighbours of overwritten clusters share host clusters with what stays.
    qemu-img convert -c -f raw -O qcow2 -o cluster_size=4k numbers.tmp compressed-overwritten.qcow2
    stripe compressed-overwritten 10240 6144 512 70
    io compressed-overwritten "write -z 40k 4k" "discard 100k 8k"
    create compressed-over 160k cluster_size=4k -b compressed.qcow2 -F qcow2
    io compressed-over "write -c -P 77 4k 4k" "write -c -P 78 156k 4k"
    stripe compressed-over 9216 512 512 1
    qemu-img snapshot -c frozen compressed-over.qcow2
    io compressed-over "write -P 79 4k 512"
    rm numbers.tmp
}

internal_snapshots() {
    create snapshots 64k cluster_size=512
    stripe snapshots 0 16384 512 1
    qemu-img snapshot -c first snapshots.qcow2
    stripe snapshots 4096 4096 512 100
    qemu-img snapshot -c "a name with spaces" snapshots.qcow2
    qemu-img resize -q snapshots.qcow2 96k
    stripe snapshots 81920 4096 512 150
    qemu-img snapshot -c larger snapshots.qcow2
    qemu-img resize -q --shrink snapshots.qcow2 32k
    stripe snapshots 0 1024 512 200
    qemu-img snapshot -c smaller snapshots.qcow2
    qemu-img snapshot -c gone snapshots.qcow2
    qemu-img snapshot -d gone snapshots.qcow2
    create snapshots-v2 64k compat=0.10,cluster_size=1k
    stripe snapshots-v2 0 8192 512 1
    qemu-img snapshot -c first snapshots-v2.qcow2
    stripe snapshots-v2 2048 4096 512 100
    qemu-img snapshot -c second snapshots-v2.qcow2
    qemu-img snapshot -a first snapshots-v2.qcow2
    create snapshots-over 128k cluster_size=1k -b base-512.qcow2 -F qcow2
    stripe snapshots-over 10240 4096 512 30
    qemu-img snapshot -c first snapshots-over.qcow2
    io snapshots-over "write -z 8k 4k" "write -P 31 20k 1k"
}

version_3_features() {
    create bitmaps 256k cluster_size=1k
    stripe bitmaps 0 4096 512 1
    qemu-img bitmap --add -g 1k bitmaps.qcow2 fine
    qemu-img bitmap --add -g 64k bitmaps.qcow2 coarse
    qemu-img bitmap --add --disable bitmaps.qcow2 off
    stripe bitmaps 131072 4096 512 50
    io bitmaps "write -z 200k 4k"
    qemu-img bitmap --disable bitmaps.qcow2 coarse
    io bitmaps "write -P 9 8k 1k"

    create extended-l2 512k cluster_size=16k,extended_l2=on
    stripe extended-l2 512 1536 512 1
    stripe extended-l2 40960 20480 512 30
    io extended-l2 "write -z 41984 1k" "write -z 128k 512" "write -z -u 48k 16k" "discard 56k 1k"
    create extended-l2-over 128k cluster_size=16k,extended_l2=on -b base-512.qcow2 -F qcow2
    stripe extended-l2-over 17408 1024 512 60
    io extended-l2-over "write -z 20k 1k" "write -z -u 64k 32k"
    qemu-img convert -c -f qcow2 -O qcow2 -o cluster_size=16k,extended_l2=on base-512.qcow2 extended-l2-compressed.qcow2

    create data-file 32k cluster_size=1k,data_file=data-file.raw
    stripe data-file 0 8192 512 1
    io data-file "write -z 2k 2k" "write -P 80 28k 4k"
    create data-file-raw 32k cluster_size=1k,data_file=data-file-raw.raw,data_file_raw=on
    stripe data-file-raw 0 8192 512 1
    io data-file-raw "write -z 2k 2k"

    create lazy 64k cluster_size=512,lazy_refcounts=on
    stripe lazy 0 4096 512 1
    # Flushed, then killed: the refcounts on disk are behind, and the header says so.
    create lazy-dirty 64k cluster_size=512,lazy_refcounts=on
    io lazy-dirty "write -P 1 0 4k" "write -P 2 40k 2k" "flush" "abort" 2>/dev/null || true
}

# --- the matrix: every feature, version, cluster size and refcount width --------------------------------------------

# feature NAME OPTIONS CLUSTER: an image of six clusters and a sector that has what the name says
feature() {
    local name=$1 options=$2 c=$3 size=$(($3 * 6 + 512)) half=$(($3 > 512 ? $3 / 2 : 512))
    case ${name%%-*} in
        data)
            create "$name" $size "$options"
            io "$name" "write -P 1 $half $c" "write -P 2 $((c + half)) 512" "write -P 3 $((c * 4)) $((c * 2))" \
                "write -P 4 $((c * 6)) 512"
            ;;
        zero)
            create "$name" $size "$options" -b base.raw -F raw
            io "$name" "write -P 1 0 $((c * 4))" "write -z 0 $c" "write -z -u $c $c" "write -z $((c * 4 + half)) $half" \
                "discard $((c * 2)) $c" "write -z $((c * 5)) $c"
            ;;
        preallocated)
            create "$name" $size "$options,preallocation=metadata"
            io "$name" "write -P 1 $half $c"
            ;;
        backing)
            create "$name" $((size + c)) "$options" -b base.raw -F raw
            io "$name" "write -P 1 $half 512" "write -P 2 $((c * 3)) $c"
            ;;
        compressed | zstd)
            text numbers.tmp 1 $((c < 6000 ? c * 5 : 30000))
            truncate -s $size numbers.tmp
            [ ${name%%-*} = compressed ] || options=$options,compression_type=zstd
            qemu-img convert -c -f raw -O qcow2 -o "$options" numbers.tmp "$name.qcow2"
            rm numbers.tmp
            # Half of a compressed cluster is overwritten, its neighbours in the same host cluster stay.
            io "$name" "write -P 7 $c $half" "write -c -P 8 $((c * 5)) $c"
            ;;
        snapshot)
            create "$name" $size "$options"
            io "$name" "write -P 1 0 $((c * 3))"
            qemu-img snapshot -c first "$name.qcow2"
            io "$name" "write -P 2 $c $c" "write -P 3 $((c * 5)) $c"
            ;;
        bitmap)
            create "$name" $size "$options"
            qemu-img bitmap --add -g 512 "$name.qcow2" dirty
            io "$name" "write -P 1 $c $half" "write -P 2 $((c * 5 + half)) 512"
            ;;
        lazy)
            create "$name" $size "$options,lazy_refcounts=on"
            io "$name" "write -P 1 0 $c" "write -P 2 $((c * 3 + half)) $c"
            ;;
        subclusters)
            create "$name" $size "$options,extended_l2=on" -b base.raw -F raw
            io "$name" "write -P 1 $half 512" "write -z $c $((c / 32))" "write -P 2 $((c * 2)) $c" \
                "write -z -u $((c * 2)) $half" "discard $((c * 3)) $c" "write -z $((c * 4)) $c"
            ;;
        apart)
            create "$name" $size "$options,data_file=$name.raw"
            io "$name" "write -P 1 $half $c" "write -z $((c * 3)) $c"
            ;;
        apartraw)
            create "$name" $size "$options,data_file=$name.raw,data_file_raw=on"
            io "$name" "write -P 1 $half $c" "write -z $((c * 3)) $c"
            ;;
    esac
}

# features VERSION CLUSTER WIDTH FEATURE...
features() {
    local version=$1 cluster=$2 width=$3 compat=1.1 bytes feature
    shift 3
    [ $version = v3 ] || compat=0.10
    bytes=$(numfmt --from=iec "${cluster^^}")
    for feature in "$@"; do
        # A width of 1 bit has no room for a cluster that two states share.
        [ $width-$feature != 1-snapshot ] || continue
        feature $feature-$version-$cluster-$width "compat=$compat,cluster_size=$cluster,refcount_bits=$width" "$bytes"
    done
}

make_matrix() {
    local old="data zero preallocated backing compressed snapshot" cluster width
    local new="$old zstd bitmap lazy apart apartraw"
    text base.raw 1 9000
    for cluster in 512 4k; do
        features v2 $cluster 16 $old
        for width in 1 2 4 8 16 32 64; do
            features v3 $cluster $width $new
        done
    done
    for width in 1 16 64; do
        features v3 16k $width subclusters
        features v3 64k $width data snapshot compressed
    done
    features v2 64k 16 data snapshot compressed
    features v3 64k 16 subclusters zstd
    features v3 2M 16 data
    fill_holes
    describe_all
}

# --- what QEMU says about them ------------------------------------------------------------------------------------

# Removes the members that change from run to run, and the comma that then ends an object.
without_volatile() {
    awk '
        /"(actual-size|date-sec|date-nsec)":/ { next }
        { if (held != "") { if ($0 ~ /^ *[}\]]/) sub(/,$/, "", held); print held } held = $0 }
        END { print held }
    '
}

# digest FILE WHAT: a line of NAME.sha256
digest() {
    qemu-img convert -f qcow2 -O raw "$1" content.tmp
    echo "$(sha256sum <content.tmp | cut -d ' ' -f 1)  $2"
    rm content.tmp
}

# describe NAME: NAME.info.json, NAME.map.json, NAME.check.json, and NAME.sha256 with a line for the active state and
# each snapshot
describe() {
    local name=$1 snapshot
    # It fails where it finds something: that is in the file.
    qemu-img check --output=json "$name.qcow2" >"$name.check.json" 2>/dev/null || true
    qemu-img info --output=json "$name.qcow2" | without_volatile >"$name.info.json"
    qemu-img map --output=json "$name.qcow2" >"$name.map.json"
    {
        digest "$name.qcow2" "$name"
        sed -n '/"snapshots": \[/,/\]/ s/^ *"name": "\(.*\)",*$/\1/p' "$name.info.json" |
            while IFS= read -r snapshot; do
                # `convert -l` would give a snapshot the size of the active disk; reverting a copy keeps its own.
                cp "$name.qcow2" reverted.tmp
                qemu-img snapshot -a "$snapshot" reverted.tmp
                digest reverted.tmp "$name@$snapshot"
                rm reverted.tmp
            done
    } >"$name.sha256"
}

describe_all() {
    local image
    for image in *.qcow2; do
        describe "${image%.qcow2}"
    done
}

# Fills the holes: what `map` says of a preallocated cluster depends on them.
fill_holes() {
    local file
    for file in *.qcow2 *.raw; do
        cp --sparse=never "$file" filled.tmp && mv filled.tmp "$file"
        case $file in
            lazy-dirty.qcow2 | *.raw) ;;
            *) qemu-img check -q "$file" || { echo "$file does not pass qemu-img check" >&2; exit 1; } ;;
        esac
    done
}

make_golden() {
    versions_and_cluster_sizes
    refcount_widths
    backing_files
    zero_clusters
    compressed_clusters
    internal_snapshots
    version_3_features
    fill_holes
    describe_all
}

# compare SET DIRECTORY WHAT: the descriptions in the directory against those that are stored
compare() {
    if diff -r -u -x '*.qcow2' -x '*.raw' "$here/$1" "$2"; then
        return 0
    fi
    echo "$1/ differs from what $(qemu-img --version | head -n 1) says about $3" >&2
    return 1
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for set in golden matrix; do
    mkdir "$work/$set" && cd "$work/$set"
    case ${1-} in
        "")
            make_$set
            rm -rf "${here:?}/$set"
            cp -r "$work/$set" "$here/$set"
            echo "made $(ls "$here/$set"/*.qcow2 | wc -l) images, $(du -sh --apparent-size "$here/$set" | cut -f 1), in $set/"
            ;;
        --check)
            # A checkout may have made holes, which `map` would tell.
            cp --sparse=never "$here/$set"/*.qcow2 "$here/$set"/*.raw .
            describe_all
            compare $set "$work/$set" "its images"
            rm -rf "${work:?}/$set" && mkdir "$work/$set" && cd "$work/$set"
            make_$set
            compare $set "$work/$set" "images made anew"
            echo "$set/ agrees with $(qemu-img --version | head -n 1)"
            ;;
        *)
            echo "usage: make.sh [--check]" >&2
            exit 2
            ;;
    esac
done
