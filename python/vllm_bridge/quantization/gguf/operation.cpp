// The operations `gguf_matmul`, `gguf_pair` and `gguf_normed` without Python, where `ggml.py` has made
// a graph: a token goes through a hundred products and more, and each call of Python's or torch's
// counts. All else is left to Python, by the same names with `_any`.

#include <cmath>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "../packed/numbers.h"
#include "../packed/stable.h"

namespace {

// All as in `operation.py`: what is computed, apart from the numbers, and by what.
using Key = std::array<int64_t, 8>;

enum Kind : int64_t { single, beside, gated };

constexpr int most = 2;

struct Product {
  void *graph, *plan;
  const void** weights[most];
  float *numbers, *results[most];
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

// Weights that `x` goes through.
struct Weights {
  std::array<const Tensor*, most> weights;
  int count;
};

// Results that are columns of one, and how many columns each has.
struct Columns {
  std::array<int64_t, most> each;
  int count;
};

template <class T>
void multiply(const Product& product, const Tensor& x, const Weights& weights,
              const Columns& columns, const Tensor& result) {
  convert(static_cast<const T*>(x.const_data_ptr()), product.numbers, x.numel());
  for (int i = 0; i < weights.count; ++i)
    *product.weights[i] = weights.weights[i]->const_data_ptr();
  const int status = ggml_graph_compute(product.graph, product.plan);
  STD_TORCH_CHECK(status == 0, "ggml could not compute a product (status ", status, ")");
  T* const end = static_cast<T*>(result.mutable_data_ptr()) + result.numel();
  T* row = static_cast<T*>(result.mutable_data_ptr());
  for (int64_t token = 0; row < end; ++token)
    for (int i = 0; i < columns.count; row += columns.each[i++])
      convert(product.results[i] + token * columns.each[i], row, columns.each[i]);
}

// Without a value where there is no graph for it.
std::optional<Tensor> by_graph(Kind kind, const Tensor& x, const Weights& weights,
                               std::array<int64_t, most> types) {
  const int64_t columns = x.sizes().back(), tokens = columns ? x.numel() / columns : 0;
  std::array<int64_t, most> rows{};
  bool is_contiguous = x.is_contiguous();
  for (int i = 0; i < weights.count; ++i) {
    rows[i] = weights.weights[i]->size(0);
    is_contiguous &= weights.weights[i]->is_contiguous();
  }
  const int64_t threads = torch::stable::get_num_threads();
  const auto found =
      products.find({kind, tokens, threads, columns, types[0], rows[0], types[1], rows[1]});
  if (found == products.end() || !is_contiguous) return std::nullopt;
  const Columns of = kind == gated ? Columns{{rows[1]}, 1} : Columns{rows, weights.count};
  const auto by = [&](auto number) {
    const Tensor result = empty(x, kind == gated ? rows[1] : rows[0] + rows[1]);
    multiply<decltype(number)>(found->second, x, weights, of, result);
    return result;
  };
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return by(bfloat16{});
    case ScalarType::Half:
      return by(float16{});
    case ScalarType::Float:
      return by(float{});
    default:
      return std::nullopt;
  }
}

Tensor matmul(const Tensor& x, const Tensor& weight, int64_t type, bool exact) {
  if (!exact)
    if (const auto result = by_graph(single, x, {{&weight}, 1}, {type})) return *result;
  return by_python("vllm_bridge::gguf_matmul_any", x, weight, type, exact);
}

Tensor pair(const Tensor& x, const Tensor& first, int64_t first_type, const Tensor& second,
            int64_t second_type, bool is_gated) {
  const Kind kind = is_gated ? gated : beside;
  if (const auto result = by_graph(kind, x, {{&first, &second}, 2}, {first_type, second_type}))
    return *result;
  return by_python("vllm_bridge::gguf_pair_any", x, first, first_type, second, second_type,
                   is_gated);
}

// The sum of two, and what RMSNorm makes of it, both rounded where torch rounds them.
template <class T>
void normalize(const Tensor& x, const Tensor& residual, const Tensor& norm, float epsilon,
               const Tensor& sum, const Tensor& inner) {
  constexpr int lanes = 16;
  const int64_t columns = norm.numel(), count = x.numel();
  std::vector<float> row(columns);
  const auto *added = static_cast<const T*>(x.const_data_ptr()),
             *before = static_cast<const T*>(residual.const_data_ptr()),
             *weight = static_cast<const T*>(norm.const_data_ptr());
  auto *total = static_cast<T*>(sum.mutable_data_ptr()),
       *result = static_cast<T*>(inner.mutable_data_ptr());
  for (int64_t start = 0; start < count; start += columns) {
    for (int64_t i = 0; i < columns; ++i) {
      row[i] = to_float(added[start + i]) + to_float(before[start + i]);
      total[start + i] = from_float<T>(row[i]);
    }
    float squares[lanes] = {}, square = 0;
    int64_t i = 0;
    for (; i + lanes <= columns; i += lanes)
      for (int lane = 0; lane < lanes; ++lane) squares[lane] += row[i + lane] * row[i + lane];
    for (; i < columns; ++i) square += row[i] * row[i];
    for (float each : squares) square += each;
    const float scale = 1 / std::sqrt(square / columns + epsilon);
    for (i = 0; i < columns; ++i)
      result[start + i] =
          from_float<T>(to_float(from_float<T>(row[i] * scale)) * to_float(weight[i]));
  }
}

std::tuple<Tensor, Tensor> normed(const Tensor& x, const std::optional<Tensor>& before,
                                  int64_t before_type, const Tensor& residual, const Tensor& norm,
                                  double epsilon, const Tensor& first, int64_t first_type,
                                  const std::optional<Tensor>& second, int64_t second_type,
                                  bool is_gated) {
  const auto by = [&](auto number) -> std::tuple<Tensor, Tensor> {
    const Tensor added = before ? matmul(x, *before, before_type, false) : x;
    const Tensor sum = empty(residual, norm.numel()), inner = empty(residual, norm.numel());
    normalize<decltype(number)>(added, residual, norm, epsilon, sum, inner);
    return {second ? pair(inner, first, first_type, *second, second_type, is_gated)
                   : matmul(inner, first, first_type, false),
            sum};
  };
  const auto type = x.scalar_type();
  const bool is_plain = type == residual.scalar_type() && type == norm.scalar_type() &&
                        (before || x.is_contiguous()) && residual.is_contiguous() &&
                        norm.is_contiguous();
  if (is_plain && type == ScalarType::BFloat16) return by(bfloat16{});
  if (is_plain && type == ScalarType::Half) return by(float16{});
  if (is_plain && type == ScalarType::Float) return by(float{});
  return by_python<std::tuple<Tensor, Tensor>>(
      "vllm_bridge::gguf_normed_any", x, before, before_type, residual, norm, epsilon, first,
      first_type, second, second_type, is_gated);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vllm_bridge, CPU, library) {
  library.impl("gguf_matmul", TORCH_BOX(&matmul));
  library.impl("gguf_pair", TORCH_BOX(&pair));
  library.impl("gguf_normed", TORCH_BOX(&normed));
}

extern "C" {

void gguf_keep(int (*compute)(void*, void*), const Key* key, const Product* product) {
  ggml_graph_compute = compute;
  products[*key] = *product;
}

void gguf_forget() { products.clear(); }
}
