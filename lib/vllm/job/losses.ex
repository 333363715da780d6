defmodule VLLM.Job.Losses do
  @moduledoc false
  # The picture of a training: its loss, and the held-out one, over the steps.

  alias VLLM.Plot

  @doc "Its panels, of the figures of a trained adapter."
  @spec panels(map()) :: [Plot.panel()]
  def panels(%{"losses" => losses} = figures) do
    held_out = figures["held_out_losses"] || []

    series =
      for {label, points} <- [{"training", losses}, {"held out", held_out}],
          do: {label, points(points)}

    [Plot.panel("", "lines", series, x: "steps", y: "loss")]
  end

  defp points(points), do: for([step, loss] <- points, do: {step, loss})
end
