// Products with packed weights, and the weights as plain numbers: what `grouped.py` and `tables.py`
// describe, for CPUs. `native.py` compiles it for the CPU that it runs on.
//
// A tile of a few rows is decoded to a buffer that stays in the first cache, in the numbers that
// the activations have, and multiplied with all tokens; sums are of float32. With AVX-512's
// bfloat16 and byte instructions, fields of any number of bits take two instructions for 32
// weights, and those of up to five bits become bfloat16 by one look-up in a table of the group's
// values. Anywhere else the same is written in plain C++.

#include <cstdint>
#include <cstdlib>
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

// So many columns of a tile are decoded at a time.
constexpr int64_t BLOCK = 1024;
// Rows of a tile.
constexpr int64_t TILE = 8;
// Weights that are decoded at once. Buffers end at a multiple of it, with zeros.
constexpr int64_t STEP = 32;

// ------------------------------------------------------------------------------------- fields

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
    const auto* from = reinterpret_cast<const __m256i*>(bytes);
    const __m256i loaded = left >= 32 ? _mm256_loadu_si256(from)
                                      : _mm256_maskz_loadu_epi8((1u << left) - 1, from);
    if constexpr (BITS == 8) return _mm512_cvtepu8_epi16(loaded);
    const __m512i gathered = _mm512_permutexvar_epi8(gather, _mm512_castsi256_si512(loaded));
    return _mm512_multishift_epi64_epi8(shift, gathered);
  }
};

inline __m512 load(const void* values, Type type, int64_t index) {
  switch (type) {
    case BFLOAT16: {
      const auto* at = static_cast<const uint16_t*>(values) + index;
      const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    }
    case FLOAT16: {
      const auto* at = static_cast<const uint16_t*>(values) + index;
      return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    }
    default:
      return _mm512_loadu_ps(static_cast<const float*>(values) + index);
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

// ------------------------------------------------------------------------------------- weights

// Numbers of 4 bits are decoded fastest in another order: in each so many columns, every fourth
// one follows, from the first, then from the second and so on. Activations are brought into it.
constexpr int64_t SPREAD = 128;

inline int64_t spread_column(int64_t place) {
  return place / SPREAD * SPREAD + place % 32 * 4 + place % SPREAD / 32;
}

struct Rows {
  const uint8_t* packed;
  int64_t stride, rows, columns;

  const uint8_t* row(int64_t n) const { return packed + n * stride; }
};

#ifdef VECTORS
template <class Use>
inline void look_up(const uint8_t* bytes, int64_t k, __m512i table, const Use& use) {
  const __m512i words = _mm512_loadu_si512(bytes + k / 2);
  use(k, _mm512_permutexvar_epi16(words, table),
      _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table),
      _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table),
      _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table));
}
#endif

// Of each row a function that decodes columns of it: from `first`, a multiple of STEP, to `last`,
// which is one too or the end of the row. What is written is a multiple of STEP as well.
//
// `spread` calls `use` with the values of each SPREAD columns, as four vectors in that order. A word
// has four numbers, and where a vector of them is shifted each looks up a value with its low bits.
struct Grouped : Rows {
  const void *scales, *zeros;
  Type type;
  int64_t period, groups, group;
  int64_t zeros_step;  // 0 where one zero point is for all

  // The row that is computed as the `i`th: those that share their groups follow each other.
  int64_t ordered(int64_t i) const {
    const int64_t sharing = rows / period;
    return rows % period ? i : i % sharing * period + i / sharing;
  }

