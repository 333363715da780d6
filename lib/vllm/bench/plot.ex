defmodule VLLM.Bench.Plot do
  @moduledoc false
  # The picture of a benchmark: a panel for each of three figures, over how many
  # requests were under way, with a line for each engine.

  import VLLM.SVG

  alias VLLM.Bench.Run

  @colours ["#2471a3", "#c0392b", "#1e8449", "#b7950b", "#7d3c98", "#566573"]

  @panels [
    {:output_throughput, "Output tokens per second"},
    {:median_ttft_ms, "Median time to the first token, ms"},
    {:median_tpot_ms, "Median time per output token, ms"}
  ]

  @width 330
  @height 300
  @left 60
  @right 20
  @top 40
  @bottom 50
  @legend 20

  @doc "The picture as SVG text."
  @spec svg([Run.t()]) :: String.t()
  def svg(runs) do
    names = runs |> Enum.map(& &1.engine) |> Enum.uniq()
    engines = Enum.zip(names, Stream.cycle(@colours))

    document(@width * length(@panels), @height + @legend * length(engines), [
      for(
        {{figure, title}, place} <- Enum.with_index(@panels),
        do: panel(runs, engines, figure, title, place * @width)
      ),
      for({engine, place} <- Enum.with_index(engines), do: legend(engine, place))
    ])
  end

  defp panel(runs, engines, figure, title, offset) do
    counts = runs |> Enum.map(& &1.max_concurrency) |> Enum.uniq()
    values = for run <- runs, value = Map.fetch!(run.figures, figure), do: value
    highest = 1.05 * Enum.max([1.0e-9 | values])
    bottom = @height - @bottom
    [left, right] = [offset + @left, offset + @width - @right]
    # The counts stand at equal distances, however far apart they are.
    x = fn place -> left + (right - left) * (place + 0.5) / length(counts) end
    y = fn value -> bottom - (bottom - @top) * value / highest end

    [
      text(left, 22, title, "start"),
      for(part <- 0..4, do: level(y.(highest * part / 4), highest * part / 4, left, right)),
      for {count, place} <- Enum.with_index(counts) do
        text(x.(place), bottom + 18, to_string(count || "all"), "middle")
      end,
      text((left + right) / 2, bottom + 36, "requests at a time", "middle"),
      for {engine, colour} <- engines do
        points =
          for {count, place} <- Enum.with_index(counts),
              run <- runs,
              run.engine == engine and run.max_concurrency == count,
              value = Map.fetch!(run.figures, figure),
              do: {{x.(place), y.(value)}, "#{engine}: #{decimal(value)}"}

        [
          points |> Enum.map(&elem(&1, 0)) |> curve(colour),
          for({place, title} <- points, do: dot(place, colour, title))
        ]
      end
    ]
  end

  defp level(y, value, left, right) do
    [line({left, y}, {right, y}, "#ddd"), text(left - 8, y + 4, decimal(value), "end")]
  end

  defp decimal(value) when value >= 100, do: Integer.to_string(round(value))
  defp decimal(value), do: :erlang.float_to_binary(value / 1, decimals: 1)

  defp legend({engine, colour}, place) do
    y = @height + @legend * place

    [dot({@left, y - 4}, colour), text(@left + 10, y, engine, "start")]
  end
end
