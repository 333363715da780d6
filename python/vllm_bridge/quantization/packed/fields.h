// Fields of bits in rows, as integers and as numbers.
//
// With AVX-512's bfloat16 and byte instructions, fields of any number of bits take two instructions
// for 32 weights. Anywhere else the same is written in plain C++.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && defined(__AVX512BW__) && \
    defined(__AVX512VL__) && defined(__AVX512F__)
#define VECTORS 1
#include <immintrin.h>
#endif

#include "numbers.h"

namespace {

// As in `native.py`.
enum Type : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

inline float element(const void* values, Type type, int64_t index) {
  switch (type) {
    case BFLOAT16:
      return to_float(static_cast<const bfloat16*>(values)[index]);
    case FLOAT16:
      return to_float(static_cast<const float16*>(values)[index]);
    default:
      return static_cast<const float*>(values)[index];
  }
}

// Weights that are decoded at once. Buffers end at a multiple of it, with zeros.
constexpr int64_t STEP = 32;

// The integers from column `first`, as many as STEP; those beyond the last column are anything.
template <int BITS>
inline void fields(const uint8_t* row, int64_t stride, int64_t first, int32_t* out) {
  for (int64_t eight = 0; eight < STEP; eight += 8) {
    const int64_t start = (first + eight) * BITS / 8;
    uint64_t bits = 0;
    if (start < stride)
      std::memcpy(&bits, row + start, start + BITS <= stride ? BITS : stride - start);
    for (int i = 0; i < 8; ++i) out[eight + i] = (bits >> (BITS * i)) & ((1u << BITS) - 1);
  }
}

#ifdef VECTORS
// Has memory that is read soon fetched meanwhile. By itself a processor looks no further than to the
// end of a page, which is a few rows.
inline void prefetch(const uint8_t* bytes) {
  _mm_prefetch(reinterpret_cast<const char*>(bytes), _MM_HINT_T0);
}

// How far ahead of what is decoded: a page.
constexpr int64_t AHEAD = 4096;

// The same, each in the low bits of a word; above them is anything.
template <int BITS>
struct Fields {
  // Where each byte of four fields in a row comes from.
  struct Places {
    alignas(64) uint8_t gather[64] = {}, shift[64] = {};

    constexpr Places() {
      for (int quad = 0; quad < 8; ++quad)
        for (int byte = 0; byte < 8; ++byte) {
          const int offset = 4 * BITS * quad;
          gather[8 * quad + byte] = (offset / 8 + byte) & 31;
          shift[8 * quad + byte] = offset % 8 + BITS * (byte / 2) + 8 * (byte % 2);
        }
    }
  };
  static constexpr Places places{};

  const __m512i gather = _mm512_load_si512(places.gather);
  const __m512i shift = _mm512_load_si512(places.shift);

  // From `bytes`, of which there are `left` in the row.
  __m512i at(const uint8_t* bytes, int64_t left) const {
    // Fewer bits are read in too many parts of what is fetched at once.
    if constexpr (BITS > 2) prefetch(bytes + AHEAD);
    const auto* from = reinterpret_cast<const __m256i*>(bytes);
    const __m256i loaded = left >= 32 ? _mm256_loadu_si256(from)
                                      : _mm256_maskz_loadu_epi8((1u << left) - 1, from);
    if constexpr (BITS == 8) return _mm512_cvtepu8_epi16(loaded);
    const __m512i gathered = _mm512_permutexvar_epi8(gather, _mm512_castsi256_si512(loaded));
    return _mm512_multishift_epi64_epi8(shift, gathered);
  }
};

inline __m512 load(const void* values, Type type, int64_t index, __mmask16 mask = 0xffff) {
  switch (type) {
    case BFLOAT16: {
      const auto* at = static_cast<const uint16_t*>(values) + index;
      const __m256i words = _mm256_maskz_loadu_epi16(mask, at);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    }
    case FLOAT16: {
      const auto* at = static_cast<const uint16_t*>(values) + index;
      return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, at));
    }
    default:
      return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(values) + index);
  }
}

// Which fourth of a vector a word is in.
inline __m256i quarters() {
  return _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
}

inline __m512i lanes() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// The fields as numbers.
template <int BITS>
inline void numbers(__m512i fields, __m512& low, __m512& high) {
  const __m512i integers = _mm512_and_si512(fields, _mm512_set1_epi16((1 << BITS) - 1));
  low = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(integers)));
  high = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(integers, 1)));
}

// Thirty-two numbers, rounded.
inline void store(bfloat16* out, __m512 low, __m512 high) {
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

inline void store(float16* out, __m512 low, __m512 high) {
  auto* at = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(at, _mm512_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
  _mm256_storeu_si256(at + 1, _mm512_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
}

inline void store(float* out, __m512 low, __m512 high) {
  _mm512_storeu_ps(out, low);
  _mm512_storeu_ps(out + 16, high);
}
#endif

}  // namespace
