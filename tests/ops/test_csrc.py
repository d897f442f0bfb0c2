"""The C++ builds where this machine's compiler is not: older compilers without _Float16, and Arm."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

SOURCES = [
    ROOT / "csrc" / "cpu" / f"{name}.cpp"
    for name in ("neuron_scale", "comoments", "bins", "act_mask_pool", "act_pool_accumulate")
]


def compile_all(compiler, *flags):
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-DSKILLFAST_ISA=baseline"]
    for source in SOURCES:
        subprocess.run(
            [*command, *flags, f"-I{ROOT / 'csrc'}", "-fsyntax-only", source],
            check=True,
            capture_output=True,
            text=True,
        )


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_without_float16():
    compile_all("g++", "-DSKILLFAST_SOFT_HALF")


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="no cross compiler for aarch64")
def test_on_arm():
    compile_all("aarch64-linux-gnu-g++")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_half_precision_in_software_is_exact(tmp_path):
    """Every float16 and many floats, against the compiler's own _Float16."""
    source = tmp_path / "half.cpp"
    source.write_text("""
#define SKILLFAST_SOFT_HALF
#define SKILLFAST_ISA soft
#include "cpu/isa.h"
#include <cmath>
#include <random>
#ifndef __FLT16_MAX__
int main() { return 77; }
#else
int main() {
  using namespace skillfast::soft;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    half mine{(uint16_t)bits};
    _Float16 theirs;
    std::memcpy(&theirs, &mine, 2);
    const float x = to_float(mine), y = (float)theirs;
    if (!(x == y || (std::isnan(x) && std::isnan(y))) || std::signbit(x) != std::signbit(y)) return 1;
  }
  std::mt19937 random(0);
  for (int i = 0; i < 20000000; ++i) {
    const uint32_t u = random();
    float value = std::ldexp(1.0f + (u & 0xffffff) / 16777216.0f, (int)(u >> 24) % 48 - 30);
    if (i % 2) std::memcpy(&value, &u, 4);
    const half mine = from_float<half>(value);
    const _Float16 theirs = (_Float16)value;
    uint16_t bits;
    std::memcpy(&bits, &theirs, 2);
    if (std::isnan(value) ? (mine.bits & 0x7fff) <= 0x7c00 : mine.bits != bits) return 2;
  }
  return 0;
}
#endif
""")
    program = tmp_path / "half"
    subprocess.run(["g++", "-O2", "-std=c++17", f"-I{ROOT / 'csrc'}", source, "-o", program], check=True)
    code = subprocess.run([program], check=False).returncode
    if code == 77:
        pytest.skip("this compiler has no _Float16 to compare with")
    assert code == 0


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_cuda_tables_are_counted_in_shared_memory(tmp_path):
    """For Hopper: no spills, a block's 1,024 threads fit, and atomics are those of shared memory where tables are."""
    triton = pytest.importorskip("triton")
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    binary = tmp_path / "bins.cubin"
    command = ["nvcc", "-arch=sm_90", "-std=c++17", "-O3", "-Xptxas", "-v", "-DSKILLFAST_HAS_CUDA", "-cubin"]
    done = subprocess.run(
        [*command, f"-I{ROOT / 'csrc'}", "-o", str(binary), str(ROOT / "csrc" / "cuda" / "bins.cu")],
        check=True,
        capture_output=True,
        text=True,
    )
    told = done.stdout + done.stderr
    registers = [int(found) for found in re.findall(r"Used (\d+) registers", told)]
    assert len(registers) == 8  # four types, in shared memory or not
    assert max(registers) <= 56
    assert set(re.findall(r"(\d+) bytes spill", told)) == {"0"}
    sass = subprocess.run([str(disassembler), "-c", str(binary)], check=True, capture_output=True, text=True).stdout
    kernels = sass.split("\n.text.")[1:]
    assert len(kernels) == 8
    for kernel in kernels:
        in_shared = "Lb1EEEv" in kernel.split(":")[0]
        atomics = set(re.findall(r"\b(ATOMS|ATOMG|ATOM|RED|REDG)\b\.", kernel))
        assert atomics == ({"ATOMS"} if in_shared else {"REDG"})
        assert len(re.findall(r"\bBAR\.SYNC", kernel)) == 2  # before the first tile, and one for each
