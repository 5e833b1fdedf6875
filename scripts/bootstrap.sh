#!/usr/bin/env bash
# Installs what cargo itself needs before it can build anything: a C linker, and a C++ compiler for the fuzz targets.
# Everything else is found and installed by `cargo xtask setup`.
set -euo pipefail

if command -v cc >/dev/null && command -v c++ >/dev/null; then
    exit 0
fi
packages="gcc g++ libc6-dev"
if ! command -v apt-get >/dev/null; then
    echo "cc or c++ is missing; install what Debian calls: $packages" >&2
    exit 1
fi
if [ "$(id -u)" != 0 ]; then
    echo "cc or c++ is missing; run this, then try again:" >&2
    echo "  sudo apt-get update && sudo apt-get install -y --no-install-recommends $packages" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
# shellcheck disable=SC2086
apt-get install -q -y --no-install-recommends $packages
