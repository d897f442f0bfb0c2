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

// Before GCC 12 on x86-64 and GCC 13 on Arm, C++ has no _Float16.
#if defined(SKILLFAST_SOFT_HALF)
#elif defined(__aarch64__)
typedef __fp16 half;
#elif defined(__FLT16_MAX__) && (__GNUC__ >= 12 || defined(__clang__))
typedef _Float16 half;
#else
#define SKILLFAST_SOFT_HALF
#endif
#ifdef SKILLFAST_SOFT_HALF
struct half {
  uint16_t bits;
};
#endif

static inline float to_float(float value) { return value; }
static inline double to_float(double value) { return value; }
static inline float to_float(half value) {
#ifdef SKILLFAST_SOFT_HALF
  uint32_t bits = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  result *= 0x1p112f;  // the exponent's bias: right for numbers below the smallest normal one, too
  std::memcpy(&bits, &result, sizeof(bits));
  if ((value.bits & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  bits |= static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
#else
  return static_cast<float>(value);
#endif
}
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

#ifdef SKILLFAST_SOFT_HALF
template <>
inline half from_float<half>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  uint32_t result;
  if (bits > 0x7f800000u) {
    result = 0x7e00u;
  } else if (bits >= 0x477ff000u) {  // rounds to 65,536 or more
    result = 0x7c00u;
  } else if (bits < 0x38800000u) {  // below the smallest normal number: the addition rounds
    float shifted;
    std::memcpy(&shifted, &bits, sizeof(shifted));
    shifted += 0.5f;
    std::memcpy(&result, &shifted, sizeof(result));
    result -= 0x3f000000u;
  } else {
    result = (bits + 0xc8000fffu + ((bits >> 13) & 1u)) >> 13;
  }
  return half{static_cast<uint16_t>(result | sign)};
}
#endif

// Calls run(T(), S()) with the type of activations and the one that they are summed in.
template <typename Run>
static inline void by_type(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::float32:
      return run(float(), float());
    case DType::bfloat16:
      return run(bf16(), float());
    case DType::float16:
      return run(half(), float());
    case DType::float64:
      return run(double(), double());
  }
}

void neuron_scale_rows(const NeuronScaleArgs& args, int64_t begin, int64_t end);  // rows of [batch * tokens]
void comoments_lanes(const CoMomentsArgs& args, int64_t begin, int64_t end);      // neurons
void bins_lanes(const BinsArgs& args, int64_t begin, int64_t end);                // neurons
void act_pool_items(const ActPoolArgs& args, int64_t begin, int64_t end);         // samples times panels
void act_pool_accumulate_lanes(const ActPoolAccumulateArgs& args, int64_t begin, int64_t end);  // neurons

}  // namespace skillfast::SKILLFAST_ISA
