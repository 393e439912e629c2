#!/usr/bin/env bash
# Builds the Dockerfile where there is no docker engine, then deploy/show_image.py starts the image and looks inside.
#
#   sudo deploy/build-image.sh          with ONNX Runtime's CUDA provider
#   sudo deploy/build-image.sh cpu      without: the smaller image
#
# Needs Debian's buildah and debootstrap, root, and .venv (`make install`). The base is Debian itself, made by debootstrap
# and kept for the next time. Wheels are downloaded before the build, from whichever index pip is configured for here,
# so that nothing of that configuration gets into the image.
set -euo pipefail
cd "$(dirname "$0")/.."

RUNTIME=${1:-gpu}
IMAGE=localhost/specmoe:$RUNTIME
BASE=localhost/specmoe-base:bookworm
WHEELS=build/image/wheels

fail() {
    echo "$1" >&2
    exit 1
}

need() {
    [[ $RUNTIME =~ ^(gpu|cpu)$ ]] || fail "The runtime is gpu or cpu, not '$RUNTIME'."
    [ "$(id -u)" = 0 ] || fail "A build without a docker engine needs root: sudo $0"
    type -P buildah debootstrap >/dev/null || fail "Missing: apt-get install buildah debootstrap"
    [ -x .venv/bin/python ] || fail "There is no .venv: make install"
    mkdir -p "$WHEELS"
}

# Debian bookworm and its Python 3.11: from packages, what python:3.11-slim-bookworm is from an image.
make_base() {
    buildah inspect --type image "$BASE" >/dev/null 2>&1 && return
    echo "== making $BASE (two minutes, once)"
    local root scratch
    root=$(mktemp -d)
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$root" >build/image/base.log 2>&1 ||
        fail "debootstrap failed; build/image/base.log tells why."
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    scratch=$(buildah from scratch)
    buildah copy --quiet "$scratch" "$root" / >/dev/null
    buildah commit --quiet --rm "$scratch" "$BASE" >/dev/null 2>&1
    rm -rf "$root"
}

download_wheels() {
    echo "== downloading wheels"
    .venv/bin/python - >build/image/requirements.txt <<'END'
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
print(*project["build-system"]["requires"], *project["project"]["dependencies"], sep="\n")
END
    .venv/bin/python -m pip download --quiet --quiet --disable-pip-version-check --dest "$WHEELS" \
        --python-version 3.11 --only-binary :all: --constraint constraints.txt --requirement build/image/requirements.txt
}

build() {
    echo "== building $IMAGE"
    buildah build --isolation chroot --format docker --pull-never --target service --tag "$IMAGE" \
        --build-arg BASE="$BASE" --build-arg WHEELS="$WHEELS" --build-arg RUNTIME="$RUNTIME" . >build/image/build.log 2>&1 ||
        fail "The build failed; build/image/build.log tells why."
}

need
make_base
download_wheels
build
.venv/bin/python -u deploy/show_image.py "$IMAGE"
echo "== docker-archive for \`docker load\`: buildah push $IMAGE docker-archive:specmoe.tar"