  template <int BITS, class T>
  void decode(int64_t n, int64_t first, int64_t last, T* out) const {
    const uint8_t* bytes = row(n);
    const int64_t base = n % period * groups;
#ifdef VECTORS
    const Fields<BITS> fields;
    const uint8_t *at = bytes + first * BITS / 8, *end = bytes + stride;
    if (groups > 1 && group % STEP) return decode_small<BITS>(n, first, last, out);
    int64_t place = base + first / group, next = (first / group + 1) * group;
    for (int64_t k = first; k < last; ++place, next += group) {
      const __m512 scale = _mm512_set1_ps(element(scales, type, place));
      const __m512 zero = _mm512_set1_ps(element(zeros, type, place * zeros_step));
      const int64_t until = next < last ? next : last;
      if constexpr (BITS <= 5 && std::is_same<T, bfloat16>::value) {
        // Five bits of a word are looked up, so that a smaller table is there repeatedly.
        const __m512i numbers = _mm512_and_epi32(lanes(), _mm512_set1_epi32((1 << BITS) - 1));
        const __m512 low = _mm512_cvtepi32_ps(numbers);
        const __m512 high = BITS < 5 ? low : _mm512_add_ps(low, _mm512_set1_ps(16));
        const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(
            _mm512_mul_ps(_mm512_sub_ps(high, zero), scale),
            _mm512_mul_ps(_mm512_sub_ps(low, zero), scale));
        for (; k < until; k += STEP, at += 4 * BITS)
          _mm512_storeu_si512(out + (k - first),
                              _mm512_permutexvar_epi16(fields.at(at, end - at), table));
      } else {
        for (; k < until; k += STEP, at += 4 * BITS) {
          __m512 low, high;
          numbers<BITS>(fields.at(at, end - at), low, high);
          store(out + (k - first), _mm512_mul_ps(_mm512_sub_ps(low, zero), scale),
                _mm512_mul_ps(_mm512_sub_ps(high, zero), scale));
        }
      }
    }
#else
    for (int64_t k = first; k < last; k += STEP) {
      int32_t integers[STEP];
      fields<BITS>(bytes, stride, k, integers);
      for (int64_t i = 0; i < STEP;) {
        const int64_t column = k + i < columns ? k + i : columns - 1;
        const float scale = element(scales, type, base + column / group);
        const float zero = element(zeros, type, (base + column / group) * zeros_step);
        const int64_t next = (column / group + 1) * group - k;
        const int64_t end = next < STEP && k + next < columns ? next : STEP;
        for (; i < end; ++i)
          out[k - first + i] = from_float<T>((integers[i] - zero) * scale);
      }
    }
#endif
  }

#ifdef VECTORS
  bool spreads() const {
    const bool is_simple = groups == 1 || group % SPREAD == 0;
    return columns % SPREAD == 0 && (is_simple || group == 64 || group == 32);
  }

  template <class Use>
  void spread(int64_t n, int64_t first, int64_t last, const Use& use) const {
    const uint8_t* bytes = row(n);
    int64_t place = n % period * groups + first / group;
    if (groups > 1 && group < SPREAD) {
      // A word looks up what is of its group: 16 values of each are in two vectors.
      const int64_t count = SPREAD / group;
      const __m512i of_lane = _mm512_slli_epi16(_mm512_cvtepi8_epi16(quarters()), 4);
      const __m512i number = _mm512_set1_epi16(15);
      for (int64_t k = first; k < last; k += SPREAD, place += count) {
        const __m512i low = values(place, place + (count == 4));
        const __m512i high = values(place + count / 2, place + count - 1);
        const __m512i words = _mm512_loadu_si512(bytes + k / 2);
        const auto at = [&](__m512i shifted) {
          const __m512i index = _mm512_or_si512(_mm512_and_si512(shifted, number), of_lane);
          return _mm512_permutex2var_epi16(low, index, high);
        };
        use(k, at(words), at(_mm512_srli_epi16(words, 4)), at(_mm512_srli_epi16(words, 8)),
            at(_mm512_srli_epi16(words, 12)));
      }
      return;
    }
    for (int64_t k = first; k < last; ++place) {
      const __m512i table = values(place, place);
      const int64_t next = (k / group + 1) * group, until = next < last ? next : last;
      for (; k < until; k += SPREAD) look_up(bytes, k, table, use);
    }
  }

  // The 16 values of numbers of 4 bits in two groups.
  __m512i values(int64_t place, int64_t other) const {
    const __m512 number = _mm512_cvtepi32_ps(lanes());
    const auto of = [&](int64_t at) {
      const __m512 zero = _mm512_set1_ps(element(zeros, type, at * zeros_step));
      return _mm512_mul_ps(_mm512_sub_ps(number, zero),
                           _mm512_set1_ps(element(scales, type, at)));
    };
    const __m512 low = of(place);
    return (__m512i)_mm512_cvtne2ps_pbh(other == place ? low : of(other), low);
  }

