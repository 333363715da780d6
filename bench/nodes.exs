# What it costs to call an engine from another node: two BEAMs on loopback, `e` with a worker whose engine
# computes nothing (bench/bridge/worker.py), `c` that calls it. Latencies are of an engine that answers from a script.
#
#     MIX_ENV=prod mix run bench/nodes.exs
#
# CPU microseconds per delta are those of a BEAM, so that a busy machine makes little of a difference, at home
# and over nodes in turns. Latencies are the lower quartile of a thousand. `ROUNDS=5` says how many medians are of, `STREAMS=1,16` how many
# streams are read at once.

Logger.configure(level: :error)

{:module, side, code, _} =
  defmodule Bench.Nodes.Side do
    # What a node is told to do; its code is sent there.

    def serve(python, program) do
      {:ok, _} = Application.ensure_all_started(:ex_vllm)
      System.put_env("EX_VLLM_BENCH_PYTHON", python)
      options = [name: Bench, model: "firehose", python: program, nursery: false]
      spec = VLLM.child_spec(options ++ [max_in_flight: 1024])
      {:ok, _} = DynamicSupervisor.start_child(VLLM.EngineSupervisor, spec)
      VLLM.await_ready!(Bench)
      script = VLLM.Test.child_spec(name: Script, script: "x")
      {:ok, _} = DynamicSupervisor.start_child(VLLM.EngineSupervisor, script)
      VLLM.await_ready!(Script)
    end

    def read(engine, streams, tokens) do
      options = [max_tokens: tokens, ignore_eos: true, timeout: :infinity]

      1..streams
      |> Enum.map(fn _ ->
        Task.async(fn -> Enum.count(VLLM.stream!(engine, "x", options), & &1) end)
      end)
      |> Task.await_many(:infinity)
      |> Enum.sum()
    end

    # In microseconds.
    def cpu, do: 1.0e6 * VLLM.Bench.Processes.own_cpu_seconds()

    # Bytes to other nodes.
    def sent do
      for {_node, port} <- :erlang.system_info(:dist_ctrl), reduce: 0 do
        sum ->
          {:ok, [send_oct: bytes]} = :inet.getstat(port, [:send_oct])
          sum + bytes
      end
    end

    # The lower quartile of the microseconds until an answer and until a first delta.
    def latency(engine) do
      for call <- [
            fn -> VLLM.generate!(engine, "x", max_tokens: 1) end,
            fn -> Enum.take(VLLM.stream!(engine, "x", max_tokens: 1), 1) end
          ] do
        times = for _ <- 1..1000, do: elem(:timer.tc(call), 0)
        Enum.at(Enum.sort(times), 250)
      end
    end
  end

defmodule Bench.Nodes do
  @rounds String.to_integer(System.get_env("ROUNDS", "5"))
  @streams "STREAMS"
           |> System.get_env("1,16,64,256")
           |> String.split(",")
           |> Enum.map(&String.to_integer/1)

  def run(side, code) do
    [e, c] = for n <- 1..2, do: start(n)
    for peer <- [e, c], do: {:module, _} = call(peer, :code, :load_binary, [side, 'nodes', code])
    {:ok, python} = VLLM.Python.executable()
    :ok = call(e, side, :serve, [python, Path.expand("bridge/python", __DIR__)])
    {:ok, _} = call(c, :application, :ensure_all_started, [:ex_vllm])

    rows =
      for _ <- 0..@rounds,
          do: call(e, side, :latency, [Script]) ++ call(c, side, :latency, [far(e, Script)])

    [answer, first, far_answer, far_first] = medians(tl(rows))
    IO.puts("answer, µs: #{answer} at home, #{far_answer} over nodes")
    IO.puts("first delta, µs: #{first} at home, #{far_first} over nodes")
    IO.puts("\nstreams   at home   engine's node   caller's node   both   bytes")

    for streams <- @streams do
      tokens = max(div(60_000, streams), 300)

      rows =
        for _ <- 0..@rounds do
          [home, _none, _bytes] = measured([e, c], e, side, [Bench, streams, tokens])
          [there, here, bytes] = measured([e, c], c, side, [far(e, Bench), streams, tokens])
          [home, there, here, there + here, bytes]
        end

      IO.puts(Enum.map_join([streams | medians(tl(rows))], "   ", &"#{Float.round(&1 / 1, 2)}"))
    end
  end

  defp far(peer, name), do: {name, call(peer, :erlang, :node, [])}

  # CPU microseconds per delta on each of the nodes, and bytes per delta from the first one.
  defp measured([engines | _] = peers, reader, side, args) do
    look = fn ->
      for(peer <- peers, do: call(peer, side, :cpu, [])) ++ [call(engines, side, :sent, [])]
    end

    before = look.()
    deltas = call(reader, side, :read, args)
    for {now, was} <- Enum.zip(look.(), before), do: (now - was) / deltas
  end

  defp medians(rows) do
    for column <- Enum.zip_with(rows, & &1), do: Enum.at(Enum.sort(column), div(length(rows), 2))
  end

  # Without epmd: all have the same port, each on an address of its own.
  defp start(n) do
    args =
      ~w(-setcookie bench -start_epmd false -erl_epmd_port 33217 +sbwt none +sbwtdcpu none) ++
        ~w(+sbwtdio none -kernel logger_level none inet_dist_use_interface {127,77,7,#{n}}) ++
        ~w(inet_dist_listen_min 33217 inet_dist_listen_max 33217) ++
        Enum.flat_map(:code.get_path(), &["-pa", to_string(&1)])

    {:ok, peer, _node} =
      :peer.start_link(%{
        name: :bench,
        host: '127.77.7.#{n}',
        longnames: true,
        connection: :standard_io,
        args: Enum.map(args, &to_charlist/1)
      })

    peer
  end

  defp call(peer, module, function, args), do: :peer.call(peer, module, function, args, :infinity)
end

Bench.Nodes.run(side, code)
