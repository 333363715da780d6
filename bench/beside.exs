defmodule Bench.Beside do
  # vLLM in a Python program (beside.py), which streams and answers of this library are measured against.

  alias VLLM.Bench.{Processes, Statistics}

  # vLLM's readers of shared memory spin for a second after what they read last, in ms.
  @settle 1_200

  @doc "What both sides are started with, and asked."
  def options do
    [
      enforce_eager: true,
      kv_cache_memory_bytes: 268_435_456,
      max_model_len: 1024,
      max_num_seqs: 256,
      max_num_batched_tokens: 4096,
      enable_prefix_caching: false
    ]
  end

  def prompt, do: "The capital of France is"

  @doc "The model that is asked: the demo model, or what `MODEL=FOLDER` says (see two_layers.py)."
  def model, do: System.get_env("MODEL", Application.app_dir(:ex_vllm, "priv/models/demo"))

  # The executor that this library takes on few cores.
  @uni [{'VLLM_ENABLE_V1_MULTIPROCESSING', '0'}, {'OMP_NUM_THREADS', '1'}]

  def start(program, model, options, executor \\ nil)

  def start(program, model, options, "uni"),
    do: open(program, model, [distributed_executor_backend: "uni"] ++ options, @uni)

  def start(program, model, options, nil), do: open(program, model, options, [])

  defp open(program, model, options, environment) do
    {:ok, python} = VLLM.Python.executable()
    script = Path.expand("beside.py", __DIR__)
    values = for {name, value} <- options, do: ~s("#{name}": #{inspect(value)})
    args = [script, program, model, "{#{Enum.join(values, ", ")}}"]
    environment = [{'PYTHONPATH', '#{Path.expand("beside", __DIR__)}'} | environment]
    settings = [:binary, :exit_status, line: 1000, args: args, env: environment]
    port = Port.open({:spawn_executable, python}, settings)
    "ready" = line(port)
    port
  end

  def pid(port), do: port |> Port.info(:os_pid) |> elem(1)

  # Seconds, tokens, outputs, and milliseconds: the median until the first output, the median and
  # the 99th percentile from one to the next.
  def ask(port, kind, count, requests, tokens, prompt) do
    Port.command(port, "#{kind} #{count} #{requests} #{tokens} #{prompt}\n")

    ~w(seconds tokens outputs first p50 p99)a
    |> Enum.zip(for word <- String.split(line(port)), do: elem(Float.parse(word), 0))
    |> Map.new()
  end

  @doc "What both sides, functions, have in so many rounds, after one that does not count; nobody is always the first."
  def rounds(count, sides) do
    [_ | rounds] =
      for round <- 0..count do
        sides = if rem(round, 2) == 0, do: sides, else: Enum.reverse(sides)

        for {side, measure} <- sides, into: %{} do
          Process.sleep(@settle)
          {side, measure.()}
        end
      end

    rounds
  end

  @doc "The figures of what is done, with the CPU seconds of these processes and of this BEAM, if it is one of the side's."
  def measured(pids, beam?, ask) do
    [cpu, beam] = [Processes.cpu_seconds(pids), Processes.own_cpu_seconds()]
    figures = ask.()
    beam = if beam?, do: Processes.own_cpu_seconds() - beam, else: 0.0
    Map.merge(figures, %{beam: beam, cpu: Processes.cpu_seconds(pids) - cpu + beam})
  end

  @doc "Prints what functions make of rounds: medians with their 95 % interval by bootstrap."
  def print(rounds, figures) do
    for {name, value} <- figures do
      {median, low, high} = rounds |> Enum.map(value) |> Statistics.interval()
      IO.puts("  #{String.pad_trailing(name, 36)} #{show(median)} (#{show(low)} - #{show(high)})")
    end
  end

  defp show(number) when abs(number) >= 100, do: Integer.to_string(round(number))
  defp show(number), do: :erlang.float_to_binary(number / 1, decimals: 3)

  defp line(port) do
    receive do
      {^port, {:data, {:eol, line}}} -> line
      {^port, {:data, {:noeol, _part}}} -> line(port)
      {^port, {:exit_status, status}} -> raise "The program beside has ended with #{status}."
    end
  end
end
