defmodule VLLM.Bridge.ShapeTest do
  use ExUnit.Case, async: true

  alias VLLM.Bridge.Shape

  @finding %{
    "severity" => "info",
    "reason" => "family",
    "message" => "It writes text.",
    "remedy" => "",
    "details" => %{}
  }

  # What is to become structs would crash who asked.
  test "answers of tools are of the shape that their structs are made of" do
    for {method, fitting, others} <- [
          {"check", %{"findings" => [@finding]},
           [
             %{},
             %{"findings" => [%{@finding | "severity" => "fatal"}]},
             %{"findings" => [%{@finding | "remedy" => nil}]}
           ]},
          {"packages", %{"vllm" => "0.32.0"}, [nil, []]},
          {"pull", %{"path" => "/models/m"}, [nil, %{}, %{"path" => 1}]},
          {"models", [%{"last_used" => 1.5}],
           [%{}, [%{}], [%{"last_used" => "now"}], [%{"last_used" => 1.0e300}]]},
          {"delete", %{"freed" => 0}, [%{"freed" => -1}, 0]},
          {"search", [%{"id" => "org/m"}], [nil, ["org/m"]]}
        ] do
      assert Shape.answer?(method, fitting), method
      for other <- others, do: refute(Shape.answer?(method, other), method)
    end
  end
end
