# What a delta costs on its way: CPU microseconds on the BEAM and in the worker's Python.
#
#     MIX_ENV=prod elixir --erl "+sbwt none +sbwtdcpu none +sbwtdio none" -S mix run bench/deltas.exs \
#       [firehose|forwarded|paced|engine]
#
# `firehose` streams from a worker whose engine computes nothing (bench/bridge/worker.py), `forwarded` has its
# deltas sent to each reader (`VLLM.stream_to`). `paced`
# has a step of it each 10 ms, so that every delta wakes a process that has slept; beside it is what
# such a message alone costs, from one process of the BEAM to as many others (`floor`). `engine`
# streams from the demo model, and beside it, in turns, AsyncLLM's deltas are read in its own
# process (bench/beside.py): what Python's front end takes above that is the bridge's.
# CPU time is that of the process, so that a busy machine makes little of a difference; each figure is
# the median of the rounds, of which `ROUNDS=5` says how many; `STREAMS="64 256"` says which rows.

Logger.configure(level: :error)
Code.require_file("beside.exs", __DIR__)

defmodule Bench.Deltas do
  alias Bench.Beside
  alias VLLM.Bench.{Processes, Statistics}

  @streams for n <- String.split(System.get_env("STREAMS", "1 16 64 256")),
               do: String.to_integer(n)
  @rounds String.to_integer(System.get_env("ROUNDS", "5"))
  @options [enforce_eager: true, kv_cache_memory_bytes: 268_435_456, max_model_len: 1024]
  @prompt "The capital of France is"

  def run([]), do: run(["firehose", "forwarded", "paced", "engine"])
  def run(parts), do: for(part <- parts, do: run_one(part))

  # A step takes as long as one of the demo model's with 256 streams.
  defp run_one("paced") do
    System.put_env("EX_VLLM_BENCH_STEP", "0.01")
    without_engine("paced", fn _streams -> 200 end, fn streams -> [floor(streams, 200)] end)
    System.delete_env("EX_VLLM_BENCH_STEP")
  end

  defp run_one(name) when name in ["firehose", "forwarded"],
    do: without_engine(name, &max(div(100_000, &1), 500), fn _streams -> [] end)

  defp run_one("engine") do
    llm = VLLM.llm!(Beside.model(), [nursery: false] ++ @options)
    worker = worker(llm)
    beside = Beside.start("AsyncLLM", Beside.model(), @options)

    heading("engine", ["BEAM µs", "Python µs", "in-process", "above", "deltas/s", "in-process"])

    for streams <- @streams do
      tokens = div(16_384, max(streams, 64))

      figures =
        for _ <- 0..@rounds do
          one = ours(fn -> count(llm, tokens) end, worker, streams)
          before = Processes.cpu_seconds([Beside.pid(beside)])
          other = Beside.ask(beside, "stream", streams, 1, tokens, @prompt)
          cpu = Processes.cpu_seconds([Beside.pid(beside)]) - before
          [python, theirs] = [per(one.python, one.deltas), per(cpu, other.outputs)]
          rates = [one.deltas / one.seconds, other.outputs / other.seconds]
          [per(one.beam, one.deltas), python, theirs, python - theirs | rates]
        end

      row(streams, medians(tl(figures)))
    end

    Port.close(beside)
    VLLM.stop(llm)
  end

  defp without_engine(name, steps, beside) do
    read = if name == "forwarded", do: &forwarded/2, else: &count/2
    {:ok, python} = VLLM.Python.executable()
    System.put_env("EX_VLLM_BENCH_PYTHON", python)
    program = Path.expand("bridge/python", __DIR__)
    llm = VLLM.llm!("firehose", python: program, nursery: false, max_in_flight: 1024)
    worker = worker(llm)

    heading(
      name,
      ["BEAM µs", "Python µs", "deltas/s"] ++ if(name == "paced", do: ["floor"], else: [])
    )

    for streams <- @streams do
      tokens = steps.(streams)

      figures =
        for _ <- 0..@rounds do
          one = ours(fn -> read.(llm, tokens) end, worker, streams)

          [
            per(one.beam, one.deltas),
            per(one.python, one.deltas),
            one.deltas / one.seconds | beside.(streams)
          ]
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
    beam = Processes.own_cpu_seconds()

    for _ <- 1..steps do
      for {inbox, ref} <- addresses, do: send(ref, {inbox, ref, message})
      Process.sleep(10)
    end

    1.0e6 * (Processes.own_cpu_seconds() - beam) / (streams * steps)
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

  defp ours(read, worker, streams) do
    [python, beam, start] = [
      Processes.cpu_seconds([worker]),
      Processes.own_cpu_seconds(),
      System.monotonic_time()
    ]

    deltas =
      1..streams
      |> Enum.map(fn _ -> Task.async(read) end)
      |> Task.await_many(:infinity)
      |> Enum.sum()

    seconds =
      System.convert_time_unit(System.monotonic_time() - start, :native, :microsecond) / 1.0e6

    %{
      deltas: deltas,
      seconds: seconds,
      beam: Processes.own_cpu_seconds() - beam,
      python: Processes.cpu_seconds([worker]) - python
    }
  end

  defp count(llm, tokens) do
    stream = VLLM.stream!(llm, @prompt, options(tokens))
    Enum.reduce(stream, 0, fn %VLLM.Delta{}, count -> count + 1 end)
  end

  defp forwarded(llm, tokens),
    do: receive_deltas(VLLM.stream_to(llm, @prompt, self(), options(tokens)), 0)

  defp receive_deltas(ref, count) do
    receive do
      {:vllm, ^ref, %VLLM.Delta{}} -> receive_deltas(ref, count + 1)
      {:vllm, ^ref, {:done, _output}} -> count
    end
  end

  defp options(tokens), do: [temperature: 0.0, max_tokens: tokens, ignore_eos: true]

  defp per(seconds, deltas), do: 1.0e6 * seconds / deltas

  defp medians(rows) do
    for column <- Enum.zip_with(rows, & &1), do: Statistics.median(column)
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

  # Below its guard, which is the first.
  defp worker(llm) do
    [_guard | below] = Processes.of(llm)
    Enum.find(below, &(File.read!("/proc/#{&1}/cmdline") =~ ~r/-m\0vllm_bridge|worker\.py/))
  end
end

Bench.Deltas.run(System.argv())
