defmodule VLLM.SamplingParamsTest do
  use ExUnit.Case, async: true

  alias VLLM.SamplingParams

  test "only what was given goes to vLLM; nil is a value" do
    params = VLLM.sampling_params!(temperature: 0.0, max_tokens: nil)
    assert SamplingParams.to_wire(params) == %{"temperature" => 0.0, "max_tokens" => nil}
  end

  test "inline parameters override given ones" do
    params = VLLM.sampling_params!(temperature: 0.0, seed: 7)
    assert {:ok, both} = SamplingParams.put(params, %{"seed" => 8}, [])
    assert SamplingParams.to_wire(both) == %{"temperature" => 0.0, "seed" => 8}
  end

  test "nested parameters may be keyword lists" do
    params = VLLM.sampling_params!(repetition_detection: [min_count: 3, max_pattern_size: 8])

    assert SamplingParams.to_wire(params) == %{
             "repetition_detection" => %{"min_count" => 3, "max_pattern_size" => 8}
           }
  end

  test "parameters that are made already are taken as they are" do
    choice = VLLM.structured_outputs!(choice: ["a"])
    assert VLLM.structured_outputs!(choice) == choice
    params = VLLM.sampling_params!(seed: 7, structured_outputs: choice)
    assert VLLM.sampling_params!(params) == params
    assert SamplingParams.to_wire(params)["structured_outputs"] == %{"choice" => ["a"]}
  end

  test "inspect shows what was given" do
    assert inspect(VLLM.sampling_params!(top_p: 0.9)) == "VLLM.sampling_params!([top_p: 0.9])"
  end
end
