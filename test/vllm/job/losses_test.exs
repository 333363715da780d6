defmodule VLLM.Job.LossesTest do
  use ExUnit.Case, async: true

  alias VLLM.Job.Losses

  test "a picture has a line of each kind of loss, over the steps" do
    figures = %{"losses" => [[1, 4.0], [2, 2.0]], "held_out_losses" => [[2, 3.0]]}

    assert [%{"kind" => "lines", "x" => "steps", "series" => [training, held_out]}] =
             Losses.panels(figures)

    assert %{"label" => "training", "x" => [1, 2], "y" => [4.0, 2.0]} = training
    assert %{"label" => "held out", "x" => [2], "y" => [3.0]} = held_out
  end

  test "there may be no held-out losses" do
    assert [%{"series" => [_, %{"x" => []}]}] = Losses.panels(%{"losses" => [[1, 4.0]]})
  end
end
