#!/usr/bin/env bash
# What bench/gpu.sh needs on a machine without network, into bench/carried/ (some 20 MB; git ignores it):
#
#     bench/gpu_carry.sh [IMAGES]
#
# wheels for Python 3.12 on x86-64 (gpu-wheels.txt), and 200 + 100 images of each class of CIFAR-10, where IMAGES has them
# as train/CLASS/ and test/CLASS/.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
rm -rf carried && mkdir -p carried/wheels
platforms=()
for tag in manylinux_2_28 manylinux_2_17 manylinux2014; do platforms+=(--platform "${tag}_x86_64"); done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" --dest carried/wheels --requirement gpu-wheels.txt
if [ $# -gt 0 ]; then
  for part in train:200 test:100; do
    for class in "$1/${part%:*}"/*/; do
      target=carried/cifar10/${part%:*}/$(basename "$class")
      mkdir -p "$target"
      find "$class" -type f | sort | sed -n "1,${part#*:}p" | xargs -d '\n' cp -t "$target"
    done
  done
fi
du -sh carried/*
