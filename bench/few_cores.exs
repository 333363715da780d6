# What few cores make of streams: ours beside vLLM as it starts by itself.
#
#     MIX_ENV=prod elixir --erl "+sbwt none +sbwtdcpu none +sbwtdio none" -S mix run bench/few_cores.exs
#
# In turns the demo model streams from an engine of this library (`ours`), from plain AsyncLLM read in
# its own process (`plain`, which has a process that computes and waits for it by spinning), and from AsyncLLM
# with the executor that this library takes on few cores (`uni`). CPU time is that of all
# processes, the BEAM too. Medians of the rounds, and their range; `ROUNDS=15` says how many, `STREAMS="1 16"`
# which rows.

Logger.configure(level: :error)
Code.require_file("beside.exs", __DIR__)

defmodule Bench.FewCores do
  alias Bench.Beside
  alias VLLM.Bench.{Processes, Statistics}

  @streams for n <- String.split(System.get_env("STREAMS", "1 16")), do: String.to_integer(n)
  @rounds String.to_integer(System.get_env("ROUNDS", "15"))
  @options [enforce_eager: true, kv_cache_memory_bytes: 268_435_456, max_model_len: 1024]
  @prompt "The capital of France is"
  @measures ["tokens/s", "CPU ms of 1,000", "p50 ms", "p99 ms"]

  # Readers of shared memory spin for a second after what they read last.
  @settle 1_200

  def run do
    llm = VLLM.llm!(Beside.model(), [nursery: false] ++ @options)
    plain = Beside.start("AsyncLLM", Beside.model(), @options)

    uni = Beside.start("AsyncLLM", Beside.model(), @options, "uni")

    ways = [
      ours: {&ours(llm, &1, &2), fn -> Processes.of(llm) end},
      plain: {&beside(plain, &1, &2), fn -> Processes.below(Beside.pid(plain)) end},
      uni: {&beside(uni, &1, &2), fn -> Processes.below(Beside.pid(uni)) end}
    ]

    for streams <- @streams do
      tokens = div(8_192, max(streams, 16))
      # The first round warms up.
      [_ | rounds] = for _ <- 0..@rounds, do: round(ways, streams, tokens)
      IO.puts("\n#{streams} streams, #{@rounds} rounds: median (from, to)")

      for {measure, at} <- Enum.with_index(@measures) do
        cells =
          for {name, _} <- ways, do: "#{name} " <> spread(for r <- rounds, do: at(r, name, at))

        ratio = for r <- rounds, do: at(r, :ours, at) / at(r, :plain, at)
        IO.puts("#{measure}: #{Enum.join(cells, ", ")}; ours/plain #{spread(ratio)}")
      end
    end

    for port <- [plain, uni], do: Port.close(port)
    VLLM.stop(llm)
  end

  defp at(round, name, at), do: Enum.at(round[name], at)

  defp spread(figures) do
    [low, middle, high] =
      for figure <- [Enum.min(figures), Statistics.median(figures), Enum.max(figures)],
          do: short(figure)

    "#{middle} (#{low}, #{high})"
  end

  defp short(figure) when figure > 100, do: round(figure)
  defp short(figure), do: Float.round(figure, 2)

  defp round(ways, streams, tokens) do
    for {name, {measure, pids}} <- Enum.shuffle(ways) do
      before = cpu(pids.())
      one = measure.(streams, tokens)
      used = cpu(pids.()) - before
      Process.sleep(@settle)
      {name, [one.tokens / one.seconds, 1.0e6 * used / one.tokens, one.p50, one.p99]}
    end
  end

  # The BEAM's too, which of the others only waits.
  defp cpu(pids), do: Processes.own_cpu_seconds() + Processes.cpu_seconds(pids)

  defp beside(port, streams, tokens), do: Beside.ask(port, "stream", streams, 1, tokens, @prompt)

  defp ours(llm, streams, tokens) do
    start = now()
    options = [temperature: 0.0, max_tokens: tokens, ignore_eos: true, timeout: :infinity]

    gaps =
      1..streams
      |> Enum.map(fn _ -> Task.async(fn -> gaps(VLLM.stream!(llm, @prompt, options)) end) end)
      |> Task.await_many(:infinity)
      |> Enum.concat()

    seconds = (now() - start) / 1000
    [p50, p99] = for percent <- [50, 99], do: Statistics.percentile(gaps, percent)
    %{tokens: streams * tokens, seconds: seconds, p50: p50, p99: p99}
  end

  defp gaps(stream) do
    {_last, gaps} =
      Enum.reduce(stream, {nil, []}, fn %VLLM.Delta{}, {last, gaps} ->
        now = now()
        {now, if(last, do: [now - last | gaps], else: gaps)}
      end)

    gaps
  end

  # In ms.
  defp now, do: System.convert_time_unit(System.monotonic_time(), :native, :microsecond) / 1000
end

Bench.FewCores.run()
