defmodule VLLM.Quantization.AdviceTest do
  use ExUnit.Case, async: true

  alias VLLM.Bridge.Shape
  alias VLLM.Quantization.Advice

  @wire %{
    "model" => "org/m",
    "goal" => "latency",
    "device" => "RTX 4090 24GB",
    "weights" => %{"one" => 0.6, "quality" => 0.3, "memory" => 0.1},
    "choices" => [
      %{
        "format" => "awq (4 bits)",
        "method" => "awq",
        "disk" => 5,
        "memory" => 6,
        "needs" => 8,
        "score" => 0.91,
        "marks" => %{"one" => 1.0, "quality" => 0.85, "memory" => 0.53},
        "loss" => %{"class" => "small"},
        "speed" => nil,
        "reasons" => ["It is small."],
        "ways" => [%{"kind" => "make", "model" => "org/m", "options" => %{}, "text" => "make it"}]
      }
    ],
    "ruled_out" => [
      %{"format" => "plain", "why" => "does_not_fit", "needs" => 9, "message" => "Too large."},
      %{
        "format" => "new",
        "why" => "for_a_reason_of_a_newer_worker",
        "needs" => 1,
        "message" => ""
      }
    ],
    "notes" => [],
    "picture" => "org/m"
  }

  test "is made of what the worker says, and of no new atoms" do
    advice = Advice.from_wire(@wire)
    assert %{goal: :latency, device: "RTX 4090 24GB", picture: "org/m"} = advice
    assert [%{format: "awq (4 bits)", needs: 8, score: 0.91, speed: nil}] = advice.choices

    assert Enum.map(advice.ruled_out, & &1.why) == [
             :does_not_fit,
             "for_a_reason_of_a_newer_worker"
           ]

    assert Advice.from_wire(%{@wire | "goal" => "a_goal_to_come"}).goal == "a_goal_to_come"
  end

  test "is not made of what has another shape" do
    assert Shape.answer?("recommend", @wire)
    refute Shape.answer?("recommend", %{@wire | "choices" => nil})
    refute Shape.answer?("recommend", %{@wire | "choices" => [%{"ways" => []}]})
    refute Shape.answer?("recommend", Map.delete(@wire, "notes"))
  end
end