  // Groups of fewer columns than are decoded at once.
  template <int BITS, class T>
  void decode_small(int64_t n, int64_t first, int64_t last, T* out) const {
    const Fields<BITS> fields;
    const uint8_t *at = row(n) + first * BITS / 8, *end = row(n) + stride;
    const int64_t base = n % period * groups;
    for (int64_t k = first; k < last; k += STEP, at += 4 * BITS) {
      __m512 half[2];
      numbers<BITS>(fields.at(at, end - at), half[0], half[1]);
      for (int i = 0; i < 2; ++i) {
        const int64_t start = k + 16 * i;
        __m512 scale, zero;
        if (group == 1 && start + 16 <= columns) {
          scale = load(scales, type, base + start);
          zero = zeros_step ? load(zeros, type, base + start)
                            : _mm512_set1_ps(element(zeros, type, 0));
        } else {
          alignas(64) float each[2][16] = {};
          for (int64_t j = 0; j < 16 && start + j < columns;) {
            const int64_t place = (start + j) / group, next = (place + 1) * group - start;
            for (; j < next && j < 16; ++j) {
              each[0][j] = element(scales, type, base + place);
              each[1][j] = element(zeros, type, (base + place) * zeros_step);
            }
          }
          scale = _mm512_load_ps(each[0]);
          zero = _mm512_load_ps(each[1]);
        }
        half[i] = _mm512_mul_ps(_mm512_sub_ps(half[i], zero), scale);
      }
      store(out + (k - first), half[0], half[1]);
    }
  }
#endif
};

struct Tables : Rows {
  const void* tables;
  Type type;

  int64_t ordered(int64_t i) const { return i; }

#ifdef VECTORS
  bool spreads() const { return columns % SPREAD == 0; }

  template <class Use>
  void spread(int64_t n, int64_t first, int64_t last, const Use& use) const {
    bfloat16 table[32];
    for (int i = 0; i < 32; ++i)
      table[i] = from_float<bfloat16>(element(tables, type, n * 16 + i % 16));
    const __m512i values = _mm512_loadu_si512(table);
    for (int64_t k = first; k < last; k += SPREAD) look_up(row(n), k, values, use);
  }
#endif

  template <int BITS, class T>
  void decode(int64_t n, int64_t first, int64_t last, T* out) const {
    T table[32 > (1 << BITS) ? 32 : 1 << BITS];
    for (int i = 0; i < 32 || i < (1 << BITS); ++i)
      table[i] = from_float<T>(element(tables, type, (n << BITS) + (i & ((1 << BITS) - 1))));
#ifdef VECTORS
    if constexpr (BITS <= 5 && sizeof(T) == 2) {
      const Fields<BITS> fields;
      const __m512i values = _mm512_loadu_si512(table);
      const uint8_t *at = row(n) + first * BITS / 8, *end = row(n) + stride;
      for (int64_t k = first; k < last; k += STEP, at += 4 * BITS)
        _mm512_storeu_si512(out + (k - first),
                            _mm512_permutexvar_epi16(fields.at(at, end - at), values));
      return;
    }
#endif
    for (int64_t k = first; k < last; k += STEP) {
      int32_t numbers[STEP];
      fields<BITS>(row(n), stride, k, numbers);
      for (int64_t i = 0; i < STEP; ++i) out[k - first + i] = table[numbers[i]];
    }
  }
};

// ------------------------------------------------------------------------------------ products

template <class T>
T* allocate(int64_t count) {
  return static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
}

int64_t padded(int64_t columns) { return (columns + STEP - 1) / STEP * STEP; }

// Multiplies a block of a tile, rows of BLOCK numbers, with all tokens, whose rows are `stride`
// apart, and adds to sums: LANES for each row and token.
template <class T>
struct Product {
  using Number = float;
  static constexpr int64_t LANES = 1;

  static void multiply(const float* tile, const float* x, int64_t stride, int64_t count,
                       float* sums, int64_t tokens) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t r = 0; r < TILE; r += 4) {
        const float *w = tile + r * BLOCK, *token = x + t * stride;
        float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
        for (int64_t k = 0; k < count; ++k) {
          a += w[k] * token[k];
          b += w[BLOCK + k] * token[k];
          c += w[2 * BLOCK + k] * token[k];
          d += w[3 * BLOCK + k] * token[k];
        }
        float* sum = sums + r * tokens + t;
        sum[0] += a;
        sum[tokens] += b;
        sum[2 * tokens] += c;
        sum[3 * tokens] += d;
      }
  }

  static float total(const float* sum) { return *sum; }
};

#ifdef VECTORS
template <>
struct Product<bfloat16> {
  using Number = bfloat16;
  static constexpr int64_t LANES = 16;

  static void multiply(const bfloat16* tile, const bfloat16* x, int64_t stride, int64_t count,
                       float* sums, int64_t tokens) {
    if (tokens == 1) return some<TILE, 1>(tile, x, stride, count, sums, tokens);
    // As many as there are registers for.
    for (int64_t t = 0, left = (tokens + 5) / 6; t < tokens; --left) {
      const int64_t taken = (tokens - t + left - 1) / left;
      for (int64_t r = 0; r < TILE; r += 4) {
        const bfloat16 *w = tile + r * BLOCK, *token = x + t * stride;
        float* sum = sums + (r * tokens + t) * LANES;
        switch (taken) {
          case 1: some<4, 1>(w, token, stride, count, sum, tokens); break;
          case 2: some<4, 2>(w, token, stride, count, sum, tokens); break;
          case 3: some<4, 3>(w, token, stride, count, sum, tokens); break;
          case 4: some<4, 4>(w, token, stride, count, sum, tokens); break;
          case 5: some<4, 5>(w, token, stride, count, sum, tokens); break;
          default: some<4, 6>(w, token, stride, count, sum, tokens);
        }
      }
      t += taken;
    }
  }

