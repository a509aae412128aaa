#!/bin/sh
# Create .venv with the locked packages: the CUDA build of vLLM where nvidia-smi answers, the CPU
# build otherwise; BUILD=cuda or BUILD=cpu says which. Does nothing when .venv is as the locks say.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3
driver_needed=580 # by CUDA 13, which the packages of cuda.lock are built for

here=$(cut -d' ' -f1 .venv/r3mes-setup.packages 2>/dev/null) || here=
if driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null); then
  build=cuda
else
  build=cpu driver=
fi
case ${BUILD:-} in
  cuda | cpu) build=$BUILD driver= ;;
  ?*)
    echo "error: BUILD=$BUILD is neither cuda nor cpu" >&2
    exit 1
    ;;
esac
if [ "${BUILD:-} $build $here" = " cpu cuda" ]; then
  echo "nvidia-smi does not answer: .venv keeps the CUDA build; BUILD=cpu make setup replaces it" >&2
  build=cuda
fi
lock=requirements/$build.lock
packages="$build $(cat $lock requirements/setup.sh | sha256sum)"
project=$(sha256sum <pyproject.toml)
total=$(grep -c '==' $lock)

exec 9>.venv.lock
flock 9 2>/dev/null || true # another make in this checkout is setting up: wait for it
[ "$(cat .venv/r3mes-setup 2>/dev/null)" != "$packages $project" ] || exit 0

install() { # pip install ARGUMENTS into $venv, counting the packages
  $venv/bin/python -m pip --disable-pip-version-check install --no-deps --progress-bar off \
    "$@" >>$venv/setup.log 2>&1 9>&- &
  pip=$!
  trap 'kill $pip; exit 130' INT TERM
  while kill -0 $pip 2>/dev/null; do
    [ ! -t 1 ] || printf '\r  %s packages: %s fetched, %s installed' "$total" \
      "$(grep -cE '^(Collecting|Processing)' $venv/setup.log)" \
      "$(find $venv/lib -name '*.dist-info' | wc -l)"
    sleep 1
  done
  [ ! -t 1 ] || printf '\r\033[K'
  wait $pip
}
try() {
  install "$@" || {
    tail -n 20 $venv/setup.log >&2
    echo "error: pip could not install the packages; all that it said is in $venv/setup.log" >&2
    exit 1
  }
}

if [ "$(cat .venv/r3mes-setup.packages 2>/dev/null)" = "$packages" ]; then
  venv=.venv
  try --no-build-isolation --editable .
  echo "$packages $project" >.venv/r3mes-setup
  exit 0
fi

"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
  echo "error: Python 3.11 is needed, found $("$python" --version 2>&1)" >&2
  echo "  try: apt-get install python3.11-venv; where there is none, as in Ubuntu 24.04:" >&2
  echo '       uv python install 3.11, then PYTHON=$(uv python find 3.11) make setup' >&2
  exit 1
}
case ${driver%%.*} in
  "" | *[!0-9]*) ;;
  *)
    [ "${driver%%.*}" -ge $driver_needed ] || {
      echo "error: the NVIDIA driver is ${driver%%.*}, and CUDA 13 needs $driver_needed or later" >&2
      echo "  try: upgrade it, or rent a machine that has it, or BUILD=cpu make setup;" >&2
      echo "       BUILD=cuda make setup does not look at the driver" >&2
      exit 1
    }
    ;;
esac
echo "setting up .venv with the $build build of vLLM: $total packages, a few minutes, once"
# An environment of the other build, or a half-made one, is not mended but replaced: CUDA-built
# torchvision, torchaudio, torchcodec and triton beside the CPU build break 'import vllm'. It is made
# beside the one that is there, which a node may run from, and then takes its place.
venv=.venv.new
rm -rf $venv .venv.old
"$python" -m venv $venv --prompt .venv || {
  rm -rf $venv
  echo "  try: apt-get install python3.11-venv" >&2
  exit 1
}

if [ $build = cpu ]; then
  # PyPI has no CPU build of torch. pip's own configuration may know one; PyTorch's index does.
  install torch==2.13.0+cpu ||
    try --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
fi
try --require-hashes --requirement $lock
try --no-build-isolation --editable .
echo "$packages" >$venv/r3mes-setup.packages
echo "$packages $project" >$venv/r3mes-setup
# Scripts begin with the path of their Python.
"$python" - $venv .venv <<'END'
import os, pathlib, sys

was, becomes = (os.path.abspath(it).encode() for it in sys.argv[1:])
for file in (*pathlib.Path(sys.argv[1], "bin").iterdir(), pathlib.Path(sys.argv[1], "pyvenv.cfg")):
    if file.is_file() and not file.is_symlink() and was in (held := file.read_bytes()):
        file.write_bytes(held.replace(was, becomes))
END
if [ -e .venv ] || [ -L .venv ]; then mv .venv .venv.old; fi
mv $venv .venv
rm -rf .venv.old
