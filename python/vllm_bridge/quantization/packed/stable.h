// What operations of torch's that are compiled have in common, by its stable interface.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// `x` with rows of another length. As `torch::stable::new_empty`, which looks for the operation by
// its name each time.
inline Tensor empty(const Tensor& x, int64_t columns) {
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

template <class Result = Tensor, class... Arguments>
Result by_python(const char* name, const Arguments&... arguments) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, sizeof...(arguments)> stack{from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  if constexpr (std::is_same<Result, Tensor>::value)
    return to<Tensor>(stack[0]);
  else
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

}  // namespace
