defmodule VLLM.Job.Losses do
  @moduledoc false
  # The picture of a training: its loss, and the held-out one, over the steps.

  import VLLM.SVG

  @width 720
  @height 400
  @left 60
  @right 110
  @top 40
  @bottom 50

  @doc "The picture as SVG text, of the figures of a trained adapter."
  @spec svg(String.t(), map()) :: String.t()
  def svg(name, %{"losses" => losses} = figures) do
    held_out = figures["held_out_losses"] || []
    points = losses ++ held_out
    last = points |> Enum.map(&hd/1) |> Enum.max() |> max(1)
    highest = points |> Enum.map(&List.last/1) |> Enum.max() |> max(1.0e-9) |> Kernel.*(1.05)
    x = fn step -> @left + (@width - @left - @right) * step / last end
    y = fn loss -> @height - @bottom - (@height - @top - @bottom) * loss / highest end

    document(@width, @height, [
      text(@left, 22, "Loss of #{name} over the steps of its training", "start"),
      for(part <- 0..4, do: level(y.(highest * part / 4), highest * part / 4)),
      for(part <- 0..4, do: step(x.(last * part / 4), round(last * part / 4))),
      curve(losses, x, y, "#2471a3", "training"),
      curve(held_out, x, y, "#c0392b", "held out")
    ])
  end

  defp level(y, loss) do
    [
      line({@left, y}, {@width - @right, y}, "#ddd"),
      text(@left - 8, y + 4, :erlang.float_to_binary(loss / 1, decimals: 2), "end")
    ]
  end

  defp step(x, step), do: text(x, @height - @bottom + 20, Integer.to_string(step), "middle")

  defp curve([], _x, _y, _colour, _name), do: []

  defp curve(points, x, y, colour, name) do
    places = for [step, loss] <- points, do: {x.(step), y.(loss)}
    {right, height} = List.last(places)

    [
      curve(places, colour),
      text(right + 6, height + if(name == "training", do: -4, else: 12), name, "start")
    ]
  end
end
