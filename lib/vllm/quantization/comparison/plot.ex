defmodule VLLM.Quantization.Comparison.Plot do
  @moduledoc false
  # The picture of a comparison: a point for each model, quality over size.

  import VLLM.SVG

  alias VLLM.Bytes
  alias VLLM.Quantization.Comparison.Row

  @width 720
  @height 480
  @left 90
  @right 150
  @top 40
  @bottom 60

  @doc "The picture as SVG text."
  @spec svg([Row.t()]) :: String.t()
  def svg(rows) do
    points =
      for %{bytes: bytes, kl_mean: kl} = row <- rows,
          is_integer(bytes) and is_number(kl) and kl > 0,
          do: {bytes, :math.log10(kl), row}

    document(@width, @height, [
      text(
        @left,
        22,
        "Mean KL divergence from the reference over the size of the weights",
        "start"
      ),
      if(points == [], do: nothing(), else: chart(points))
    ])
  end

  defp nothing, do: text(@left, 60, "No model has a divergence that could be drawn.", "start")

  defp chart(points) do
    {sizes, logs, _rows} = unzip(points)
    highest = Enum.max(sizes) * 1.1
    {low, high} = {floor(Enum.min(logs)), floor(Enum.max(logs)) + 1}
    x = fn bytes -> @left + (@width - @left - @right) * bytes / highest end
    y = fn log -> @top + (@height - @top - @bottom) * (high - log) / (high - low) end

    [
      for(power <- low..high, do: level(y.(power), power)),
      for(part <- 0..4, do: size(x.(highest * part / 4), highest * part / 4)),
      text((@left + @width - @right) / 2, @height - 16, "bytes of the weights", "middle"),
      for({bytes, log, row} <- points, do: point(x.(bytes), y.(log), row))
    ]
  end

  defp unzip(points),
    do:
      Enum.reduce(points, {[], [], []}, fn {a, b, c}, {as, bs, cs} ->
        {[a | as], [b | bs], [c | cs]}
      end)

  defp level(y, power) do
    [
      line({@left, y}, {@width - @right, y}, "#ddd"),
      text(@left - 8, y + 4, level_name(power), "end")
    ]
  end

  defp level_name(power) when power in -6..2,
    do: :erlang.float_to_binary(:math.pow(10, power), decimals: max(-power, 0))

  defp level_name(power), do: "1e#{power}"

  defp size(x, bytes) do
    bottom = @height - @bottom

    [
      line({x, bottom}, {x, bottom + 5}, "#999"),
      text(x, bottom + 20, Bytes.file(round(bytes)), "middle")
    ]
  end

  defp point(x, y, row) do
    colour = if row.verdict in [:worse_than_usual, :broken], do: "#c0392b", else: "#2471a3"

    [
      dot({x, y}, colour, "#{row.model}: #{row.kl_mean}"),
      text(x + 8, y + 4, row.format, "start")
    ]
  end
end
