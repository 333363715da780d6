// Sums of decoded weights with all tokens, a tile of a few rows at a time.

#pragma once

#include <cstdlib>

#include "weights.h"

namespace {

// At most so many columns of a tile are decoded at a time.
constexpr int64_t BLOCK = 2048;
// Rows of a tile, and how far they are apart: rows that were a multiple of 4 KiB apart would share
// their places in the first cache.
constexpr int64_t TILE = 8;
constexpr int64_t APART = BLOCK + STEP;
// Up to so many tokens are multiplied without a tile where rows are spread.
constexpr int64_t SPREAD_TOKENS = 4;

template <class T>
T* allocate(int64_t count) {
  return static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
}

int64_t padded(int64_t columns) { return (columns + STEP - 1) / STEP * STEP; }

// Calls for a few tokens at a time, as many as there are registers for and each time about as many:
// with the first of them, and how many they are as a type.
template <class Call>
inline void abreast(int64_t tokens, const Call& call) {
  for (int64_t t = 0, left = (tokens + 5) / 6; t < tokens; --left) {
    const int64_t taken = (tokens - t + left - 1) / left;
    switch (taken) {
      case 1: call(t, std::integral_constant<int, 1>{}); break;
      case 2: call(t, std::integral_constant<int, 2>{}); break;
      case 3: call(t, std::integral_constant<int, 3>{}); break;
      case 4: call(t, std::integral_constant<int, 4>{}); break;
      case 5: call(t, std::integral_constant<int, 5>{}); break;
      default: call(t, std::integral_constant<int, 6>{});
    }
    t += taken;
  }
}

// Multiplies a block of a tile with all tokens, whose rows are `stride` apart, and adds to sums: LANES
// for each row and token. `totals` are those of one token, by row.
template <class T>
struct Product {
  using Number = float;
  static constexpr int64_t LANES = 1;

  static void multiply(const float* tile, const float* x, int64_t stride, int64_t count,
                       float* sums, int64_t tokens) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t r = 0; r < TILE; r += 4) {
        const float *w = tile + r * APART, *token = x + t * stride;
        float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
        for (int64_t k = 0; k < count; ++k) {
          a += w[k] * token[k];
          b += w[APART + k] * token[k];
          c += w[2 * APART + k] * token[k];
          d += w[3 * APART + k] * token[k];
        }
        float* sum = sums + r * tokens + t;
        sum[0] += a;
        sum[tokens] += b;
        sum[2 * tokens] += c;
        sum[3 * tokens] += d;
      }
  }

  static void totals(const float* sums, int64_t tokens, float* out) {
    for (int64_t r = 0; r < TILE; ++r) out[r] = sums[r * tokens];
  }
};

#ifdef VECTORS
template <>
struct Product<bfloat16> {
  using Number = bfloat16;
  static constexpr int64_t LANES = 16;

  static void multiply(const bfloat16* tile, const bfloat16* x, int64_t stride, int64_t count,
                       float* sums, int64_t tokens) {
    if (tokens == 1) return some<TILE, 1>(tile, x, stride, count, sums, tokens);
    abreast(tokens, [&](int64_t t, auto n) {
      for (int64_t r = 0; r < TILE; r += 4)
        some<4, decltype(n)::value>(tile + r * APART, x + t * stride, stride, count,
                                    sums + (r * tokens + t) * LANES, tokens);
    });
  }

  // All rows at once: halves of the lanes are added until one is left of each.
  static void totals(const float* sums, int64_t tokens, float* out) {
    __m512 pair[4], quad[2];
    for (int r = 0; r < 4; ++r) {
      const __m512 a = _mm512_load_ps(sums + 2 * r * tokens * LANES);
      const __m512 b = _mm512_load_ps(sums + (2 * r + 1) * tokens * LANES);
      pair[r] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    for (int r = 0; r < 2; ++r) {
      const __m512 a = pair[2 * r], b = pair[2 * r + 1];
      quad[r] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    const __m512 twos = _mm512_add_ps(_mm512_unpacklo_ps(quad[0], quad[1]),
                                      _mm512_unpackhi_ps(quad[0], quad[1]));
    const __m512 ones = _mm512_add_ps(twos, _mm512_permute_ps(twos, 0x4e));
    const __m512i rows = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(rows, ones)));
  }

