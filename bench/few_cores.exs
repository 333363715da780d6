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

defmodule Bench.FewCores do
  alias VLLM.Engine.Table

  @streams for n <- String.split(System.get_env("STREAMS", "1 16")), do: String.to_integer(n)
  @rounds String.to_integer(System.get_env("ROUNDS", "15"))
  @model Application.app_dir(:ex_vllm, "priv/models/demo")
  @options [enforce_eager: true, kv_cache_memory_bytes: 268_435_456, max_model_len: 1024]
  @prompt "The capital of France is"
  @uni [{'VLLM_ENABLE_V1_MULTIPROCESSING', '0'}, {'OMP_NUM_THREADS', '1'}]
  @measures ["tokens/s", "CPU ms of 1,000", "p50 ms", "p99 ms"]

  # Readers of shared memory spin for a second after what they read last.
  @settle 1_200

  def run do
    llm = VLLM.llm!(@model, [nursery: false] ++ @options)
    {:ok, table, _pid} = Table.lookup(llm)
    {program, _conn} = Table.run(table, 1)
    plain = start(@options, [])
    uni = start([distributed_executor_backend: "uni"] ++ @options, @uni)

    ways = [
      ours: {&ours(llm, &1, &2), program.port},
      plain: {&in_process(plain, &1, &2), plain},
      uni: {&in_process(uni, &1, &2), uni}
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
    sorted = Enum.sort(figures)
    [low, middle, high] = for n <- [0, div(length(sorted), 2), -1], do: short(Enum.at(sorted, n))
    "#{middle} (#{low}, #{high})"
  end

  defp short(figure) when figure > 100, do: round(figure)
  defp short(figure), do: Float.round(figure, 2)

  defp round(ways, streams, tokens) do
    for {name, {measure, port}} <- Enum.shuffle(ways) do
      before = cpu(port)
      one = measure.(streams, tokens)
      used = cpu(port) - before
      Process.sleep(@settle)
      {name, [one.deltas / one.seconds, 1.0e6 * used / one.deltas, one.p50, one.p99]}
    end
  end

  defp ours(llm, streams, tokens) do
    start = now()
    options = [temperature: 0.0, max_tokens: tokens, ignore_eos: true, timeout: :infinity]

    gaps =
      1..streams
      |> Enum.map(fn _ -> Task.async(fn -> gaps(VLLM.stream!(llm, @prompt, options)) end) end)
      |> Task.await_many(:infinity)
      |> Enum.concat()

    seconds = (now() - start) / 1000
    sorted = Enum.sort(gaps)
    [p50, p99] = for share <- [0.5, 0.99], do: Enum.at(sorted, floor(share * length(sorted)))
    %{deltas: streams * tokens, seconds: seconds, p50: p50, p99: p99}
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

  ## CPU seconds of the BEAM and of all that a port has started

  defp cpu(port) do
    {:os_pid, pid} = Port.info(port, :os_pid)
    elem(:erlang.statistics(:runtime), 0) / 1000 + cpu_of_tree("#{pid}")
  end

  defp cpu_of_tree(pid) do
    [_, after_name] = String.split(File.read!("/proc/#{pid}/stat"), ") ", parts: 2)
    [user, system] = after_name |> String.split() |> Enum.slice(11, 2)

    children =
      for file <- Path.wildcard("/proc/#{pid}/task/*/children"),
          child <- String.split(File.read!(file)),
          do: cpu_of_tree(child)

    # In ticks of 10 ms.
    (String.to_integer(user) + String.to_integer(system)) / 100 + Enum.sum(children)
  end

  ## AsyncLLM in its own process

  defp start(options, environment) do
    {:ok, python} = VLLM.Python.executable()
    json = Enum.map_join(options, ", ", fn {name, value} -> ~s("#{name}": #{inspect(value)}) end)
    args = [Path.expand("deltas/in_process.py", __DIR__), @model, "{#{json}}"]
    options = [:binary, line: 1000, args: args, env: environment]
    port = Port.open({:spawn_executable, python}, options)
    "ready" = line(port)
    port
  end

  defp in_process(port, streams, tokens) do
    Port.command(port, "#{streams} #{tokens} #{@prompt}\n")
    line = line(port)

    Map.new(~w(deltas seconds p50 p99)a, fn name ->
      [figure] = Regex.run(~r/"#{name}": ([\d.]+)/, line, capture: :all_but_first)
      {name, figure |> Float.parse() |> elem(0)}
    end)
  end

  defp line(port) do
    receive do
      {^port, {:data, {:eol, line}}} -> line
    end
  end
end

Bench.FewCores.run()
