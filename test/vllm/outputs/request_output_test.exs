defmodule VLLM.RequestOutputTest do
  use ExUnit.Case, async: true

  doctest VLLM.TokenIds

  alias VLLM.{CompletionOutput, Logprob, RequestOutput}

  @none 0xFFFFFFFF

  defp u32(numbers), do: for(n <- numbers, into: <<>>, do: <<n::32-little>>)
  defp f32(numbers), do: for(n <- numbers, into: <<>>, do: <<n::32-float-little>>)

  test "an output of the wire becomes structs with vLLM's names" do
    wire = %{
      "request_id" => "7",
      "prompt" => "The capital of France is",
      "prompt_token_ids" => u32([1, 70_000]),
      "prompt_logprobs" => nil,
      "outputs" => [
        %{
          "index" => 0,
          "text" => " Paris.",
          "token_ids" => u32([5, 6]),
          "cumulative_logprob" => -0.5,
          "logprobs" => nil,
          "finish_reason" => "stop",
          "stop_reason" => 6
        }
      ],
      "finished" => true,
      "num_cached_tokens" => 0,
      "metrics" => %{"num_generation_tokens" => 2}
    }

    assert %RequestOutput{
             request_id: "7",
             prompt_token_ids: [1, 70_000],
             finished: true,
             metrics: %{"num_generation_tokens" => 2},
             outputs: [
               %CompletionOutput{
                 text: " Paris.",
                 token_ids: [5, 6],
                 cumulative_logprob: -0.5,
                 finish_reason: "stop",
                 stop_reason: 6
               }
             ]
           } = RequestOutput.from_wire(wire)
  end

  test "log probabilities come place by place; the first place of a prompt has none" do
    wire = %{
      "counts" => u32([@none, 2, 1]),
      "token_ids" => u32([5, 9, 6]),
      "logprobs" => f32([-0.25, -2.0, 0.0]),
      "ranks" => u32([1, 2, 0]),
      "tokens" => ["a", nil, "c"]
    }

    assert Logprob.from_wire(wire) == [
             nil,
             %{
               5 => %Logprob{logprob: -0.25, rank: 1, decoded_token: "a"},
               9 => %Logprob{logprob: -2.0, rank: 2, decoded_token: nil}
             },
             %{6 => %Logprob{logprob: 0.0, rank: nil, decoded_token: "c"}}
           ]
  end

  test "a probability of 0 has the log probability :neg_infinity" do
    wire = %{
      "counts" => u32([1]),
      "token_ids" => u32([5]),
      "logprobs" => <<0x00, 0x00, 0x80, 0xFF>>,
      "ranks" => u32([3]),
      "tokens" => ["a"]
    }

    assert [%{5 => %Logprob{logprob: :neg_infinity, rank: 3}}] = Logprob.from_wire(wire)
  end
end
