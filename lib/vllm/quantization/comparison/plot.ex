defmodule VLLM.Quantization.Comparison.Plot do
  @moduledoc false
  # The picture of a comparison: a point for each model, quality over size.

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

    IO.iodata_to_binary([
      ~s(<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 #{@width} #{@height}" ),
      ~s(font-family="sans-serif" font-size="12" fill="#333">\n),
      ~s(<rect width="#{@width}" height="#{@height}" fill="#fff"/>\n),
      text(
        @left,
        22,
        "Mean KL divergence from the reference over the size of the weights",
        "start"
      ),
      if(points == [], do: nothing(), else: chart(points)),
      "</svg>\n"
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
      ~s(<line x1="#{@left}" y1="#{at(y)}" x2="#{@width - @right}" y2="#{at(y)}" stroke="#ddd"/>\n),
      text(@left - 8, y + 4, level_name(power), "end")
    ]
  end

  defp level_name(power) when power in -6..2,
    do: :erlang.float_to_binary(:math.pow(10, power), decimals: max(-power, 0))

  defp level_name(power), do: "1e#{power}"

  defp size(x, bytes) do
    bottom = @height - @bottom

    [
      ~s(<line x1="#{at(x)}" y1="#{bottom}" x2="#{at(x)}" y2="#{bottom + 5}" stroke="#999"/>\n),
      text(x, bottom + 20, Bytes.file(round(bytes)), "middle")
    ]
  end

  defp point(x, y, row) do
    colour = if row.verdict == :worse_than_usual, do: "#c0392b", else: "#2471a3"

    [
      ~s(<circle cx="#{at(x)}" cy="#{at(y)}" r="4" fill="#{colour}"><title>),
      escape("#{row.model}: #{row.kl_mean}"),
      "</title></circle>\n",
      text(x + 8, y + 4, row.format, "start")
    ]
  end

  defp text(x, y, text, anchor) do
    [~s(<text x="#{at(x)}" y="#{at(y)}" text-anchor="#{anchor}">), escape(text), "</text>\n"]
  end

  defp at(number), do: :erlang.float_to_binary(number / 1, decimals: 1)

  defp escape(text) do
    for <<char::utf8 <- text>>, into: "" do
      case char do
        ?& -> "&amp;"
        ?< -> "&lt;"
        ?> -> "&gt;"
        # No control characters are allowed in XML.
        char when char < 0x20 -> " "
        char -> <<char::utf8>>
      end
    end
  end
end
