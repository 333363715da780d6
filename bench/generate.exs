# `generate`, `stream` and a list of prompts beside vLLM in its own process: the same model (the demo
# model, or another one: `MODEL=FOLDER`) with the same options, asked in turns. What else each side takes is its default;
# `EXECUTOR=uni` has the other side take the executor that this library takes on few cores.
#
#     MIX_ENV=prod elixir --erl "+sbwt none +sbwtdcpu none +sbwtdio none" -S mix run bench/generate.exs \
#       [final|stream|list|serve-final|serve-stream]
#
# `final` and `stream` have callers at once (`CALLERS="1 16 64 256"`) that each ask one request after
# another, beside AsyncLLM in a Python program, and with `serve-` beside `vllm serve`, asked over HTTP by
# Python's aiohttp; `list` is one `generate` of many prompts (`PROMPTS="256 1024 4096"`) beside `LLM.generate`. Each ratio (tokens/s, and CPU) is the median over the rounds (`ROUNDS=15`) of what both had in
# the same round, with its 95 % interval by bootstrap; of streams also how long the first delta and the next
# ones take (p50). `CALLERS=10000 TOKENS=4` has 10,000 requests in flight. CPU is that of all processes of a side: BEAM,
# worker and vLLM's own of ours.

Logger.configure(level: :error)
Code.require_file("beside.exs", __DIR__)

defmodule Bench.Generate do
  alias Bench.Beside
  alias VLLM.Bench.{Dataset, Load, Processes, Statistics}

  @rounds String.to_integer(System.get_env("ROUNDS", "15"))
  @tokens String.to_integer(System.get_env("TOKENS", "32"))

  @peers [
    {"AsyncLLM", ~w(final stream)},
    {"LLM", ~w(list)},
    {"serve", ~w(serve-final serve-stream)}
  ]

  def run([]), do: @peers |> Enum.flat_map(&elem(&1, 1)) |> run()

  def run(kinds) do
    llm = VLLM.llm!(Beside.model(), [nursery: false, max_queue: 20_000] ++ Beside.options())

    for {program, own} <- @peers,
        mine = Enum.filter(kinds, &(&1 in own)),
        mine != [] do
      beside = Beside.start(program, Beside.model(), Beside.options(), System.get_env("EXECUTOR"))
      for kind <- mine, count <- counts(kind), do: row(kind, count, llm, beside)
      Port.close(beside)
    end

    VLLM.stop(llm)
  end

  defp counts("list"), do: numbers("PROMPTS", "256 1024 4096")
  defp counts(_callers), do: numbers("CALLERS", "1 16 64 256")

  defp numbers(name, default),
    do: for(word <- String.split(System.get_env(name, default)), do: String.to_integer(word))

  # About as many tokens in each row, but for one caller, who is slow.
  defp requests("list", _count), do: 1
  defp requests(_kind, 1), do: 32
  defp requests(_kind, callers), do: max(div(512, callers), 1)

  defp row(part, count, llm, beside) do
    kind = String.replace_prefix(part, "serve-", "")
    requests = requests(kind, count)
    pid = Beside.pid(beside)

    rounds =
      Beside.rounds(@rounds,
        ours: fn ->
          Beside.measured(Processes.of(llm), true, fn -> ours(kind, count, requests, llm) end)
        end,
        theirs: fn ->
          Beside.measured(Processes.below(pid), false, fn ->
            Beside.ask(beside, kind, count, requests, @tokens, Beside.prompt())
          end)
        end
      )

    what = if kind == "list", do: "prompts in a list", else: "callers, #{requests} requests each"
    IO.puts("\n#{part}: #{count} #{what}, #{@tokens} tokens; #{@rounds} rounds")

    Beside.print(
      rounds,
      latencies(kind) ++
        [
          {"tokens/s, ours", &(&1.ours.tokens / &1.ours.seconds)},
          {"tokens/s, theirs", &(&1.theirs.tokens / &1.theirs.seconds)},
          {"ratio", &(&1.theirs.seconds / &1.ours.seconds)},
          {"CPU ms of 1,000 tokens, ours", &(1.0e6 * &1.ours.cpu / &1.ours.tokens)},
          {"CPU ms of 1,000 tokens, theirs", &(1.0e6 * &1.theirs.cpu / &1.theirs.tokens)},
          {"of ours the BEAM's", &(1.0e6 * &1.ours.beam / &1.ours.tokens)},
          {"CPU ratio", &(&1.ours.cpu / &1.theirs.cpu)}
        ]
    )
  end

  defp latencies("stream") do
    [
      {"p50 until the first delta, ms more", &(&1.ours.first - &1.theirs.first)},
      {"p50 between deltas, ratio", &(&1.ours.p50 / &1.theirs.p50)}
    ]
  end

  defp latencies(_whole), do: []

  defp ours("list", count, _requests, llm) do
    timed(fn ->
      prompts = for number <- 0..(count - 1), do: "#{Beside.prompt()} #{number}"
      Enum.map(VLLM.generate!(llm, prompts, options()), &whole/1)
    end)
  end

  defp ours(kind, callers, requests, llm) do
    timed(fn ->
      1..callers
      |> Enum.map(fn _ -> Task.async(fn -> for _ <- 1..requests, do: ask(kind, llm) end) end)
      |> Task.await_many(:infinity)
      |> Enum.concat()
    end)
  end

  defp ask("final", llm), do: llm |> VLLM.generate!(Beside.prompt(), options()) |> hd() |> whole()

  defp ask("stream", llm) do
    request = %Dataset{input: {:prompt, Beside.prompt()}, input_len: 1, options: options()}
    {:ok, noted} = Load.ask(llm, request)
    noted
  end

  defp whole(output), do: %{output_len: length(hd(output.outputs).token_ids), ttft: 0.0, itls: []}

  defp options, do: [temperature: 0.0, max_tokens: @tokens, ignore_eos: true, timeout: :infinity]

  defp timed(fun) do
    {microseconds, noted} = :timer.tc(fun)
    gaps = Enum.flat_map(noted, & &1.itls)

    %{
      seconds: microseconds / 1.0e6,
      tokens: noted |> Enum.map(& &1.output_len) |> Enum.sum(),
      first: 1000 * Statistics.median(Enum.map(noted, & &1.ttft)),
      p50: if(gaps != [], do: 1000 * Statistics.median(gaps))
    }
  end
end

Bench.Generate.run(System.argv())
