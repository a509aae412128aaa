#!/bin/sh
# Resolve pyproject.toml anew into the two locks. Needs uv (pip install uv) and the package index;
# the CPU lock needs to see the CPU build of torch: lock.sh --torch-backend cpu
set -eu
cd "$(dirname "$0")"
for build in cpu cuda; do
  uv pip compile --no-config --no-header --no-annotate --generate-hashes \
    --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --override left-out.txt $([ $build = cuda ] || echo --override left-out-cpu.txt) \
    --no-emit-package r3mes-vllm $([ $build = cuda ] || echo --no-emit-package torch) \
    --extra $build --extra test ../pyproject.toml --output-file $build.lock "$@"
done
