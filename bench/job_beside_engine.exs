# How much a job takes of an engine that serves beside it: tokens/s of an engine with eight callers,
# alone and while a model is quantized, in rounds that take turns; and which share of the cores the
# processes of the job had meanwhile. With the workers of the job as far back as they are by default,
# not at all, as far as can be, and with one thread.
#
#     mix run bench/job_beside_engine.exs [ROUNDS]
#
# What else runs on the machine takes from both, so that a busy one shows too small a share.

unless Mix.env() == :test do
  Code.require_file(Path.expand("../test/support/demo_model.ex", __DIR__))
end

defmodule Bench.JobBesideEngine do
  alias VLLM.Bench.{Processes, Statistics}
  alias VLLM.{DemoModel, Job}

  @callers 8

  # How long the engine is looked at alone, and how often while the job runs, in ms.
  @alone 10_000
  @slice 500

  @ways [
    {"nice 10 (default)", []},
    {"nice 0", [nice: 0]},
    {"nice 19", [nice: 19]},
    {"nice 10, 1 thread", [threads: 1]}
  ]

  def run(rounds) do
    llm = DemoModel.start!()
    tokens = :counters.new(1, [])
    for _ <- 1..@callers, do: spawn_link(fn -> ask(llm, tokens) end)
    Process.sleep(@alone)

    for {name, options} <- @ways do
      pairs = for _ <- 1..rounds, do: {[look(tokens, @alone)], beside(tokens, options)}
      ratio = Statistics.median(for {alone, beside} <- pairs, do: rate(beside) / rate(alone))
      share = pairs |> Enum.flat_map(&elem(&1, 1)) |> share()

      each =
        Enum.map_join(pairs, ", ", fn {alone, beside} ->
          "#{round(rate(alone))} -> #{round(rate(beside))}"
        end)

      IO.puts(
        "#{String.pad_trailing(name, 18)} #{percent(1 - ratio)} fewer tokens/s, the job had " <>
          "#{percent(share)} of the cores (#{each})"
      )
    end
  end

  defp ask(llm, tokens) do
    [output] = VLLM.generate!(llm, "Count:", max_tokens: 16, ignore_eos: true, temperature: 0.0)
    :counters.add(tokens, 1, length(hd(output.outputs).token_ids))
    ask(llm, tokens)
  end

  # While an output is made; what comes before and after is next to no computing.
  defp beside(tokens, options) do
    name = "beside-#{System.unique_integer([:positive])}"
    options = [name: name, to: [gptq: [], awq: []], verify: false] ++ options
    job = Job.quantize!(DemoModel.path(), options)
    slices = slices(job, tokens, [])
    :ok = Job.delete(job, outputs: true)
    slices
  end

  defp slices(job, tokens, slices) do
    before = Job.get!(job).state
    slice = look(tokens, @slice)

    case Job.get!(job) do
      %{state: :quantizing} when before == :quantizing -> slices(job, tokens, [slice | slices])
      %{state: :done} -> slices
      %{state: :failed, error: error} -> raise error
      _between -> slices(job, tokens, slices)
    end
  end

  # Tokens, seconds, and seconds of CPU that the job's processes took.
  defp look(tokens, ms) do
    {count, cpu, began} = {:counters.get(tokens, 1), cpu(), System.monotonic_time(:microsecond)}
    Process.sleep(ms)
    seconds = (System.monotonic_time(:microsecond) - began) / 1.0e6
    taken = for {pid, seconds} <- cpu(), do: seconds - Map.get(cpu, pid, 0)
    {:counters.get(tokens, 1) - count, seconds, Enum.sum(taken)}
  end

  # Of each process, by its id: a variable tells which are a job's.
  defp cpu do
    for name <- File.ls!("/proc"),
        {pid, ""} <- [Integer.parse(name)],
        {:ok, variables} <- [File.read("/proc/#{pid}/environ")],
        variables =~ "EX_VLLM_NICE=",
        seconds = Processes.cpu_seconds([pid]),
        # Else it has ended.
        seconds > 0,
        into: %{},
        do: {pid, seconds}
  end

  defp rate(slices) do
    Enum.sum(for {tokens, _, _} <- slices, do: tokens) / seconds(slices)
  end

  defp share(slices) do
    cpu = Enum.sum(for {_, _, cpu} <- slices, do: cpu)
    cpu / seconds(slices) / System.schedulers_online()
  end

  defp seconds(slices), do: Enum.sum(for {_, seconds, _} <- slices, do: seconds)
  defp percent(share), do: "#{round(100 * share)} %"
end

Logger.configure(level: :none)
data = Path.join(System.tmp_dir!(), "job-beside-engine-#{System.pid()}")
Application.put_env(:ex_vllm, :data_dir, data)

try do
  Bench.JobBesideEngine.run(String.to_integer(List.first(System.argv()) || "3"))
after
  File.rm_rf!(data)
end
