# What the bridge takes without an engine: calls, big answers, requests that wait, and whether what
# there is more of costs the others anything.
#
#     MIX_ENV=prod elixir --erl "+sbwt none +sbwtdcpu none +sbwtdio none +P 300000" -S mix run bench/bridge.exs \
#       [calls|embeddings|waiting|growth]
#
# PLOT=growth.svg has the curves of `growth` drawn, into that file.
#
# The worker's engine computes nothing (bench/bridge/worker.py); server, pipe, routing and structs are
# the real ones. Each figure is the median of the rounds (`ROUNDS=15`) with its 95 % interval by
# bootstrap. CPU time is that of the processes, BEAM and Python: it stays what it is on a busy machine.

Logger.configure(level: :error)

defmodule Bench.Bridge do
  alias VLLM.Bench.{Processes, Statistics}
  alias VLLM.Engine.{Call, InFlight, Router, Table}
  alias VLLM.Plot

  @rounds String.to_integer(System.get_env("ROUNDS", "15"))
  @parts ~w(calls embeddings waiting growth)

  def run([]), do: run(@parts)

  def run(parts) do
    {:ok, python} = VLLM.Python.executable()
    System.put_env("EX_VLLM_BENCH_PYTHON", python)
    IO.puts("#{@rounds} rounds; median (95 % interval)")
    Enum.each(parts, &part/1)
  end

  defp start(options \\ []) do
    program = Path.expand("bridge/python", __DIR__)

    VLLM.llm!(
      "nothing",
      [python: program, nursery: false, max_in_flight: 20_000, max_queue: 0] ++ options
    )
  end

  ## Calls: 1 KiB there and 1 KiB back

  defp part("calls") do
    llm = start()
    {:ok, table, _pid} = Table.lookup(llm)
    params = %{"text" => String.duplicate("x", 1024), "add_special_tokens" => true}

    call = fn ->
      {:ok, [%{"token_ids" => <<_::8192>>}]} =
        Router.map(&InFlight.new(table, "tokenize", &1), [params], Call.new(%{timeout: 60_000}))
    end

    # What such a message and its way back take of the machine, if nobody looks at it.
    cat = Port.open({:spawn_executable, System.find_executable("cat")}, [:binary])
    bytes = String.duplicate("x", 1024)

    echo = fn ->
      Port.command(cat, bytes)
      :ok = receive_bytes(cat, 1024)
    end

    measured =
      for _ <- 0..@rounds do
        bare = for _ <- 1..2000, do: elem(:timer.tc(echo), 0)
        alone = for _ <- 1..2000, do: elem(:timer.tc(call), 0)
        # Nothing is kept of what came: the heap that it would fill is collected again and again.
        one = used(llm, fn -> repeat(2000, call) end)
        many = used(llm, fn -> at_once(16, fn -> repeat(1000, call) end) end)

        [
          Statistics.median(bare),
          Statistics.median(alone),
          Statistics.percentile(alone, 99),
          1.0e6 * one.beam / 2000,
          1.0e6 * one.python / 2000,
          16_000 / many.seconds,
          1.0e6 * many.beam / 16_000,
          1.0e6 * many.python / 16_000
        ]
      end

    print("call of 1 KiB and its answer of 1 KiB", measured, [
      "`cat` by a bare port, p50 µs",
      "one caller, p50 µs",
      "one caller, p99 µs",
      "one caller, BEAM CPU µs",
      "one caller, Python CPU µs",
      "16 callers, calls/s",
      "16 callers, BEAM CPU µs",
      "16 callers, Python CPU µs"
    ])

    Port.close(cat)
    VLLM.stop(llm)
  end

  ## Embeddings

  defp part("embeddings") do
    llm = start()
    vectors = List.duplicate("1024", 4096)
    size = 4 * 1024 * 4096

    measured =
      for _ <- 0..@rounds do
        each = used(llm, fn -> [%{dimensions: 1024} | _] = VLLM.embed!(llm, vectors) end)
        one = used(llm, fn -> [%{shape: [4096, 1024]}] = VLLM.encode!(llm, "4096x1024") end)
        rate = fn used -> size / used.seconds / 1.0e9 end
        cpu = fn used -> 1000 * (used.beam + used.python) end
        [rate.(each), cpu.(each), rate.(one), cpu.(one)]
      end

    print("4,096 × 1,024 f32, 16 MiB", measured, [
      "4,096 vectors, GB/s",
      "4,096 vectors, CPU ms",
      "one tensor, GB/s",
      "one tensor, CPU ms"
    ])

    VLLM.stop(llm)
  end

  ## Requests that wait

  defp part("waiting") do
    count = 10_000

    measured =
      for _ <- 0..@rounds do
        # A new one each time: what Python has had once it keeps.
        llm = start()
        pids = Processes.of(llm)
        VLLM.generate!(llm, "now")
        before = {beam_memory(), Processes.memory(pids)}
        callers = for _ <- 1..count, do: wait(llm)
        await_in_flight(llm, count)
        # Each of them has been read and decoded when this has an answer.
        VLLM.generate!(llm, "now")
        held = {beam_memory(), Processes.memory(pids)}
        for caller <- callers, do: Process.exit(caller, :kill)
        VLLM.stop(llm)

        kib = fn at -> (elem(held, at) - elem(before, at)) / count / 1024 end
        [kib.(0), kib.(1), kib.(0) + kib.(1)]
      end

    names = ["BEAM, KiB", "Python, KiB", "both, KiB"]
    print("each of #{count} requests that wait, its caller's process included", measured, names)
  end

  ## Whether more of something costs the others

  defp part("growth") do
    llm = start()

    of_requests =
      for {what, counts, given} <- [
            {"options of a request (logit_bias)", [1, 10, 100, 1000, 10_000],
             fn n -> [logit_bias: Map.new(1..n, &{&1, 0.5})] end},
            {"stop strings of a request", [1, 10, 100, 1000],
             fn n -> [stop: List.duplicate("x", n)] end}
          ] do
        grown(what, counts, fn n ->
          options = given.(n)
          {llm, fn -> VLLM.generate!(llm, "now", options) end, fn -> :ok end}
        end)
      end

    waiting =
      grown("requests that wait beside it", [1, 10, 100, 1000, 10_000], fn n ->
        callers = for _ <- 1..n, do: wait(llm)
        await_in_flight(llm, n)

        {llm, fn -> VLLM.generate!(llm, "now") end,
         fn ->
           for caller <- callers, do: Process.exit(caller, :kill)
           await_in_flight(llm, 0)
         end}
      end)

    VLLM.stop(llm)

    # Engines without Python, because there are no places for a thousand.
    replicas =
      grown("replicas", [1, 10, 100, 1000], fn n ->
        llm = VLLM.Test.start!(script: fn _ -> "yes" end, replicas: n)
        {llm, fn -> VLLM.generate!(llm, "now") end, fn -> VLLM.stop(llm) end}
      end)

    draw(of_requests ++ [waiting, replicas], System.get_env("PLOT"))
  end

  defp grown(what, counts, prepare) do
    IO.puts("\n#{what}: CPU µs of a call (BEAM and Python)")

    points =
      for count <- counts do
        {llm, call, done} = prepare.(count)
        for _ <- 1..50, do: call.()

        costs =
          for _ <- 1..@rounds do
            used = used(llm, fn -> repeat(200, call) end)
            1.0e6 * (used.beam + used.python) / 200
          end

        done.()
        IO.puts(String.pad_leading("#{count}", 8) <> "  " <> interval(costs))
        {median, low, high} = Statistics.interval(costs)
        {count, median, {low, high}}
      end

    {what, points}
  end

  defp draw(_grown, nil), do: :ok

  defp draw(grown, path) do
    title = "CPU µs of a call, BEAM and Python, over how many there are"
    settings = [x: "how many", y: "µs", log_x: true, log_y: true]
    {:ok, picture} = Plot.draw(title, [Plot.panel("", "lines", grown, settings)], [])
    File.write!(path, picture)
  end

  ## Helpers

  defp receive_bytes(_port, 0), do: :ok

  defp receive_bytes(port, left) do
    receive do: ({^port, {:data, bytes}} -> receive_bytes(port, left - byte_size(bytes)))
  end

  defp wait(llm), do: spawn(fn -> VLLM.generate(llm, "wait", timeout: :infinity) end)

  defp await_in_flight(llm, count) do
    {:ok, replicas} = VLLM.replicas(llm)

    unless Enum.sum(for replica <- replicas, do: replica.in_flight) == count do
      Process.sleep(5)
      await_in_flight(llm, count)
    end
  end

  defp beam_memory do
    for pid <- Process.list(), do: :erlang.garbage_collect(pid)
    :erlang.memory(:total)
  end

  defp repeat(times, call), do: Enum.each(1..times, fn _ -> call.() end)

  defp at_once(callers, fun) do
    1..callers |> Enum.map(fn _ -> Task.async(fun) end) |> Task.await_many(:infinity)
  end

  defp used(llm, fun) do
    pids = Processes.of(llm)
    [python, beam] = [Processes.cpu_seconds(pids), Processes.own_cpu_seconds()]
    start = System.monotonic_time(:nanosecond)
    fun.()
    seconds = (System.monotonic_time(:nanosecond) - start) / 1.0e9

    %{
      seconds: seconds,
      beam: Processes.own_cpu_seconds() - beam,
      python: Processes.cpu_seconds(pids) - python
    }
  end

  # The first round warms up.
  defp print(title, [_ | measured], names) do
    IO.puts("\n" <> title)

    for {name, figures} <- Enum.zip(names, Enum.zip_with(measured, & &1)),
        do: IO.puts("  #{String.pad_trailing(name, 28)} #{interval(figures)}")
  end

  defp interval(figures) do
    {median, low, high} = Statistics.interval(figures)
    "#{number(median)} (#{number(low)} - #{number(high)})"
  end

  defp number(number) when number >= 1000, do: Integer.to_string(round(number))
  defp number(number), do: :erlang.float_to_binary(number / 1, decimals: 2)
end

Bench.Bridge.run(System.argv())