  static float total(const float* sum) { return _mm512_reduce_add_ps(_mm512_load_ps(sum)); }

 private:
  template <int R, int N>
  static void some(const bfloat16* tile, const bfloat16* x, int64_t stride, int64_t count,
                   float* sums, int64_t tokens) {
    __m512 sum[R][N];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < N; ++t) sum[r][t] = _mm512_load_ps(sums + (r * tokens + t) * LANES);
    for (int64_t k = 0; k < count; k += STEP) {
      __m512bh w[R];
      for (int r = 0; r < R; ++r) w[r] = (__m512bh)_mm512_load_si512(tile + r * BLOCK + k);
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
// The products of one row with one token, without a tile between.
template <class Weights>
float multiply_spread(const Weights& weights, int64_t n, const bfloat16* x) {
  __m512 sum[4] = {};
  const auto add = [&](int i, __m512i values, const bfloat16* of) {
    sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)values,
                              (__m512bh)_mm512_load_si512(of + i * STEP));
  };
  weights.spread(n, 0, weights.columns, [&](int64_t k, __m512i a, __m512i b, __m512i c, __m512i d) {
    add(0, a, x + k);
    add(1, b, x + k);
    add(2, c, x + k);
    add(3, d, x + k);
  });
  return _mm512_reduce_add_ps(
      _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}
#endif

// `added`, where there is any, is added before sums are rounded.
template <int BITS, class T, class Weights>
void matmul(const Weights& weights, const T* x, int64_t tokens, T* out, const float* added,
            int threads) {
  using Number = typename Product<T>::Number;
  constexpr int64_t LANES = Product<T>::LANES;
  const int64_t rows = weights.rows, columns = weights.columns, stride = padded(columns);
#ifdef VECTORS
  constexpr bool MAY_SPREAD = BITS == 4 && std::is_same<T, bfloat16>::value;
  const bool is_spread = MAY_SPREAD && weights.spreads();
#else
  constexpr bool is_spread = false;
#endif
  // Rows of tokens end at a multiple of STEP, with zeros.
  Number* numbers = allocate<Number>(tokens * stride);
  for (int64_t t = 0; t < tokens; ++t) {
    const T* token = x + t * columns;
    Number* to = numbers + t * stride;
    if (is_spread)
      for (int64_t k = 0; k < stride; ++k) to[k] = convert<Number>(token[spread_column(k)]);
    else
      for (int64_t k = 0; k < stride; ++k) to[k] = convert<Number>(k < columns ? token[k] : T{});
  }
#pragma omp parallel num_threads(threads)
  {
    T* decoded = allocate<T>(TILE * BLOCK);
    Number* tile = std::is_same<T, Number>::value ? reinterpret_cast<Number*>(decoded)
                                                  : allocate<Number>(TILE * BLOCK);
    float* sums = allocate<float>(TILE * tokens * LANES);
    std::memset(static_cast<void*>(decoded), 0, TILE * BLOCK * sizeof(T));
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += TILE) {
      const int64_t height = rows - first < TILE ? rows - first : TILE;
#ifdef VECTORS
      if constexpr (MAY_SPREAD)
        if (is_spread && tokens == 1) {
          for (int64_t r = 0; r < height; ++r) {
            const int64_t n = weights.ordered(first + r);
            const float sum = multiply_spread(weights, n, numbers);
            out[n] = from_float<T>(added ? sum + added[n] : sum);
          }
          continue;
        }
#endif
      std::memset(sums, 0, TILE * tokens * LANES * sizeof(float));
      for (int64_t k = 0; k < columns; k += BLOCK) {
        const int64_t last = columns - k < BLOCK ? columns : k + BLOCK;
        for (int64_t r = 0; r < height; ++r) {
          const int64_t n = weights.ordered(first + r);
          T* to = decoded + r * BLOCK;
#ifdef VECTORS
          if constexpr (MAY_SPREAD)
            if (is_spread) {
              weights.spread(n, k, last,
                             [&](int64_t at, __m512i a, __m512i b, __m512i c, __m512i d) {
                               T* four = to + (at - k);
                               _mm512_store_si512(four, a);
                               _mm512_store_si512(four + STEP, b);
                               _mm512_store_si512(four + 2 * STEP, c);
                               _mm512_store_si512(four + 3 * STEP, d);
                             });
              continue;
            }
#endif
          weights.template decode<BITS>(n, k, last, to);
        }
        if (!std::is_same<T, Number>::value)
          for (int64_t i = 0; i < TILE * BLOCK; ++i) tile[i] = convert<Number>(decoded[i]);
        Product<T>::multiply(tile, numbers + k, stride, padded(last - k), sums, tokens);
      }
      for (int64_t r = 0; r < height; ++r) {
        const int64_t n = weights.ordered(first + r);
        for (int64_t t = 0; t < tokens; ++t) {
          const float sum = Product<T>::total(sums + (r * tokens + t) * LANES);
          out[t * rows + n] = from_float<T>(added ? sum + added[t * rows + n] : sum);
        }
      }
    }
    std::free(sums);
    if (!std::is_same<T, Number>::value) std::free(tile);
    std::free(decoded);
  }
  std::free(numbers);
}

