// Stands in for `kernels/device.cuh`: the same declarations, carried out by the host.
//
// Which lane holds which element of a matrix is drawn at random for each launch, since PTX does not say it. Loads and
// stores are each lane's own, as unordered as on a card.
#pragma once

#include <stdint.h>
#include <string.h>

#include "simt.h"

namespace fastdeit {

extern __shared__ __align__(32) unsigned char shared_memory[];

struct Half {
  unsigned short bits;
};

inline float to_float(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  if (magnitude < 0x400u) {  // subnormal: magnitude units of 2^-24
    const float size = magnitude * 0x1p-24f;
    return sign ? -size : size;
  }
  const uint32_t bits = sign | (magnitude < 0x7c00u ? (magnitude << 13) + 0x38000000u : (magnitude << 13) | 0x7f800000u);
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

inline Half to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7fffu;  // NaN, as the card makes it
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65,520 and more: infinite
  } else if (magnitude < 0x38800000u) {
    half = static_cast<uint32_t>(nearbyintf(fabsf(value) * 0x1p24f));  // subnormal
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<unsigned short>(sign | half)};
}

struct FragmentA {
  float x[8];
};

enum class Stored { by_rows, by_columns };

template <Stored stored>
struct FragmentB {
  float x[8];
};

struct Accumulator {
  float x[8];
};

inline void check_matrix(const void *pointer, int pitch, int element) {
  if (reinterpret_cast<uintptr_t>(pointer) % 32) simt::fail("a matrix in memory is not 32-byte aligned");
  if (pitch * element % 16) simt::fail("the pitch of a matrix in memory is not a multiple of 16 bytes");
}

inline void load(FragmentA &a, const Half *shared, int pitch) {
  check_matrix(shared, pitch, 2);
  for (int i = 0; i < 8; ++i) {
    const int at = simt::place(simt::kind_a, threadIdx.x % 32, i);
    a.x[i] = to_float(shared[at / 16 * pitch + at % 16]);
  }
}

template <Stored stored>
inline void load(FragmentB<stored> &b, const Half *shared, int pitch) {
  check_matrix(shared, pitch, 2);
  for (int i = 0; i < 8; ++i) {
    const int at = simt::place(simt::kind_b, threadIdx.x % 32, i);
    const int row = stored == Stored::by_rows ? at / 16 : at % 16, column = stored == Stored::by_rows ? at % 16 : at / 16;
    b.x[i] = to_float(shared[row * pitch + column]);
  }
}

inline void load(Accumulator &c, const float *shared, int pitch) {
  check_matrix(shared, pitch, 4);
  for (int i = 0; i < 8; ++i) {
    const int at = simt::place(simt::kind_c, threadIdx.x % 32, i);
    c.x[i] = shared[at / 16 * pitch + at % 16];
  }
}

inline void store(float *shared, const Accumulator &c, int pitch) {
  check_matrix(shared, pitch, 4);
  for (int i = 0; i < 8; ++i) {
    const int at = simt::place(simt::kind_c, threadIdx.x % 32, i);
    shared[at / 16 * pitch + at % 16] = c.x[i];
  }
}

template <Stored stored>
inline void multiply_add(Accumulator &c, const FragmentA &a, const FragmentB<stored> &b) {
  simt::multiply_add(c.x, a.x, b.x);
}

}  // namespace fastdeit
