defmodule VLLM.Quantization.RecommendTest do
  # One real question, whose answer has to come from vLLM.
  use ExUnit.Case, async: true

  alias VLLM.{DemoModel, Quantization}

  test "a goal and a device that nobody knows are errors with the nearest ones" do
    assert {:error, error} =
             Quantization.recommend(DemoModel.path(), for: :latncy, device: "H100")

    assert error.reason == :invalid_option
    assert error.details["nearest"] == "latency"
  end

  @tag :slow
  @tag timeout: 180_000
  test "the formats of the demo model are ranked for another machine" do
    {:ok, advice} = Quantization.recommend(DemoModel.path(), for: :latency, device: "2x RTX 4090")
    assert advice.goal == :latency
    assert advice.device == "2 x RTX 4090 24GB"
    assert [%{format: "awq (4 bits)", method: "awq"} = first | _] = advice.choices
    assert first.needs > first.memory
    assert first.loss["class"] == "small"
    assert [%{"kind" => "make"}] = first.ways
    assert advice.choices == Enum.sort_by(advice.choices, & &1.score, :desc)
    assert advice.ruled_out == []

    assert advice.picture =~
             "1. #{:erlang.float_to_binary(first.score, decimals: 2)} awq (4 bits)"
  end
end
