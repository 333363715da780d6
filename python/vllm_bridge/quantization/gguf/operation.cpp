// The operation `gguf_matmul` without Python, where `ggml.py` has made a graph: a token goes through
// a hundred products and more, and each call of Python's or torch's counts. All else is left to
// Python, as `gguf_matmul_any`.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <unordered_map>
#include <vector>

#include "../packed/numbers.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Both as in `operation.py`.
using Key = std::array<int64_t, 5>;

struct Product {
  void *graph, *plan;
  const void** weight;
  float *numbers, *result;
};

struct Hash {
  size_t operator()(const Key& key) const {
    size_t hash = 0;
    for (int64_t number : key) hash = hash * 1000003 ^ static_cast<size_t>(number);
    return hash;
  }
};

// A graph computes for one thread at a time.
thread_local std::unordered_map<Key, Product, Hash> products;

int (*ggml_graph_compute)(void* graph, void* plan);

template <class To, class From>
void convert(const From* from, To* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = ::convert<To>(from[i]);
}

template <class T>
void multiply(const Product& product, const Tensor& x, const Tensor& weight, const Tensor& result) {
  convert(static_cast<const T*>(x.const_data_ptr()), product.numbers, x.numel());
  *product.weight = weight.const_data_ptr();
  const int status = ggml_graph_compute(product.graph, product.plan);
  STD_TORCH_CHECK(status == 0, "ggml could not compute a product (status ", status, ")");
  convert(product.result, static_cast<T*>(result.mutable_data_ptr()), result.numel());
}

// `x` with rows of another length. As `torch::stable::new_empty`, which looks for the operation by
// its name each time.
Tensor empty(const Tensor& x, int64_t columns) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end()), strides(shape.size());
  shape.back() = columns;
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= shape[i]) strides[i] = stride;
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(), dtype,
                               aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

Tensor by_python(const Tensor& x, const Tensor& weight, int64_t type, bool exact) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(x), from(weight), from(type), from(exact)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("vllm_bridge::gguf_matmul_any", "",
                                                      stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor matmul(const Tensor& x, const Tensor& weight, int64_t type, bool exact) {
  const int64_t rows = weight.size(0), columns = x.sizes().back();
  const int64_t tokens = columns ? x.numel() / columns : 0;
  const int64_t threads = torch::stable::get_num_threads();
  const auto found = products.find({type, rows, columns, tokens, threads});
  if (exact || found == products.end() || !x.is_contiguous() || !weight.is_contiguous())
    return by_python(x, weight, type, exact);
  const Tensor result = empty(x, rows);
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      multiply<bfloat16>(found->second, x, weight, result);
      break;
    case ScalarType::Half:
      multiply<float16>(found->second, x, weight, result);
      break;
    case ScalarType::Float:
      multiply<float>(found->second, x, weight, result);
      break;
    default:
      return by_python(x, weight, type, exact);
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vllm_bridge, CPU, library) {
  library.impl("gguf_matmul", TORCH_BOX(&matmul));
}

extern "C" {

void gguf_keep(int (*compute)(void*, void*), const Key* key, const Product* product) {
  ggml_graph_compute = compute;
  products[*key] = *product;
}

void gguf_forget() { products.clear(); }
}
