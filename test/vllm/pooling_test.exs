defmodule VLLM.PoolingTest do
  # What is checked before an engine is asked.
  use ExUnit.Case, async: true

  alias VLLM.{Error, Params, PoolingParams}

  test "only what was given goes to vLLM" do
    params = VLLM.pooling_params!(dimensions: 16, extra_kwargs: [max_tokens_per_doc: 8])

    assert Params.to_wire(PoolingParams, :pooling_params, params, %{}, []) ==
             {:ok, %{"dimensions" => 16, "extra_kwargs" => %{"max_tokens_per_doc" => 8}}}

    assert inspect(VLLM.pooling_params!(dimensions: 16)) ==
             "VLLM.pooling_params!([dimensions: 16])"
  end

  test "a misspelt option is an error with the nearest name" do
    assert {:error, %Error{reason: :invalid_option, details: %{"nearest" => "dimensions"}}} =
             VLLM.embed(:nobody, "x", dimension: 5)

    assert {:error, %Error{details: %{"nearest" => "top_n"}}} =
             VLLM.rerank(:nobody, "x", ["y"], topn: 5)

    assert {:error, %Error{details: %{"option" => "top_n"}}} =
             VLLM.score(:nobody, "x", "y", top_n: 5)
  end

  test "a wrong value of an option says what is allowed" do
    assert {:error, %Error{message: message}} = VLLM.rerank(:nobody, "x", ["y"], top_n: 0)
    assert message == "`top_n` must be a positive integer; got 0."
  end

  test "texts to score are strings that make pairs" do
    for {one, other} <- [{["a", "b"], ["c"]}, {[], ["c"]}, {"a", [nil]}, {:a, "b"}, {"a", "\xff"}] do
      assert {:error, %Error{reason: :invalid_prompt}} = VLLM.score(:nobody, one, other)
    end

    assert {:error, %Error{reason: :invalid_prompt}} = VLLM.rerank(:nobody, ["a"], "b")
    assert {:error, %Error{reason: :invalid_prompt}} = VLLM.embed(:nobody, [1, 2])
  end

  test "bang functions raise the error" do
    for call <- [
          fn -> VLLM.embed!(:nobody, "x") end,
          fn -> VLLM.classify!(:nobody, "x") end,
          fn -> VLLM.encode!(:nobody, "x") end,
          fn -> VLLM.score!(:nobody, "x", "y") end,
          fn -> VLLM.rerank!(:nobody, "x", ["y"]) end
        ] do
      assert_raise Error, ~r/no engine :nobody/, call
    end
  end
end
