defmodule VLLM.Quantization.EstimateTest do
  use ExUnit.Case, async: true

  alias VLLM.{DemoModel, Error, Quantization}
  alias VLLM.Quantization.Estimate

  # As the worker sends it.
  @wire %{
    "model" => "/models/llama",
    "method" => nil,
    "dtype" => "bfloat16",
    "fits" => false,
    "max_model_len" => 60_000,
    "concurrency" => 1,
    "tensor_parallel_size" => 1,
    "pipeline_parallel_size" => 1,
    "data_parallel_size" => 1,
    "weights" => %{
      "disk" => 10,
      "memory" => 12,
      "peak" => 13,
      "linear" => 8,
      "embeddings" => 3,
      "experts" => 0,
      "others" => 1
    },
    "kv_cache" => %{
      "dtype" => "auto",
      "bytes_per_token" => 131_072,
      "bytes" => 7_000,
      "available" => 5_000,
      "tokens" => 42_000,
      "approximate" => true
    },
    "devices" => [
      %{
        "name" => "RTX 4090 24GB",
        "kind" => "cuda",
        "memory" => 24,
        "source" => "https://",
        "budget" => 22,
        "weights" => 12,
        "adapters" => 0,
        "draft" => 0,
        "activations" => 1,
        "framework" => 1,
        "kv_cache" => 9,
        "left" => -1,
        "fits" => false,
        "from_the_future" => 1
      }
    ],
    "longest_context" => 42_000,
    "max_concurrency" => 0,
    "tokens_per_second" => 67.2,
    "remedies" => [
      %{
        "text" => "A KV cache of 8 bits.",
        "options" => %{"kv_cache_dtype" => "fp8"},
        "format" => nil,
        "devices" => nil
      }
    ],
    "formats" => [
      %{"method" => "awq", "name" => "awq (4 bits)", "disk" => 4, "memory" => 4, "fits" => true}
    ]
  }

  test "an estimate has all that is on the wire" do
    estimate = Estimate.from_wire(@wire)
    assert %Estimate{fits?: false, max_model_len: 60_000, tokens_per_second: 67.2} = estimate
    assert %{memory: 12, peak: 13, linear: 8, embeddings: 3, others: 1} = estimate.weights
    assert %{tokens: 42_000, bytes_per_token: 131_072, approximate?: true} = estimate.kv_cache

    assert [%{name: "RTX 4090 24GB", left: -1, fits?: false} = device] = estimate.devices
    refute Map.has_key?(device, :from_the_future)

    assert [%{options: %{"kv_cache_dtype" => "fp8"}, format: nil}] = estimate.remedies
    assert [%{name: "awq (4 bits)", method: "awq", disk: 4, fits?: true}] = estimate.formats
  end

  test "a model is estimated for any machine" do
    assert {:ok, %Estimate{fits?: true} = estimate} =
             Quantization.estimate(DemoModel.path(),
               devices: ["24GiB", "24GiB"],
               concurrency: 4,
               max_model_len: 512
             )

    assert %{tensor_parallel_size: 2, concurrency: 4, max_model_len: 512} = estimate
    assert %{disk: 8_133_120, linear: 7_077_888} = estimate.weights
    # Each has one of two heads of keys and values.
    assert estimate.kv_cache.bytes_per_token == 3072 / 2
    assert [%{name: "24GiB", fits?: true}, %{name: "24GiB"}] = estimate.devices
  end

  test "a device that is not known is refused with the nearest" do
    assert_raise Error, ~r/Did you mean `RTX 4090 24GB`/, fn ->
      Quantization.estimate!(DemoModel.path(), device: "RTX 4095")
    end
  end
end
