defmodule VLLM.Bench.Plot do
  @moduledoc false
  # The picture of a benchmark: a panel for each of its figures, over how many requests were under way,
  # with a line for each engine; or bars side by side, where there is one such number only.

  alias VLLM.Bench.{Figures, Run}
  alias VLLM.Plot

  @latencies [
    ttft: "Milliseconds to the first token (TTFT)",
    tpot: "Milliseconds per output token (TPOT)"
  ]

  @doc "Its panels."
  @spec panels([Run.t(), ...]) :: [Plot.panel()]
  def panels(runs) do
    counts = runs |> Enum.map(& &1.max_concurrency) |> Enum.uniq()
    throughput = panel(runs, counts, "Output tokens per second, with 95 %", &rate/1, [])

    latencies =
      for {latency, title} <- @latencies,
          do: panel(runs, counts, "#{title}, median to p99", &time(&1, latency), [])

    ratio = panel(runs, counts, "Tokens/s of the first, with 95 %", &ratio/1, baseline: 1)

    [throughput, ratio] ++
      latencies ++
      [
        engines(runs, "Bytes of the machine's memory", & &1.memory, unit_y: "B"),
        engines(runs, "Seconds of the start-up", & &1.startup_seconds, [])
      ]
  end

  # What is the same at each concurrency.
  defp engines(runs, title, value, settings) do
    series =
      for run <- Enum.uniq_by(runs, & &1.engine),
          value = value.(run),
          do: {run.engine, [{0, value}]}

    Plot.panel(title, "bars", series, settings)
  end

  defp panel(runs, counts, title, value, settings) do
    series =
      for engine <- runs |> Enum.map(& &1.engine) |> Enum.uniq(),
          do: {engine, for(%{engine: ^engine} = run <- runs, do: point(run, counts, value))}

    kind = if match?([_], counts), do: "bars", else: "lines"
    names = for count <- counts, do: to_string(count || "all")
    Plot.panel(title, kind, series, [x: "requests at a time", categories: names] ++ settings)
  end

  # The counts stand at equal distances, however far apart they are.
  defp point(run, counts, value) do
    place = Enum.find_index(counts, &(&1 == run.max_concurrency))
    with {value, spread} <- value.(run), do: {place, value, spread}
  end

  defp rate(%{output_throughput: {median, low, high}}), do: {median, {low, high}}

  defp ratio(%{ratio: nil}), do: nil
  defp ratio(%{ratio: {median, low, high}}), do: {median, {low, high}}

  defp time(%{figures: figures}, latency) do
    median = Map.fetch!(figures, Figures.name(:median, latency))
    if median, do: {median, {median, Map.fetch!(figures, Figures.name(:p99, latency))}}
  end
end
