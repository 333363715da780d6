defmodule VLLM.SamplingParamsTest do
  use ExUnit.Case, async: true

  alias VLLM.{Error, Params, SamplingParams}

  defp to_wire(given, inline \\ %{}),
    do: Params.to_wire(SamplingParams, :sampling_params, given, inline, [:timeout])

  test "only what was given goes to vLLM; nil is a value" do
    params = VLLM.sampling_params!(temperature: 0.0, max_tokens: nil)
    assert to_wire(params) == {:ok, %{"temperature" => 0.0, "max_tokens" => nil}}
    assert to_wire(nil) == {:ok, %{}}
  end

  test "inline parameters override given ones" do
    for given <- [
          VLLM.sampling_params!(temperature: 0.0, seed: 7),
          [temperature: 0.0, seed: 7],
          %{"temperature" => 0.0, seed: 7}
        ] do
      assert to_wire(given, %{"seed" => 8}) == {:ok, %{"temperature" => 0.0, "seed" => 8}}
    end
  end

  test "nested parameters may be keyword lists" do
    params = VLLM.sampling_params!(repetition_detection: [min_count: 3, max_pattern_size: 8])
    assert params.repetition_detection == %{"min_count" => 3, "max_pattern_size" => 8}
    assert to_wire(params) == {:ok, %{"repetition_detection" => params.repetition_detection}}
  end

  test "parameters that are made already are taken as they are" do
    choice = VLLM.structured_outputs!(choice: ["a"])
    assert VLLM.structured_outputs!(choice) == choice
    params = VLLM.sampling_params!(seed: 7, structured_outputs: choice)
    assert VLLM.sampling_params!(params) == params

    assert to_wire(params) ==
             {:ok, %{"seed" => 7, "structured_outputs" => %{"choice" => ["a"]}}}
  end

  test "what was changed in a struct is checked when it is used" do
    params = %{VLLM.sampling_params!([]) | stop: ["a", {1}]}
    assert {:error, %Error{reason: :invalid_option} = error} = to_wire(params)
    assert error.details == %{"option" => "stop", "path" => ["stop", 1]}
  end

  test "what structured outputs are made of is not given beside them, and that is said" do
    for name <- ["regex", "choice", "grammar", "json", "json_object", "structural_tag"] do
      assert {:error, %Error{reason: :invalid_option} = error} = to_wire(nil, %{name => "x"})
      assert error.message =~ "Unknown option `#{name}`. It is given as `structured_outputs: "
      assert error.details == %{"option" => name}
    end

    assert {:error, error} = VLLM.generate(:nobody, "x", json: %{})
    assert error.message =~ "or as `schema:`"
    assert {:error, error} = VLLM.sampling_params(regex: "a")
    assert error.message =~ "`structured_outputs: [regex: …]`"
  end

  test "inspect shows what was given" do
    assert inspect(VLLM.sampling_params!(top_p: 0.9)) == "VLLM.sampling_params!([top_p: 0.9])"
  end
end
