defmodule VLLM.Bench do
  import VLLM.Error, only: [bang!: 1]

  alias VLLM.JSON
  alias VLLM.Bench.{Dataset, Engines, Figures, Load, Plot, Processes, Report, Run, Statistics}
  alias VLLM.{Error, Options, Params, Terminal}

  @moduledoc """
  How fast engines are: tokens per second, how long users wait, start-up and memory, by the names and
  definitions of `vllm bench serve`.

      bench = VLLM.Bench.run!("/models/Llama-3.2-1B", max_concurrency: [1, 16, 64], num_prompts: 200)
      IO.puts(bench)
      File.write!("speed.svg", VLLM.Bench.plot!(bench))

  What `run/2` returns is a text, too (`to_string/1`, `IO.puts/1`); `to_json/1` has all of its figures,
  and `plot/2` draws them. `mix vllm.bench` does the same on the command line, and
  guides/benchmarking.md tells when not to trust the figures.

    * `:runs` - a `VLLM.Bench.Run` for each engine and each `max_concurrency`
    * `:dataset` - what was asked, in words
    * `:settings` - the options that were in force, but for the prompts, as a map
    * `:versions` - of this library, of vLLM, Elixir and OTP
    * `:cores` - how many the machine lets this BEAM use
  """

  @enforce_keys [:runs, :dataset, :settings, :versions, :cores]
  defstruct @enforce_keys

  @type t :: %__MODULE__{
          runs: [Run.t(), ...],
          dataset: String.t(),
          settings: %{atom() => term()},
          versions: %{atom() => String.t()},
          cores: pos_integer()
        }

  @typedoc "A model, which is started and stopped again, or an engine that runs."
  @type target :: String.t() | VLLM.engine()

  @doc """
  Measures engines: those of models, which it starts with the options that are given and stops at the
  end, or ones that run.

      {:ok, bench} =
        VLLM.Bench.run("/models/Llama-3.2-1B",
          against: [model: "/models/Llama-3.2-1B-AWQ"],
          prompts: "/data/questions.jsonl",
          max_concurrency: 16,
          max_model_len: 4096
        )

  All engines run at the same time and are measured in turns, round after round, so that what else
  the machine does is unfair to all of them alike; each round has the same requests, and begins with an
  empty prefix cache (`VLLM.reset_prefix_cache/2`). Their devices must hold them together: on a GPU give
  each its `gpu_memory_utilization`. An engine that runs should have nobody else to serve.

  Of several models (or engines) given as a list, and of what one is compared with by `against:`,
  each has a `:ratio` to the first.

  ## Options

  Those of the engine to start, which are checked as those of `VLLM.llm/2` are, and by the names of `vllm
  bench serve`, where it has them,

  #{Options.docs(Options.bench())}

  ## Errors

  Those of `VLLM.llm/2`, of an option or a prompt that is wrong, and of the requests that each engine
  gets before the first round. Errors of requests that count are counted instead (`:failed`).
  """
  @spec run(target() | [target(), ...], keyword() | map()) :: {:ok, t()} | {:error, Error.t()}
  def run(targets, options \\ []) do
    with {:ok, known, rest} <- Options.split(options, Options.bench()),
         {:ok, engines} <- Engines.plan(targets, known.against, rest),
         {:ok, prompts} <- Dataset.prompts(known, Engines.where(engines)) do
      Terminal.line(known.progress, fn show ->
        Engines.started(engines, show, &measure(&1, prompts, known, show))
      end)
    end
  end

  @doc "Like `run/2`, but raises `VLLM.Error`."
  @spec run!(target() | [target(), ...], keyword() | map()) :: t()
  def run!(targets, options \\ []), do: bang!(run(targets, options))

  defp measure(engines, prompts, known, show) do
    with {:ok, engines} <- Params.map(engines, &prepare(&1, prompts, known)),
         {:ok, rounds} <- rounds(engines, known, show),
         do: {:ok, result(engines, rounds, prompts, known)}
  end

  defp prepare(engine, prompts, known) do
    with {:ok, requests} <- Dataset.requests(engine.engine, prompts, known),
         :ok <- warm_up(engine.engine, requests, known.num_warmups),
         do: {:ok, Map.put(engine, :requests, requests)}
  end

  defp warm_up(_engine, _requests, 0), do: :ok

  defp warm_up(engine, requests, count) do
    {results, _seconds} =
      Load.run(engine, requests |> Stream.cycle() |> Enum.take(count), nil, nil)

    Enum.find(results, :ok, &match?({:error, _error}, &1))
  end

  # What was measured, the first round first: `{engine, concurrency, figures}`.
  defp rounds(engines, known, show) do
    turns =
      for round <- 1..known.rounds,
          concurrency <- List.wrap(known.max_concurrency || [nil]),
          # Nobody is always the first.
          engine <- if(rem(round, 2) == 1, do: engines, else: Enum.reverse(engines)),
          do: {round, concurrency, engine}

    Params.map(turns, fn {round, concurrency, engine} ->
      show.(fn ->
        at_a_time = if concurrency, do: ", #{concurrency} at a time", else: ""
        "#{engine.label}: round #{round} of #{known.rounds}#{at_a_time}"
      end)

      with {:ok, figures} <- turn(engine, concurrency, known),
           do: {:ok, {engine.label, concurrency, figures}}
    end)
  end

  defp turn(%{engine: engine, requests: requests}, concurrency, known) do
    with :ok <- VLLM.reset_prefix_cache(engine) do
      pids = Processes.of(engine)
      [cpu, own] = [Processes.cpu_seconds(pids), Processes.own_cpu_seconds()]
      arrivals = Dataset.arrivals(length(requests), known)
      {results, seconds} = Load.run(engine, requests, concurrency, arrivals)
      used = if pids != [], do: Processes.cpu_seconds(pids) - cpu
      {:ok, Figures.new(results, seconds, used, Processes.own_cpu_seconds() - own)}
    end
  end

  defp result(engines, rounds, prompts, known) do
    of = fn label, concurrency ->
      for {^label, ^concurrency, figures} <- rounds, do: figures
    end

    runs =
      for concurrency <- List.wrap(known.max_concurrency || [nil]),
          first = of.(hd(engines).label, concurrency),
          engine <- engines,
          do: run_of(engine, concurrency, of.(engine.label, concurrency), first)

    %__MODULE__{
      runs: runs,
      dataset: dataset(hd(engines).requests, prompts, known),
      settings: Map.drop(known, [:prompts, :against, :progress]),
      versions: Map.merge(VLLM.version(), %{elixir: System.version(), otp: System.otp_release()}),
      cores: System.schedulers_online()
    }
  end

  defp run_of(engine, concurrency, rounds, first) do
    rates = Enum.map(rounds, & &1.output_throughput)

    ratios =
      for {one, other} <- Enum.zip(rounds, first),
          rounds != first and other.output_throughput > 0,
          do: one.output_throughput / other.output_throughput

    engine
    |> Map.take([
      :model,
      :quantization,
      :kv_cache_dtype,
      :device,
      :replicas,
      :startup_seconds
    ])
    |> Map.merge(%{
      engine: engine.label,
      max_concurrency: concurrency,
      memory: engine.engine |> Processes.of() |> Processes.memory(),
      figures: Figures.together(rounds),
      rounds: rounds,
      output_throughput: Statistics.interval(rates),
      ratio: if(ratios != [], do: Statistics.interval(ratios))
    })
    |> then(&struct!(Run, &1))
  end

  defp dataset(requests, nil, known) do
    "#{length(requests)} prompts of #{known.random_input_len} random tokens, answers of " <>
      "#{known.random_output_len}#{around(known.random_range_ratio)}"
  end

  defp dataset(requests, _prompts, known) do
    tokens = requests |> Enum.map(& &1.input_len) |> Statistics.mean() |> round()

    "#{length(requests)} prompts that were given, of #{tokens} tokens on average, answers of " <>
      "#{known.output_len} at most"
  end

  defp around(ratio) when ratio == 0, do: ""
  defp around(ratio), do: " (± #{round(100 * ratio)} %)"

  @doc "All of it as JSON text."
  @spec to_json(t()) :: String.t()
  def to_json(%__MODULE__{} = bench), do: JSON.encode(bench)

  @doc """
  A picture of it, as the content of its file: output tokens per second with their 95 % interval, the ratio to the
  first engine where there are several, and the times to the first token (TTFT) and per output token
  (TPOT), from the median to the 99th percentile, over `max_concurrency`, as bars where there is only one;
  memory, and the start-up of engines that were started for it.

      File.write!("speed.png", VLLM.Bench.plot!(bench, format: :png))

  ## Options

  #{Options.docs(Options.plot())}

  The error is `:vllm_not_installed` where matplotlib is missing (`mix vllm.setup --with matplotlib`).
  """
  @spec plot(t(), keyword() | map()) :: {:ok, binary()} | {:error, Error.t()}
  def plot(%__MODULE__{} = bench, options \\ []) do
    VLLM.Plot.draw(bench.dataset, Plot.panels(bench.runs), options)
  end

  @doc "Like `plot/2`, but returns the picture or raises `VLLM.Error`."
  @spec plot!(t(), keyword() | map()) :: binary()
  def plot!(bench, options \\ []), do: bang!(plot(bench, options))

  @doc false
  @spec lines(t()) :: [IO.ANSI.ansidata()]
  def lines(%__MODULE__{} = bench), do: Report.lines(bench)

  defimpl String.Chars do
    def to_string(bench), do: bench |> VLLM.Bench.lines() |> Mix.Vllm.Table.plain()
  end

  defimpl Inspect do
    def inspect(bench, _opts), do: "#VLLM.Bench<\n#{bench}\n>"
  end
end
