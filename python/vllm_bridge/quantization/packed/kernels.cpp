// Products with packed weights, and the weights as plain numbers: what `grouped.py` and `tables.py`
// describe, for CPUs. `native.py` compiles it for the CPU that it runs on.
//
// A tile of a few rows is decoded to a buffer that stays in the first cache, in the numbers that
// the activations have, and multiplied with all tokens; sums are of float32.

#include "rounded.h"
#include "tiles.h"

namespace {

// `added`, where there is any, is added before sums are rounded. `tiles` says whether the processor's
// tiles may be used.
template <int BITS, class T, class Weights>
void matmul(const Weights& weights, const T* x, int64_t tokens, T* out, const float* added,
            bool tiles, int threads) {
  using Number = typename Product<T>::Number;
  constexpr int64_t LANES = Product<T>::LANES;
  const int64_t rows = weights.rows, columns = weights.columns, stride = padded(columns);
#ifdef VECTORS
  constexpr bool MAY_SPREAD = BITS == 4 && std::is_same<T, bfloat16>::value;
  const bool is_spread = MAY_SPREAD && weights.spreads();
#else
  constexpr bool MAY_SPREAD = false, is_spread = false;
#endif
  // Rows of tokens end at a multiple of STEP, with zeros.
  Number* numbers = allocate<Number>(tokens * stride);
  for (int64_t t = 0; t < tokens; ++t) {
    const T* token = x + t * columns;
    Number* to = numbers + t * stride;
    if constexpr (MAY_SPREAD)
      if (is_spread) {
        spread_columns(token, columns, to);
        continue;
      }
    for (int64_t k = 0; k < stride; ++k) to[k] = convert<Number>(k < columns ? token[k] : T{});
  }
  const bool is_direct = is_spread && tokens <= SPREAD_TOKENS;
#ifdef TILES
  if constexpr (std::is_same<T, bfloat16>::value)
    if (tiles && !is_direct) {
      matmul_tiles<BITS>(weights, numbers, tokens, stride, is_spread, out, added, threads);
      return std::free(numbers);
    }
#endif
  const int64_t block = block_of(columns);
#pragma omp parallel num_threads(threads)
  {
    T* decoded = allocate<T>(TILE * APART);
    Number* tile = std::is_same<T, Number>::value ? reinterpret_cast<Number*>(decoded)
                                                  : allocate<Number>(TILE * APART);
    float* sums = allocate<float>(TILE * tokens * LANES);
    std::memset(static_cast<void*>(decoded), 0, TILE * APART * sizeof(T));
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += TILE) {
      const int64_t height = rows - first < TILE ? rows - first : TILE;
      int64_t places[TILE];
      for (int64_t r = 0; r < height; ++r) places[r] = weights.ordered(first + r);
      std::memset(sums, 0, TILE * tokens * LANES * sizeof(float));
      if constexpr (MAY_SPREAD)
        for (int64_t r = 0; is_direct && r < height; ++r)
          multiply_spread(weights, places[r], numbers, tokens, sums + r * tokens * LANES);
      for (int64_t k = 0; !is_direct && k < columns; k += block) {
        const int64_t last = columns - k < block ? columns : k + block;
        for (int64_t r = 0; r < height; ++r)
          decode_row<BITS>(weights, places[r], k, last, is_spread, decoded + r * APART);
        if (!std::is_same<T, Number>::value)
          for (int64_t i = 0; i < TILE * APART; ++i) tile[i] = convert<Number>(decoded[i]);
        Product<T>::multiply(tile, numbers + k, stride, padded(last - k), sums, tokens);
      }
      for (int64_t t = 0; t < tokens; ++t) {
        float totals[TILE];
        Product<T>::totals(sums + t * LANES, tokens, totals);
        store_totals<TILE>(totals, places, height, added ? added + t * rows : nullptr,
                           out + t * rows);
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
               void* out, const float* added, int64_t tiles, int64_t threads) {
  of_bits(bits, [&](auto count) {
    of_type(type, out, [&](auto* to) {
      matmul<decltype(count)::value>(weights, static_cast<decltype(to)>(const_cast<void*>(x)),
                                     tokens, to, added, tiles, threads);
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

// Whether activations can be rounded for integers of so many bits in groups of so many columns.
int64_t can_round(int64_t bits, int64_t group) {
#ifdef ROUNDED
  return (bits == 2 || bits == 4 || bits == 8) && width_of(group);
#endif
  return 0;
}

// Whether there are tiles.
int64_t has_tiles() {
#ifdef TILES
  return 1;
#else
  return 0;
#endif
}

void grouped_matmul(const Grouped* weights, int64_t bits, const void* x, int64_t tokens, Type type,
                    void* out, const float* added, int64_t tiles, int64_t threads) {
  matmul_of(*weights, bits, x, tokens, type, out, added, tiles, threads);
}

void grouped_dequantize(const Grouped* weights, int64_t bits, int64_t first, int64_t last,
                        Type type, void* out, int64_t threads) {
  dequantize_of(*weights, bits, first, last, type, out, threads);
}

// Of activations in bfloat16. Where they cannot be rounded nothing is computed, and it is 0.
int64_t grouped_matmul_rounded(const Grouped* weights, int64_t bits, const void* x, int64_t tokens,
                               void* out, int64_t threads) {
  if (!can_round(bits, weights->group)) return 0;
#ifdef ROUNDED
  const auto* from = static_cast<const bfloat16*>(x);
  auto* to = static_cast<bfloat16*>(out);
  switch (bits) {
    case 2: matmul_rounded<2>(*weights, from, tokens, to, threads); break;
    case 4: matmul_rounded<4>(*weights, from, tokens, to, threads); break;
    default: matmul_rounded<8>(*weights, from, tokens, to, threads);
  }
#endif
  return 1;
}

void tables_matmul(const Tables* weights, int64_t bits, const void* x, int64_t tokens, Type type,
                   void* out, const float* added, int64_t tiles, int64_t threads) {
  matmul_of(*weights, bits, x, tokens, type, out, added, tiles, threads);
}

void tables_dequantize(const Tables* weights, int64_t bits, int64_t first, int64_t last, Type type,
                       void* out, int64_t threads) {
  dequantize_of(*weights, bits, first, last, type, out, threads);
}
}
