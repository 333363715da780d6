# The server on an engine of this library beside vLLM's own server: both on loopback, with the same model and the same
# options, asked by the same client of Python (beside.py) in turns.
#
#     MIX_ENV=prod elixir --erl "+sbwt none +sbwtdcpu none +sbwtdio none" -S mix run bench/http_overhead.exs [final|stream]
#
# `CLIENTS="1 64 256"` ask one request after another for `TOKENS=32` tokens each; one alone asks for a single one,
# so that what is added is not lost in what the engine takes. Of each row: how much longer
# half of the requests took with ours (to the whole answer, or to the first delta), and tokens/s and CPU as
# ratios, where CPU is that of all processes of a side, its client among them. Each is the median over the rounds (`ROUNDS=7`) of what both had in
# the same one, with its 95 % interval by bootstrap.

Logger.configure(level: :error)
Code.require_file("beside.exs", __DIR__)

defmodule Bench.HTTPOverhead do
  alias Bench.Beside
  alias VLLM.Bench.Processes

  @rounds String.to_integer(System.get_env("ROUNDS", "7"))
  @tokens String.to_integer(System.get_env("TOKENS", "32"))

  def run([]), do: run(~w(final stream))

  def run(kinds) do
    llm = VLLM.llm!(Beside.model(), [nursery: false] ++ Beside.options())
    {:ok, server} = VLLM.Server.start_link(models: [llm], port: 0)
    url = String.replace_suffix(VLLM.Server.url(server), "/v1", "")
    ours = Beside.start("client", Beside.model(), url: url)

    # With the executor that this library takes on few cores: the difference is to be that of the servers.
    theirs = Beside.start("serve", Beside.model(), Beside.options(), "uni")

    counts =
      for word <- String.split(System.get_env("CLIENTS", "1 64 256")),
          do: String.to_integer(word)

    for kind <- kinds, count <- counts, do: row(kind, count, llm, ours, theirs)
    for port <- [ours, theirs], do: Port.close(port)
    VLLM.stop(llm)
  end

  # About as many tokens in each row, but for one client, who is slow.
  defp requests(1), do: {200, 1}
  defp requests(clients), do: {max(div(512, clients), 1), @tokens}

  defp row(kind, count, llm, ours, theirs) do
    {requests, tokens} = requests(count)
    ask = &Beside.ask(&1, kind, count, requests, tokens, Beside.prompt())

    rounds =
      Beside.rounds(@rounds,
        ours: fn ->
          pids = Processes.of(llm) ++ Processes.below(Beside.pid(ours))
          Beside.measured(pids, true, fn -> ask.(ours) end)
        end,
        theirs: fn ->
          Beside.measured(Processes.below(Beside.pid(theirs)), false, fn -> ask.(theirs) end)
        end
      )

    IO.puts("\n#{kind}: #{count} clients, #{requests} requests each of #{tokens} tokens")

    Beside.print(rounds, [
      {"p50, ms, theirs", & &1.theirs.first},
      {"p50, ms more", &(&1.ours.first - &1.theirs.first)},
      {"tokens/s, theirs", &(&1.theirs.tokens / &1.theirs.seconds)},
      {"tokens/s, ratio", &(&1.theirs.seconds / &1.ours.seconds)},
      {"CPU, ratio", &(&1.ours.cpu / &1.theirs.cpu)},
      {"of ours the BEAM's", &(&1.ours.beam / &1.ours.cpu)}
    ])
  end
end

Bench.HTTPOverhead.run(System.argv())
