defmodule Bench.Beside do
  # vLLM in a Python program (beside.py), which streams and answers of this library are measured against.

  def start(program, model, options, environment \\ []) do
    {:ok, python} = VLLM.Python.executable()
    script = Path.expand("beside.py", __DIR__)
    values = for {name, value} <- options, do: ~s("#{name}": #{inspect(value)})
    args = [script, program, model, "{#{Enum.join(values, ", ")}}"]
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
