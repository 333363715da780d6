// Products with activations that are rounded to 8 bits, as llama.cpp's are and vLLM's own for
// integers of 4 bits: by AVX-512's VNNI, which multiplies twice as many of them at a time as of
// bfloat16.
//
// Sixteen rows lie side by side: a vector has four columns of each. So many are there where a
// register has 32 bits of each row and its fields are moved to the low ones. That takes columns out
// of their order, into which activations are brought.

#pragma once

#include "products.h"

#if defined(VECTORS) && defined(__AVX512VNNI__)
#define ROUNDED 1
#endif

namespace {

#ifdef ROUNDED
constexpr int64_t LANES = 16;
// Rows that are multiplied at once, and tokens that are rounded at once.
constexpr int64_t BAND = 2 * LANES, CHUNK = 256;
// At most so many columns of a band are decoded at a time.
constexpr int64_t SPAN = 512;

// How many columns share a scale of the activations: those of a group, or a part of them. 0 for
// groups that have no such part.
inline int64_t width_of(int64_t group) {
  int64_t width = 128;
  while (width >= 32 && group % width) width /= 2;
  return width < 32 ? 0 : width;
}

// Columns as they are after the fields of 32 bits were moved: the first of each byte, then the second.
template <int BITS>
inline __m128i order() {
  alignas(16) int8_t places[16];
  constexpr int FIELDS = 8 / BITS;
  for (int place = 0; place < 16; ++place) {
    const int in = place % (4 * FIELDS);
    places[place] = place - in + in / 4 + in % 4 * FIELDS;
  }
  return _mm_load_si128(reinterpret_cast<const __m128i*>(places));
}

// A token: integers of 8 bits, of each `width` the scale that makes numbers of them, and the sum of
// these numbers.
template <int BITS>
void round_token(const bfloat16* x, int64_t columns, int64_t width, int8_t* integers, float* scales,
                 float* sums) {
  const __m128i places = order<BITS>();
  const auto at = [&](int64_t k) { return load(x, BFLOAT16, k); };
  for (int64_t first = 0; first < columns; first += width) {
    // As integers, of which NaN are the largest.
    __m512i most = _mm512_setzero_si512();
    for (int64_t k = first; k < first + width; k += LANES)
      most = _mm512_max_epi32(most, (__m512i)_mm512_abs_ps(at(k)));
    const int32_t bits = _mm512_reduce_max_epi32(most);
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? 127 / largest : 0);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = first; k < first + width; k += LANES) {
      const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(at(k), inverse));
      sum = _mm512_add_epi32(sum, rounded);
      _mm_store_si128(reinterpret_cast<__m128i*>(integers + k),
                      _mm_shuffle_epi8(_mm512_cvtepi32_epi8(rounded), places));
    }
    *scales = largest / 127;
    *sums++ = *scales++ * _mm512_reduce_add_epi32(sum);
  }
}

