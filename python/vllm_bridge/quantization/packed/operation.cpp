// The operation `packed_grouped_matmul` without Python, for as many tokens as the kernels multiply at
// once: a token goes through a hundred products, and each call of Python's counts. All else is left
// to Python, by the same name with `_any`.

#include "stable.h"

namespace {

// As `Grouped` of `weights.h`.
using Grouped = std::array<int64_t, 11>;

// The kernels and what they are told, as `operation.py` says.
void (*grouped_matmul)(const Grouped*, int64_t bits, const void* x, int64_t tokens, int64_t type,
                       void* out, const float* added, int64_t tiles, int64_t threads);
int64_t (*grouped_matmul_rounded)(const Grouped*, int64_t bits, const void* x, int64_t tokens,
                                  void* out, int64_t threads);
int64_t has_tiles, few_tokens;

constexpr int64_t BFLOAT16 = 1;

int64_t address(const Tensor& tensor) {
  return reinterpret_cast<int64_t>(tensor.const_data_ptr());
}

bool is_plain(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::BFloat16 && tensor.is_contiguous();
}

Tensor matmul(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& zeros,
              int64_t bits, bool rounded) {
  const int64_t columns = x.sizes().back(), tokens = columns ? x.numel() / columns : 0;
  const bool is_rounded = rounded && grouped_matmul_rounded;
  if (!grouped_matmul || (tokens > few_tokens && !is_rounded) || !is_plain(x) ||
      !is_plain(scales) || !is_plain(zeros) || !packed.is_contiguous())
    return by_python("vllm_bridge::packed_grouped_matmul_any", x, packed, scales, zeros, bits,
                     rounded);
  const int64_t rows = packed.size(0), groups = scales.size(1);
  const Grouped weights{address(packed), packed.size(1), rows, columns, address(scales),
                        address(zeros), BFLOAT16, scales.size(0), groups, columns / groups,
                        zeros.numel() > 1};
  const Tensor product = empty(x, rows);
  const int64_t threads = torch::stable::get_num_threads();
  if (is_rounded && grouped_matmul_rounded(&weights, bits, x.const_data_ptr(), tokens,
                                           product.mutable_data_ptr(), threads))
    return product;
  if (tokens > few_tokens)
    return by_python("vllm_bridge::packed_grouped_matmul_any", x, packed, scales, zeros, bits,
                     false);
  grouped_matmul(&weights, bits, x.const_data_ptr(), tokens, BFLOAT16, product.mutable_data_ptr(),
                 nullptr, has_tiles, threads);
  return product;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vllm_bridge, CPU, library) {
  library.impl("packed_grouped_matmul", TORCH_BOX(&matmul));
}

extern "C" void packed_use(decltype(grouped_matmul) kernel,
                           decltype(grouped_matmul_rounded) rounded, int64_t tiles, int64_t few) {
  grouped_matmul = kernel;
  grouped_matmul_rounded = rounded;
  has_tiles = tiles;
  few_tokens = few;
}
