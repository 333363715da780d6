// Products by AMX, Intel's instructions for tiles of a matrix, sixteen rows of 64 bytes each.

#pragma once

#include "products.h"

#if defined(VECTORS) && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define TILES 1
#endif

namespace {

#ifdef TILES
constexpr int64_t SIDE = 16;

// What the registers are like in this thread; afterwards, as they were. Whoever else uses AMX in it
// may take them to be as they left them.
class Registers {
 public:
  Registers() {
    _tile_storeconfig(&before_);
    Config config{};
    config.palette = 1;
    for (int tile = 0; tile < 8; ++tile) config.bytes[tile] = 64, config.rows[tile] = SIDE;
    _tile_loadconfig(&config);
  }
  ~Registers() { _tile_loadconfig(&before_); }

 private:
  struct alignas(64) Config {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  Config before_;
};

// The numbers of all tokens as tiles: of each SIDE tokens one for each STEP columns, with a row for
// every two of them.
inline bfloat16* tiles_of(const bfloat16* numbers, int64_t tokens, int64_t stride) {
  const int64_t blocks = (tokens + SIDE - 1) / SIDE;
  bfloat16* tiles = allocate<bfloat16>(blocks * SIDE * stride);
  const __m512i places = _mm512_mullo_epi32(lanes(), _mm512_set1_epi32(stride / 2));
  bfloat16* to = tiles;
  for (int64_t first = 0; first < tokens; first += SIDE) {
    const __mmask16 mask = tokens - first < SIDE ? (1u << (tokens - first)) - 1 : 0xffff;
    const bfloat16* from = numbers + first * stride;
    for (int64_t k = 0; k < stride; k += 2, to += 2 * SIDE)
      _mm512_store_si512(to, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, places,
                                                         from + k, 4));
  }
  return tiles;
}

// Adds the products of SIDE rows with N times SIDE tokens to sums, a tile for each SIDE tokens. The
// tiles of the next tokens are `stride` further.
template <int N>
void multiply_tiles(const bfloat16* rows, const bfloat16* x, int64_t stride, int64_t count,
                    float* sums) {
  constexpr int64_t TILE_SIZE = SIDE * SIDE;
  _tile_loadd(0, sums, 64);
  if constexpr (N > 1) _tile_loadd(1, sums + TILE_SIZE, 64);
  if constexpr (N > 2) _tile_loadd(2, sums + 2 * TILE_SIZE, 64);
  if constexpr (N > 3) _tile_loadd(3, sums + 3 * TILE_SIZE, 64);
  for (int64_t k = 0; k < count; k += STEP) {
    const bfloat16* tokens = x + k * SIDE;
    _tile_loadd(4, rows + k, APART * sizeof(bfloat16));
    _tile_loadd(5, tokens, 64);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (N > 1) {
      _tile_loadd(6, tokens + stride, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (N > 2) {
      _tile_loadd(7, tokens + 2 * stride, 64);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (N > 3) {
      _tile_loadd(5, tokens + 3 * stride, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, sums, 64);
  if constexpr (N > 1) _tile_stored(1, sums + TILE_SIZE, 64);
  if constexpr (N > 2) _tile_stored(2, sums + 2 * TILE_SIZE, 64);
  if constexpr (N > 3) _tile_stored(3, sums + 3 * TILE_SIZE, 64);
}

// As `matmul`, of which `numbers` are the tokens.
template <int BITS, class Weights>
void matmul_tiles(const Weights& weights, const bfloat16* numbers, int64_t tokens, int64_t stride,
                  bool is_spread, bfloat16* out, const float* added, int threads) {
  const int64_t rows = weights.rows, columns = weights.columns, block = block_of(columns);
  const int64_t blocks = (tokens + SIDE - 1) / SIDE;
  bfloat16* x = tiles_of(numbers, tokens, stride);
#pragma omp parallel num_threads(threads)
  {
    const Registers registers;
    bfloat16* decoded = allocate<bfloat16>(SIDE * APART);
    float* sums = allocate<float>(blocks * SIDE * SIDE);
    std::memset(static_cast<void*>(decoded), 0, SIDE * APART * sizeof(bfloat16));
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += SIDE) {
      const int64_t height = rows - first < SIDE ? rows - first : SIDE;
      int64_t places[SIDE];
      for (int64_t r = 0; r < height; ++r) places[r] = weights.ordered(first + r);
      std::memset(sums, 0, blocks * SIDE * SIDE * sizeof(float));
      for (int64_t k = 0; k < columns; k += block) {
        const int64_t last = columns - k < block ? columns : k + block, count = padded(last - k);
        for (int64_t r = 0; r < height; ++r)
          decode_row<BITS>(weights, places[r], k, last, is_spread, decoded + r * APART);
        for (int64_t t = 0; t < blocks; t += 4) {
          const bfloat16* of = x + t * SIDE * stride + k * SIDE;
          float* sum = sums + t * SIDE * SIDE;
          switch (blocks - t) {
            case 1: multiply_tiles<1>(decoded, of, SIDE * stride, count, sum); break;
            case 2: multiply_tiles<2>(decoded, of, SIDE * stride, count, sum); break;
            case 3: multiply_tiles<3>(decoded, of, SIDE * stride, count, sum); break;
            default: multiply_tiles<4>(decoded, of, SIDE * stride, count, sum);
          }
        }
      }
      const __m512i column = _mm512_slli_epi32(lanes(), 4);
      for (int64_t t = 0; t < tokens; ++t) {
        float totals[SIDE];
        const float* from = sums + t / SIDE * SIDE * SIDE + t % SIDE;
        _mm512_storeu_ps(totals, _mm512_i32gather_ps(column, from, 4));
        store_totals<SIDE>(totals, places, height, added ? added + t * rows : nullptr,
                           out + t * rows);
      }
    }
    std::free(sums);
    std::free(decoded);
  }
  std::free(x);
}
#endif

}  // namespace