// A matrix of sixteen vectors, mirrored at its diagonal.
inline void transpose(__m512i* rows) {
  __m512i other[LANES];
  for (int i = 0; i < 16; i += 2) {
    other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = _mm512_unpacklo_epi64(other[i + j], other[i + j + 2]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(other[i + j], other[i + j + 2]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      other[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0x88);
      other[i + j + 4] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    rows[j] = _mm512_shuffle_i32x4(other[j], other[j + 8], 0x88);
    rows[j + 8] = _mm512_shuffle_i32x4(other[j], other[j + 8], 0xdd);
  }
}

// Columns of LANES rows from `first` to `last`, whole words of 32 bits, to every second vector.
template <int BITS>
void decode_band(const Grouped& weights, const int64_t* places, int64_t first, int64_t last,
                 uint8_t* out) {
  constexpr int64_t FIELDS = 8 / BITS, WORD = 32 / BITS;
  const __m512i field = _mm512_set1_epi8((1 << BITS) - 1);
  for (int64_t k = first; k < last; k += LANES * WORD) {
    const int64_t words = (last - k) / WORD < LANES ? (last - k) / WORD : LANES;
    __m512i rows[LANES];
    for (int r = 0; r < LANES; ++r) {
      const uint8_t* at = weights.row(places[r]) + k * BITS / 8;
      // What the next band has there, where rows are in their order.
      prefetch(at + BAND * weights.stride);
      rows[r] = _mm512_maskz_loadu_epi32((1u << words) - 1, at);
    }
    transpose(rows);
    for (int64_t word = 0; word < words; ++word)
      for (int i = 0; i < FIELDS; ++i, out += 4 * BAND)
        _mm512_store_si512(out,
                           _mm512_and_si512(_mm512_srli_epi32(rows[word], i * BITS), field));
  }
}

// What the columns that share a scale of the activations are multiplied with.
struct Scales {
  alignas(64) float scales[BAND];
  // Times the scales.
  alignas(64) float zeros[BAND];
};

// Those of LANES rows for the columns from `first` to `last`.
inline void scales_of(const Grouped& weights, const int64_t* places, int64_t first, int64_t last,
                      int64_t width, int64_t lane, Scales* out) {
  const int64_t group = first / weights.group, groups = (last - 1) / weights.group - group + 1;
  const auto of = [&](const void* values, __m512i* rows) {
    for (int r = 0; r < LANES; ++r) {
      const int64_t place = places[r] % weights.period * weights.groups + group;
      rows[r] = (__m512i)load(values, weights.type, place, (1u << groups) - 1);
    }
    transpose(rows);
  };
  __m512i scales[LANES], zeros[LANES];
  of(weights.scales, scales);
  if (weights.zeros_step) of(weights.zeros, zeros);
  const __m512 zero = _mm512_set1_ps(element(weights.zeros, weights.type, 0));
  for (int64_t k = first; k < last; k += width, ++out) {
    const int64_t place = k / weights.group - group;
    const __m512 scale = (__m512)scales[place];
    _mm512_store_ps(out->scales + lane, scale);
    _mm512_store_ps(out->zeros + lane,
                    _mm512_mul_ps(scale, weights.zeros_step ? (__m512)zeros[place] : zero));
  }
}

// Adds to `totals`, BAND for each token, the products of decoded columns with N tokens.
template <int N>
void multiply_rounded(const uint8_t* band, const Scales* of_band, const int8_t* integers,
                      int64_t stride, const float* scales, const float* sums, int64_t widths,
                      int64_t count, int64_t width, float* totals) {
  __m512 total[2][N];
  for (int t = 0; t < N; ++t)
    for (int i = 0; i < 2; ++i) total[i][t] = _mm512_load_ps(totals + t * BAND + i * LANES);
  for (int64_t one = 0; one < count; ++one, ++of_band) {
    __m512i sum[2][N] = {};
    for (int64_t k = 0; k < width; k += 4, band += 4 * BAND, integers += 4) {
      const __m512i low = _mm512_load_si512(band), high = _mm512_load_si512(band + 4 * LANES);
      for (int t = 0; t < N; ++t) {
        int32_t four;
        std::memcpy(&four, integers + t * stride, sizeof four);
        const __m512i token = _mm512_set1_epi32(four);
        sum[0][t] = _mm512_dpbusd_epi32(sum[0][t], low, token);
        sum[1][t] = _mm512_dpbusd_epi32(sum[1][t], high, token);
      }
    }
    for (int i = 0; i < 2; ++i) {
      const __m512 scale = _mm512_load_ps(of_band->scales + i * LANES);
      const __m512 zero = _mm512_load_ps(of_band->zeros + i * LANES);
      for (int t = 0; t < N; ++t) {
        const __m512 whole = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[i][t]),
                                           _mm512_set1_ps(scales[t * widths + one]));
        total[i][t] = _mm512_fnmadd_ps(zero, _mm512_set1_ps(sums[t * widths + one]),
                                       _mm512_fmadd_ps(whole, scale, total[i][t]));
      }
    }
  }
  for (int t = 0; t < N; ++t)
    for (int i = 0; i < 2; ++i) _mm512_store_ps(totals + t * BAND + i * LANES, total[i][t]);
}

template <int BITS>
void matmul_rounded(const Grouped& weights, const bfloat16* x, int64_t tokens, bfloat16* out,
                    int threads) {
  const int64_t rows = weights.rows, columns = weights.columns;
  const int64_t width = width_of(weights.group), widths = columns / width;
  const int64_t span = SPAN / width * width;
  const int64_t most = tokens < CHUNK ? tokens : CHUNK;
  int8_t* integers = allocate<int8_t>(most * columns);
  float *scales = allocate<float>(most * widths), *sums = allocate<float>(most * widths);
#pragma omp parallel num_threads(threads)
  {
    uint8_t* band = allocate<uint8_t>(SPAN * BAND);
    Scales* of_band = allocate<Scales>(SPAN / 32);
    float* totals = allocate<float>(most * BAND);
    for (int64_t start = 0; start < tokens; start += CHUNK) {
      const int64_t count = tokens - start < CHUNK ? tokens - start : CHUNK;
#pragma omp for schedule(static)
      for (int64_t t = 0; t < count; ++t)
        round_token<BITS>(x + (start + t) * columns, columns, width, integers + t * columns,
                          scales + t * widths, sums + t * widths);
#pragma omp for schedule(static)
      for (int64_t first = 0; first < rows; first += BAND) {
        const int64_t height = rows - first < BAND ? rows - first : BAND;
        int64_t places[BAND];
        // Beyond the last row the last one is computed again.
        for (int64_t r = 0; r < BAND; ++r)
          places[r] = weights.ordered(first + (r < height ? r : height - 1));
        std::memset(totals, 0, count * BAND * sizeof(float));
        for (int64_t k = 0; k < columns; k += span) {
          const int64_t last = columns - k < span ? columns : k + span;
          for (int64_t lane = 0; lane < BAND; lane += LANES) {
            decode_band<BITS>(weights, places + lane, k, last, band + 4 * lane);
            scales_of(weights, places + lane, k, last, width, lane, of_band);
          }
          abreast(count, [&](int64_t t, auto n) {
            multiply_rounded<decltype(n)::value>(
                band, of_band, integers + t * columns + k, columns,
                scales + t * widths + k / width, sums + t * widths + k / width, widths,
                (last - k) / width, width, totals + t * BAND);
          });
        }
        for (int64_t t = 0; t < count; ++t)
          store_totals<BAND>(totals + t * BAND, places, height, nullptr,
                             out + (start + t) * rows);
      }
    }
    std::free(totals);
    std::free(of_band);
    std::free(band);
  }
  std::free(sums);
  std::free(scales);
  std::free(integers);
}
#endif

}  // namespace
