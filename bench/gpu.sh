#!/usr/bin/env bash
# Everything that a GPU has to say about skillfast, in ten minutes:
#
#     bench/gpu.sh OUT [SECONDS]        # 590 by default
#
# On a machine without network that has torch (CUDA), Triton, timm, transformers, pytest, pybind11, scikit-build-core,
# CMake, ninja and nvcc; the rest comes from bench/carried/, which bench/gpu_carry.sh fills before. OUT gets build.log,
# tests.log and gpu.json, which is written anew after each case; then: python bench/gpu_table.py OUT/gpu.json
# ARCH=90-real builds for Hopper. To try the script itself on a machine without a GPU:
# DEVICE=cpu TINY=--tiny CASES=copy,ops WHEELS=none SKILLFAST_CUDA=OFF WORKERS=0 bench/gpu.sh OUT
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
until=$(($(date +%s) + ${2:-590}))
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} device=${DEVICE:-cuda} site=${SITE:-$(mktemp -d)}
left() { echo $((until - $(date +%s))); }

# Into a folder of its own; what is there already is not installed again.
build() {
  if [ "${WHEELS:-}" != none ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" bench/carried/wheels/*.whl ||
      return
  fi
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-build-isolation --target "$site" \
    --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="${ARCH:-90-real}" \
    --config-settings=cmake.define.SKILLFAST_CUDA="${SKILLFAST_CUDA:-ON}" .
}
if ! build >"$out/build.log" 2>&1; then
  tail -n 30 "$out/build.log"
  exit 1
fi
export PYTHONPATH=$site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 MPLBACKEND=agg
export SKILLFAST_CACHE=$site/cache XDG_CACHE_HOME=$site/cache TRITON_CACHE_DIR=$site/triton
cd "$out" || exit 1  # else the checkout, which has no extension, comes before what was built
root=$OLDPWD
echo "built, $(left) s left"

# The tests that need a GPU, of the files that have some; they share it.
marked=$(cd "$root" && grep -rl 'mark\.gpu' tests --include='test_*.py' | sort)
(cd "$root" && exec timeout $(($(left) < 150 ? $(left) : 150)) "$python" -m pytest -q -n "${WORKERS:-8}" -m gpu \
  --rootdir "$root" -p no:cacheprovider $marked) >"$out/tests.log" 2>&1
echo "tests ended with $?: $(tail -n 1 "$out/tests.log"), $(left) s left"

# A process that dies leaves its case begun; the next one goes on behind it.
data=${DATA:-$root/bench/carried/cifar10}
for _ in 1 2 3 4; do
  "$python" "$root/bench/gpu.py" gpu.json --device "$device" ${TINY:-} ${CASES:+--cases "$CASES"} --data "$data" \
    --until "$until" && break
done
"$python" "$root/bench/gpu_table.py" gpu.json