 private:
  template <int R, int N>
  static void some(const bfloat16* tile, const bfloat16* x, int64_t stride, int64_t count,
                   float* sums, int64_t tokens) {
    __m512 sum[R][N];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < N; ++t) sum[r][t] = _mm512_load_ps(sums + (r * tokens + t) * LANES);
    for (int64_t k = 0; k < count; k += STEP) {
      __m512bh w[R];
      for (int r = 0; r < R; ++r) w[r] = (__m512bh)_mm512_load_si512(tile + r * APART + k);
      for (int t = 0; t < N; ++t) {
        const __m512bh token = (__m512bh)_mm512_loadu_si512(x + t * stride + k);
        for (int r = 0; r < R; ++r) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], w[r], token);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < N; ++t) _mm512_store_ps(sums + (r * tokens + t) * LANES, sum[r][t]);
  }
};
#endif

#ifdef VECTORS
// The products of one row with a few tokens, without a tile between. Each token has several sums, so
// that none waits for the one before it.
template <int N, class Weights>
void multiply_spread(const Weights& weights, int64_t n, const bfloat16* x, float* sums) {
  constexpr int EACH = N == 1 ? 4 : 2;
  __m512 sum[N][EACH] = {};
  const int64_t columns = weights.columns;
  weights.spread(n, 0, columns, [&](int64_t k, __m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i values[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i)
      for (int t = 0; t < N; ++t) {
        const __m512i token = _mm512_load_si512(x + t * columns + k + i * STEP);
        sum[t][i % EACH] =
            _mm512_dpbf16_ps(sum[t][i % EACH], (__m512bh)values[i], (__m512bh)token);
      }
  });
  for (int t = 0; t < N; ++t) {
    for (int i = EACH / 2; i; i /= 2)
      for (int j = 0; j < i; ++j) sum[t][j] = _mm512_add_ps(sum[t][j], sum[t][i + j]);
    _mm512_store_ps(sums + t * Product<bfloat16>::LANES, sum[t][0]);
  }
}

template <class Weights>
void multiply_spread(const Weights& weights, int64_t n, const bfloat16* x, int64_t tokens,
                     float* sums) {
  switch (tokens) {
    case 1: return multiply_spread<1>(weights, n, x, sums);
    case 2: return multiply_spread<2>(weights, n, x, sums);
    case 3: return multiply_spread<3>(weights, n, x, sums);
    default: return multiply_spread<4>(weights, n, x, sums);
  }
}

template <class Weights>
void decode_spread(const Weights& weights, int64_t n, int64_t first, int64_t last, bfloat16* out) {
  weights.spread(n, first, last, [&](int64_t k, __m512i a, __m512i b, __m512i c, __m512i d) {
    bfloat16* to = out + (k - first);
    _mm512_store_si512(to, a);
    _mm512_store_si512(to + STEP, b);
    _mm512_store_si512(to + 2 * STEP, c);
    _mm512_store_si512(to + 3 * STEP, d);
  });
}
#endif

// Columns of a row, in order or spread.
template <int BITS, class T, class Weights>
void decode_row(const Weights& weights, int64_t n, int64_t first, int64_t last, bool is_spread,
                T* out) {
#ifdef VECTORS
  if constexpr (BITS == 4 && std::is_same<T, bfloat16>::value)
    if (is_spread) return decode_spread(weights, n, first, last, out);
#endif
  weights.template decode<BITS>(n, first, last, out);
}

// How many columns are decoded at a time: blocks have much the same width.
inline int64_t block_of(int64_t columns) {
  const int64_t blocks = (columns + BLOCK - 1) / BLOCK;
  return ((columns + blocks - 1) / blocks + SPREAD - 1) / SPREAD * SPREAD;
}

// What a token has of rows at `places`, of which there are at most HEIGHT. `added`, where there is
// any, is added before they are rounded.
template <int HEIGHT, class T>
void store_totals(float* totals, const int64_t* places, int64_t height, const float* added,
                  T* out) {
  if (added)
    for (int64_t r = 0; r < height; ++r) totals[r] += added[places[r]];
  bool is_whole = height == HEIGHT;
  for (int64_t r = 0; r < height; ++r) is_whole &= places[r] == places[0] + r;
  // In vectors.
  if (is_whole)
    for (int64_t r = 0; r < HEIGHT; ++r) out[places[0] + r] = from_float<T>(totals[r]);
  else
    for (int64_t r = 0; r < height; ++r) out[places[r]] = from_float<T>(totals[r]);
}

}  // namespace
