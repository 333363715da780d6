defmodule VLLM.Job.LossesTest do
  use ExUnit.Case, async: true

  alias VLLM.Job.Losses

  doctest VLLM.SVG

  test "a picture has a curve of each kind of loss, and their names" do
    figures = %{"losses" => [[1, 4.0], [2, 2.0]], "held_out_losses" => [[2, 3.0]]}
    svg = Losses.svg("a&b", figures)
    assert svg =~ "Loss of a&amp;b over"
    # The second step is the last, and the highest loss a little below the upper edge.
    assert svg =~ ~s(points="335.0,54.8 610.0,202.4" fill="none" stroke="#2471a3")
    assert svg =~ ~s(points="610.0,128.6" fill="none" stroke="#c0392b")
    assert svg =~ ">training<" and svg =~ ">held out<"
  end

  test "there may be no held-out losses" do
    refute Losses.svg("a", %{"losses" => [[1, 4.0]]}) =~ "held out"
  end
end
