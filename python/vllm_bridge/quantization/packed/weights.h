// Packed weights, as `grouped.py` and `tables.py` describe them, and how columns of a row become
// plain numbers. With vectors, fields of up to five bits become bfloat16 by one look-up in a table of
// the group's values.

#pragma once

#include "fields.h"

namespace {

// Numbers of 4 bits are decoded fastest in another order: in each so many columns, every fourth
// one follows, from the first, then from the second and so on. Activations are brought into it.
constexpr int64_t SPREAD = 128;

#ifdef VECTORS
inline void spread_columns(const bfloat16* x, int64_t columns, bfloat16* out) {
  // Of two vectors every fourth number, from the first one.
  const __m512i fourths = _mm512_cvtepu8_epi16(_mm256_setr_epi8(
      0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 0, 4, 8, 12, 16, 20, 24, 28, 32,
      36, 40, 44, 48, 52, 56, 60));
  for (int64_t k = 0; k < columns; k += SPREAD) {
    __m512i from[4];
    for (int i = 0; i < 4; ++i) from[i] = _mm512_loadu_si512(x + k + i * STEP);
    for (int i = 0; i < 4; ++i) {
      const __m512i places = _mm512_add_epi16(fourths, _mm512_set1_epi16(i));
      const __m512i low = _mm512_permutex2var_epi16(from[0], places, from[1]);
      const __m512i high = _mm512_permutex2var_epi16(from[2], places, from[3]);
      _mm512_store_si512(out + k + i * STEP, _mm512_shuffle_i64x2(low, high, 0x44));
    }
  }
}
#endif

struct Rows {
  const uint8_t* packed;
  int64_t stride, rows, columns;

  const uint8_t* row(int64_t n) const { return packed + n * stride; }
};

#ifdef VECTORS
template <class Use>
inline void look_up(const uint8_t* bytes, int64_t k, __m512i table, const Use& use) {
  prefetch(bytes + k / 2 + AHEAD);
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
        prefetch(bytes + k / 2 + AHEAD);
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
    int64_t k = first;
    if (group == SPREAD && type == BFLOAT16) {
      // Two groups at once: their scales lie side by side, and both tables are rounded together.
      for (; k + 2 * SPREAD <= last; k += 2 * SPREAD, place += 2) {
        const __m512i both = neighbours(place);
        look_up(bytes, k, _mm512_shuffle_i64x2(both, both, 0x44), use);
        look_up(bytes, k + SPREAD, _mm512_shuffle_i64x2(both, both, 0xee), use);
      }
    }
    for (; k < last; ++place) {
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

  // The same of a group and the next one, with values in bfloat16.
  __m512i neighbours(int64_t place) const {
    const __m512 number = _mm512_cvtepi32_ps(lanes());
    const auto at = [&](const void* values, int64_t index) {
      int32_t two;
      std::memcpy(&two, static_cast<const bfloat16*>(values) + index, sizeof two);
      return _mm512_set1_epi32(two);
    };
    const auto first = [](__m512i two) { return (__m512)_mm512_slli_epi32(two, 16); };
    const auto second = [](__m512i two) {
      return (__m512)_mm512_and_si512(two, _mm512_set1_epi32(0xffff0000));
    };
    const __m512i scale = at(scales, place);
    __m512 low, high;
    if (zeros_step) {
      const __m512i zero = at(zeros, place);
      low = _mm512_sub_ps(number, first(zero));
      high = _mm512_sub_ps(number, second(zero));
    } else {
      low = high = _mm512_sub_ps(number, _mm512_set1_ps(element(zeros, type, 0)));
    }
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(high, second(scale)),
                                        _mm512_mul_ps(low, first(scale)));
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

}  // namespace
