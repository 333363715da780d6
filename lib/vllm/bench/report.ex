defmodule VLLM.Bench.Report do
  @moduledoc false
  # A benchmark as tables for a terminal.

  alias Mix.Vllm.Table
  alias VLLM.Bench.Figures
  alias VLLM.{Bench, Bytes}

  @doc "Its lines, as `IO.ANSI.format/1` takes them."
  @spec lines(Bench.t()) :: [IO.ANSI.ansidata()]
  def lines(%{runs: runs} = bench) do
    [heading(bench), throughput(runs), latencies(runs), engines(runs), failures(runs)]
    |> Enum.reject(&(&1 == []))
    |> Enum.intersperse([""])
    |> Enum.concat()
  end

  defp heading(%{settings: settings, versions: versions} = bench) do
    arrival =
      case settings.request_rate do
        nil -> ""
        rate -> "; #{rate} requests a second (burstiness #{settings.burstiness})"
      end

    [
      "#{bench.dataset}#{arrival}; #{rounds(settings.rounds)}",
      "ex_vllm #{versions.ex_vllm}, vLLM #{versions.vllm}, Elixir #{versions.elixir}, " <>
        "OTP #{versions.otp}, #{bench.cores} cores"
    ]
  end

  defp rounds(1), do: "one round"
  defp rounds(rounds), do: "medians of #{rounds} rounds"

  defp throughput(runs) do
    columns = [
      "engine",
      {:right, "at a time"},
      {:right, "done"},
      {:right, "requests/s"},
      {:right, "output tokens/s"},
      {:right, "95 %"},
      {:right, "total tokens/s"},
      {:right, "CPU ms/1k"},
      "of the first"
    ]

    rows =
      for %{figures: figures, output_throughput: {median, low, high}} = run <- runs do
        [
          run.engine,
          concurrency(run),
          "#{figures.completed} of #{figures.completed + figures.failed}",
          Table.decimal(figures.request_throughput, 2),
          Table.decimal(median, 1),
          "#{Table.decimal(low, 1)} - #{Table.decimal(high, 1)}",
          Table.decimal(figures.total_token_throughput, 1),
          number(figures.cpu_ms_per_1k_tokens, 0),
          ratio(run.ratio)
        ]
      end

    Table.lines(columns, rows)
  end

  defp ratio(nil), do: ""

  defp ratio({median, low, high}),
    do: "#{Table.decimal(median, 2)} (#{Table.decimal(low, 2)} - #{Table.decimal(high, 2)})"

  defp latencies(runs) do
    titles = ["TTFT", "TPOT", "ITL", "E2EL"]

    columns =
      ["milliseconds: mean, median, p99", {:right, "at a time"}] ++
        Enum.map(titles, &{:right, &1})

    rows =
      for run <- runs do
        [run.engine, concurrency(run)] ++ Enum.map(Figures.latencies(), &times(run.figures, &1))
      end

    Table.lines(columns, rows)
  end

  defp times(figures, latency) do
    Enum.map_join([:mean, :median, :p99], " ", fn kind ->
      number(Map.fetch!(figures, Figures.name(kind, latency)), 1)
    end)
  end

  # What is the same at each concurrency.
  defp engines(runs) do
    columns = ["engine", {:right, "start-up"}, {:right, "memory"}, "quantization", "KV cache"]

    rows =
      for run <- Enum.uniq_by(runs, & &1.engine) do
        [
          run.engine,
          if(run.startup_seconds, do: "#{Table.decimal(run.startup_seconds, 1)} s", else: "-"),
          Bytes.memory(run.memory),
          run.quantization || "none",
          run.kv_cache_dtype || "?"
        ]
      end

    Table.lines(columns, rows)
  end

  defp failures(runs) do
    for run <- runs,
        error <- run.figures.errors,
        uniq: true,
        do: [:red, "#{run.engine}: #{error}", :reset]
  end

  defp concurrency(%{max_concurrency: nil}), do: "all"
  defp concurrency(%{max_concurrency: count}), do: Integer.to_string(count)

  defp number(nil, _decimals), do: "?"
  defp number(number, decimals), do: Table.decimal(number, decimals)
end
