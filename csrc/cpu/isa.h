// What a kernel source needs to be compiled once per instruction set. No inline function of the standard library
// may be used where this is included: the linker would keep one copy of it, perhaps the one with AVX-512 in it.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__AVX512F__)
#define SKILLFAST_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SKILLFAST_VECTOR_BYTES 32
#else
#define SKILLFAST_VECTOR_BYTES 16
#endif

namespace skillfast::SKILLFAST_ISA {

struct bf16 {
  uint16_t bits;
};

static inline float to_float(float value) { return value; }
static inline double to_float(double value) { return value; }
static inline float to_float(_Float16 value) { return static_cast<float>(value); }
static inline float to_float(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

template <typename T>
static inline T from_float(float value) {
  return static_cast<T>(value);
}
template <typename T>
static inline T from_float(double value) {
  return static_cast<T>(value);
}
template <>
inline bf16 from_float<bf16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  // Round to nearest even; a NaN keeps its sign and stays quiet.
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return bf16{static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
}

void neuron_scale_rows(const NeuronScaleArgs& args, int64_t begin, int64_t end);  // rows of [batch * tokens]
void comoments_lanes(const CoMomentsArgs& args, int64_t begin, int64_t end);      // neurons
void cells_lanes(const CellsArgs& args, int64_t begin, int64_t end);              // neurons

}  // namespace skillfast::SKILLFAST_ISA
