defmodule Bench.Beside do
  # vLLM in a Python program (beside.py), which streams and answers of this library are measured against.

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

  defp line(port) do
    receive do
      {^port, {:data, {:eol, line}}} -> line
      {^port, {:data, {:noeol, _part}}} -> line(port)
      {^port, {:exit_status, status}} -> raise "The program beside has ended with #{status}."
    end
  end
end