// Rows from `first` to `last`, to `out`.
template <int BITS, class T, class Weights>
void dequantize(const Weights& weights, int64_t first, int64_t last, T* out, int threads) {
  const int64_t columns = weights.columns;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t n = first; n < last; ++n) {
    T* row = out + (n - first) * columns;
    // The last numbers are decoded beside it, because more are written than there are.
    const int64_t whole = columns / STEP * STEP;
    weights.template decode<BITS>(n, 0, whole, row);
    if (whole < columns) {
      T rest[STEP];
      weights.template decode<BITS>(n, whole, columns, rest);
      std::memcpy(row + whole, rest, (columns - whole) * sizeof(T));
    }
  }
}

template <class Call>
void of_bits(int64_t bits, const Call& call) {
  switch (bits) {
    case 1: return call(std::integral_constant<int, 1>{});
    case 2: return call(std::integral_constant<int, 2>{});
    case 3: return call(std::integral_constant<int, 3>{});
    case 4: return call(std::integral_constant<int, 4>{});
    case 5: return call(std::integral_constant<int, 5>{});
    case 6: return call(std::integral_constant<int, 6>{});
    case 7: return call(std::integral_constant<int, 7>{});
    default: return call(std::integral_constant<int, 8>{});
  }
}

template <class Call>
void of_type(Type type, void* out, const Call& call) {
  switch (type) {
    case BFLOAT16: return call(static_cast<bfloat16*>(out));
    case FLOAT16: return call(static_cast<float16*>(out));
    default: return call(static_cast<float*>(out));
  }
}

template <class Weights>
void matmul_of(const Weights& weights, int64_t bits, const void* x, int64_t tokens, Type type,
               void* out, const float* added, int64_t threads) {
  of_bits(bits, [&](auto count) {
    of_type(type, out, [&](auto* to) {
      matmul<decltype(count)::value>(weights, static_cast<decltype(to)>(const_cast<void*>(x)),
                                     tokens, to, added, threads);
    });
  });
}

template <class Weights>
void dequantize_of(const Weights& weights, int64_t bits, int64_t first, int64_t last, Type type,
                   void* out, int64_t threads) {
  of_bits(bits, [&](auto count) {
    of_type(type, out, [&](auto* to) {
      dequantize<decltype(count)::value>(weights, first, last, to, threads);
    });
  });
}
}  // namespace

extern "C" {

// Whether there are vectors for bfloat16.
int64_t has_vectors() {
#ifdef VECTORS
  return 1;
#else
  return 0;
#endif
}

void grouped_matmul(const Grouped* weights, int64_t bits, const void* x, int64_t tokens, Type type,
                    void* out, const float* added, int64_t threads) {
  matmul_of(*weights, bits, x, tokens, type, out, added, threads);
}

void grouped_dequantize(const Grouped* weights, int64_t bits, int64_t first, int64_t last,
                        Type type, void* out, int64_t threads) {
  dequantize_of(*weights, bits, first, last, type, out, threads);
}

void tables_matmul(const Tables* weights, int64_t bits, const void* x, int64_t tokens, Type type,
                   void* out, const float* added, int64_t threads) {
  matmul_of(*weights, bits, x, tokens, type, out, added, threads);
}

void tables_dequantize(const Tables* weights, int64_t bits, int64_t first, int64_t last, Type type,
                       void* out, int64_t threads) {
  dequantize_of(*weights, bits, first, last, type, out, threads);
}
}
