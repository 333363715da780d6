defmodule VLLM.Quantization.Comparison.Plot do
  @moduledoc false
  # The picture of a comparison: quality over size, and what is to be known of each model side by side.

  alias VLLM.Plot
  alias VLLM.Quantization.Comparison.Row

  @doc "Its panels."
  @spec panels([Row.t()]) :: [Plot.panel()]
  def panels(rows) do
    [
      panel(rows, "Mean KL divergence from the reference, over the size", "dots", &kl/1,
        x: "bytes of the weights",
        unit_x: "B",
        log_y: true
      ),
      panel(rows, "Bytes of the weights", "bars", &bar(&1.bytes), unit_y: "B"),
      panel(rows, "Same likeliest token as the reference, %", "bars", fn row ->
        bar(row.same_top && 100 * row.same_top)
      end),
      panel(rows, "Tokens/s of one answer at a time", "bars", &bar(&1.tokens_per_second))
    ]
  end

  # Each model is a series of a single point, so that it looks the same in all panels.
  defp panel(rows, title, kind, point, settings \\ []) do
    Plot.panel(title, kind, for(row <- rows, do: {label(row), [point.(row)]}), settings)
  end

  defp label(row) do
    verdict =
      case row.verdict do
        :worse_than_usual -> ": worse than usual"
        :broken -> ": broken"
        _fine -> ""
      end

    "#{row.model}, #{row.format || "not measured"}#{verdict}"
  end

  # That of the reference, which is 0, has no place on a logarithmic scale.
  defp kl(%{bytes: bytes, kl_mean: kl}) when is_integer(bytes) and is_number(kl) and kl > 0,
    do: {bytes, kl}

  defp kl(_row), do: nil

  defp bar(nil), do: nil
  defp bar(value), do: {0, value}
end
