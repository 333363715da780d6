// The numbers that torch's tensors have, and how they become others.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  _Float16 value;
};

inline float to_float(float value) { return value; }

inline float to_float(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline float to_float(float16 value) { return static_cast<float>(value.value); }

template <class T>
inline T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline bfloat16 from_float<bfloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  // No branch, so that loops are done in vectors.
  return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

template <>
inline float16 from_float<float16>(float value) {
  return {static_cast<_Float16>(value)};
}

template <class To, class From>
inline To convert(From value) {
  if constexpr (std::is_same<To, From>::value)
    return value;
  else
    return from_float<To>(to_float(value));
}

}  // namespace
