# What a delta costs on its way: CPU microseconds on the BEAM and in the worker's Python.
#
#     MIX_ENV=prod elixir --erl "+sbwt none +sbwtdcpu none +sbwtdio none" -S mix run bench/deltas.exs [firehose|paced|engine]
#
# `firehose` streams from a worker whose engine computes nothing (bench/deltas/firehose.py). `paced`
# has a step of it each 10 ms, so that every delta wakes a process that has slept; beside it is what
# such a message alone costs, from one process of the BEAM to as many others (`floor`). `engine`
# streams from the demo model, and beside it, in turns, AsyncLLM's deltas are read in its own
# process (bench/deltas/in_process.py): what Python's front end takes above that is the bridge's.
# CPU time is that of the process, so that a busy machine makes little of a difference; each figure is
# the median of the rounds, of which `ROUNDS=5` says how many; `STREAMS="64 256"` says which rows.

Logger.configure(level: :error)

defmodule Bench.Deltas do
  alias VLLM.Engine.Table

  @streams for n <- String.split(System.get_env("STREAMS", "1 16 64 256")),
               do: String.to_integer(n)
  @rounds String.to_integer(System.get_env("ROUNDS", "5"))
  @model Application.app_dir(:ex_vllm, "priv/models/demo")
  @options [enforce_eager: true, kv_cache_memory_bytes: 268_435_456, max_model_len: 1024]
  @prompt "The capital of France is"

  def run([]), do: run(["firehose", "paced", "engine"])
  def run(parts), do: for(part <- parts, do: run_one(part))

  # A step takes as long as one of the demo model's with 256 streams.
  defp run_one("paced") do
    System.put_env("EX_VLLM_BENCH_STEP", "0.01")
    without_engine("paced", 100, fn streams -> [floor(streams, 100)] end)
    System.delete_env("EX_VLLM_BENCH_STEP")
  end

  defp run_one("firehose"), do: without_engine("firehose", 500, fn _streams -> [] end)

  defp run_one("engine") do
    llm = VLLM.llm!(@model, [nursery: false] ++ @options)
    worker = worker(llm)
    beside = start_in_process()

    heading("engine", ["BEAM µs", "Python µs", "in-process", "above", "deltas/s", "in-process"])

    for streams <- @streams do
      tokens = div(16_384, max(streams, 64))

      figures =
        for _ <- 0..@rounds do
          one = ours(llm, worker, streams, tokens)
          other = in_process(beside, streams, tokens)
          [python, theirs] = [per(one.python, one), per(other.cpu, other)]
          rates = [one.deltas / one.seconds, other.deltas / other.seconds]
          [per(one.beam, one), python, theirs, python - theirs | rates]
        end

      row(streams, medians(tl(figures)))
    end

    Port.close(beside)
    VLLM.stop(llm)
  end

  defp without_engine(name, steps, beside) do
    {:ok, python} = VLLM.Python.executable()
    System.put_env("EX_VLLM_BENCH_PYTHON", python)
    program = Path.expand("deltas/python", __DIR__)
    llm = VLLM.llm!("firehose", python: program, nursery: false, max_in_flight: 1024)
    worker = worker(llm)

    heading(
      name,
      ["BEAM µs", "Python µs", "deltas/s"] ++ if(name == "paced", do: ["floor"], else: [])
    )

    for streams <- @streams do
      tokens = max(div(200 * steps, streams), steps)

      figures =
        for _ <- 0..@rounds do
          one = ours(llm, worker, streams, tokens)
          [per(one.beam, one), per(one.python, one), one.deltas / one.seconds | beside.(streams)]
        end

      # The first warms up.
      row(streams, medians(tl(figures)))
    end

    VLLM.stop(llm)
  end

  # Each process has an address that ends with its stream, as a reader has.
  defp floor(streams, steps) do
    owner = self()

    addresses =
      for _ <- 1..streams do
        spawn_link(fn -> receive_all(owner, steps) end)
        receive do: ({:address, address} -> address)
      end

    message = {:delta, " token", [1234]}
    beam = beam_cpu()

    for _ <- 1..steps do
      for {inbox, ref} <- addresses, do: send(ref, {inbox, ref, message})
      Process.sleep(10)
    end

    1.0e6 * (beam_cpu() - beam) / (streams * steps)
  end

  defp receive_all(owner, messages) do
    inbox = make_ref()
    ref = :erlang.monitor(:process, owner, alias: :demonitor, tag: inbox)
    send(owner, {:address, {inbox, ref}})
    receive_all_of(inbox, messages)
  end

  defp receive_all_of(_inbox, 0), do: :ok

  defp receive_all_of(inbox, messages) do
    receive do: ({^inbox, _ref, _message} -> receive_all_of(inbox, messages - 1))
  end

  defp ours(llm, worker, streams, tokens) do
    [python, beam, start] = [cpu(worker), beam_cpu(), System.monotonic_time()]

    deltas =
      1..streams
      |> Enum.map(fn _ -> Task.async(fn -> count(llm, tokens) end) end)
      |> Task.await_many(:infinity)
      |> Enum.sum()

    seconds =
      System.convert_time_unit(System.monotonic_time() - start, :native, :microsecond) / 1.0e6

    %{deltas: deltas, seconds: seconds, beam: beam_cpu() - beam, python: cpu(worker) - python}
  end

  defp count(llm, tokens) do
    options = [temperature: 0.0, max_tokens: tokens, ignore_eos: true]
    Enum.reduce(VLLM.stream!(llm, @prompt, options), 0, fn %VLLM.Delta{}, count -> count + 1 end)
  end

  defp per(seconds, %{deltas: deltas}), do: 1.0e6 * seconds / deltas

  defp medians(rows) do
    for column <- Enum.zip_with(rows, & &1), do: Enum.at(Enum.sort(column), div(length(rows), 2))
  end

  defp heading(part, names) do
    IO.puts("\n#{part}, #{@rounds} rounds\nstreams" <> Enum.map_join(names, &pad/1))
  end

  defp row(streams, figures) do
    cells =
      for figure <- figures do
        pad(if abs(figure) > 1000, do: "#{round(figure)}", else: "#{Float.round(figure, 2)}")
      end

    IO.puts(String.pad_leading("#{streams}", 7) <> Enum.join(cells))
  end

  defp pad(text), do: String.pad_leading(text, 12)

  ## CPU seconds

  # Of all threads of the VM.
  defp beam_cpu, do: elem(:erlang.statistics(:runtime), 0) / 1000

  defp cpu(pid) do
    [_, after_name] = String.split(File.read!("/proc/#{pid}/stat"), ") ", parts: 2)
    [user, system] = after_name |> String.split() |> Enum.slice(11, 2)
    # In ticks of 10 ms.
    (String.to_integer(user) + String.to_integer(system)) / 100
  end

  # The worker is a child of its guard, whose pid is in the lock of the run folder.
  defp worker(llm) do
    {:ok, table, _pid} = Table.lookup(llm)
    {%{run_dir: run_dir}, _conn} = Table.run(table, 1)
    [_, guard | _] = String.split(File.read!("#{run_dir}/lock"))
    children = String.split(File.read!("/proc/#{guard}/task/#{guard}/children"))

    Enum.find(children, fn pid ->
      File.read!("/proc/#{pid}/cmdline") =~ ~r/-m\0vllm_bridge|firehose/
    end)
  end

  ## In-process

  defp start_in_process do
    {:ok, python} = VLLM.Python.executable()
    options = for {name, value} <- @options, do: ~s("#{name}": #{value})
    script = Path.expand("deltas/in_process.py", __DIR__)
    args = [script, @model, "{#{Enum.join(options, ", ")}}"]
    port = Port.open({:spawn_executable, python}, [:binary, line: 1000, args: args])
    "ready" = line(port)
    port
  end

  defp in_process(port, streams, tokens) do
    Port.command(port, "#{streams} #{tokens} #{@prompt}\n")

    ~r/"deltas": (\d+), "cpu": ([\d.]+), "seconds": ([\d.]+)/
    |> Regex.run(line(port), capture: :all_but_first)
    |> then(fn [deltas, cpu, seconds] ->
      %{deltas: String.to_integer(deltas), cpu: float(cpu), seconds: float(seconds)}
    end)
  end

  defp float(text), do: text |> Float.parse() |> elem(0)

  defp line(port) do
    receive do
      {^port, {:data, {:eol, line}}} -> line
    end
  end
end

Bench.Deltas.run(System.argv())
