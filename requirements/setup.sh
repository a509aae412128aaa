#!/bin/sh
# Create .venv with the locked packages: the CUDA build of vLLM where nvidia-smi answers, the CPU
# build otherwise. Does nothing when .venv is as the locks say.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3

if nvidia-smi >/dev/null 2>&1; then build=cuda; else build=cpu; fi
lock=requirements/$build.lock
packages="$build $(cat $lock requirements/setup.sh | sha256sum)"
project=$(sha256sum <pyproject.toml)
stamp=.venv/r3mes-setup
log=.venv/setup.log
total=$(grep -c '==' $lock)

exec 9>.venv.lock
flock 9 2>/dev/null || true # another make in this checkout is setting up: wait for it
[ "$(cat $stamp 2>/dev/null)" != "$packages $project" ] || exit 0

install() { # pip install ARGUMENTS, counting the packages
  .venv/bin/python -m pip --disable-pip-version-check install --no-deps --progress-bar off \
    "$@" >>$log 2>&1 9>&- &
  pip=$!
  trap 'kill $pip; exit 130' INT TERM
  while kill -0 $pip 2>/dev/null; do
    [ ! -t 1 ] || printf '\r  %s packages: %s fetched, %s installed' "$total" \
      "$(grep -cE '^(Collecting|Processing)' $log)" "$(find .venv/lib -name '*.dist-info' | wc -l)"
    sleep 1
  done
  [ ! -t 1 ] || printf '\r\033[K'
  wait $pip
}
try() {
  install "$@" || {
    tail -n 20 $log >&2
    echo "error: pip could not install the packages; the whole of its output is in $log" >&2
    exit 1
  }
}

if [ "$(cat $stamp.packages 2>/dev/null)" = "$packages" ]; then
  try --no-build-isolation --editable .
  echo "$packages $project" >$stamp
  exit 0
fi

"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
  echo "error: Python 3.11 is needed, found $("$python" --version 2>&1)" >&2
  echo "  try: apt-get install python3.11-venv, or PYTHON=/path/to/python3.11 make demo" >&2
  exit 1
}
echo "setting up .venv with the $build build of vLLM: $total packages, a few minutes, once"
# An environment of the other build, or a half-made one, is not mended but replaced: CUDA-built
# torchvision, torchaudio, torchcodec and triton beside the CPU build break 'import vllm'.
rm -rf .venv
"$python" -m venv .venv || {
  rm -rf .venv
  echo "  try: apt-get install python3.11-venv" >&2
  exit 1
}

if [ $build = cpu ]; then
  # PyPI has no CPU build of torch. pip's own configuration may know one; PyTorch's index does.
  install torch==2.13.0+cpu ||
    try --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
fi
try --require-hashes --requirement $lock
echo "$packages" >$stamp.packages
try --no-build-isolation --editable .
echo "$packages $project" >$stamp
