defmodule Mix.Tasks.Vllm.Bench do
  @shortdoc "Says how fast a model is: tokens per second, latencies, memory, start-up"

  @moduledoc """
  Says how fast a model is, by the names and definitions of `vllm bench serve`.

      mix vllm.bench MODEL [MODEL…] [--against OPTIONS] [--json FILE] [--plot FILE]

      mix vllm.bench /models/Llama-3.2-1B --max-concurrency 1,16,64 --num-prompts 200
      mix vllm.bench /models/Llama-3.2-1B --against model=/models/Llama-3.2-1B-AWQ --max-concurrency 16
      mix vllm.bench /models/Llama-3.2-1B --against kv-cache-dtype=fp8,replicas=2
      mix vllm.bench /models/Llama-3.2-1B --prompts questions.jsonl --request-rate 4

  Starts the engine, asks it `--num-prompts` requests in each of `--rounds` rounds, and prints requests and tokens per
  second, mean, median and 99th percentile of the time to the first token (TTFT), the time per output token (TPOT), the time
  between deltas (ITL) and the time until the last token (E2EL), CPU time, start-up and memory. Several models, and what
  `--against` has, are engines of their own that run beside the first and are measured in turns with it. Ends with
  status 1 where an engine does not start, or a request fails.

  ## Options

    * `--against OPTIONS` - what to compare with: options over those of the first engine, as `name=value,…`, with `model=`
      among them where the model is another one
    * `--json FILE` - writes all of the figures as JSON, of each round; without a file prints them, and nothing else
    * `--plot FILE` - writes a picture of throughput and latencies over `--max-concurrency`: a `.svg`, `.png` or
      `.pdf`. matplotlib draws it (`mix vllm.setup --with matplotlib`)
    * `--prompts FILE` - your own prompts: `.jsonl`, `.json` or `.txt`, in the forms of guides/finetuning.md
    * `--num-prompts`, `--random-input-len`, `--random-output-len`, `--random-range-ratio`, `--output-len`, `--ignore-eos`,
      `--temperature`, `--max-concurrency`, `--request-rate`, `--burstiness`, `--seed`, `--rounds`, `--num-warmups`,
      `--timeout` - as `VLLM.Bench.run/2` has them, which does the same in Elixir

  Options of an engine are taken by their names, with `-` for `_`. guides/benchmarking.md tells when not to trust what
  this prints.
  """

  use Mix.Task

  alias Mix.Vllm.{Answer, Arguments}
  alias VLLM.Bench

  @requirements ["app.start"]

  @impl Mix.Task
  def run(argv) do
    {models, options, []} = Arguments.parse_all!(argv, "vllm.bench", [])
    {json, options} = Map.pop(options, "json")
    {plot, options} = Map.pop(options, "plot")
    if json != true, do: Answer.check_file!(json, "json", "speed.json")
    Answer.check_picture!(plot, "speed.svg", options)
    options = if json == true, do: Map.put(options, "progress", false), else: options
    measured = quietly(fn -> Bench.run(models, against(options)) end)
    measured |> Answer.ok!() |> report(json, plot, options)
  end

  # What engines log, vLLM's warnings among it, would stand between the figures. What matters of it
  # is in their errors.
  defp quietly(fun) do
    level = Logger.level()
    Logger.configure(level: :error)

    try do
      fun.()
    after
      Logger.configure(level: level)
    end
  end

  defp against(%{"against" => text} = options) when is_binary(text) do
    if String.contains?(text, "="),
      do: %{options | "against" => Arguments.pairs!(text, "against")},
      else: options
  end

  defp against(options), do: options

  @doc false
  @spec report(Bench.t(), String.t() | true | nil, String.t() | nil, map()) :: :ok
  def report(bench, json, plot, options) do
    if is_binary(json), do: Answer.write!(json, Bench.to_json(bench))
    flags = if json == true, do: ["json"], else: []
    Answer.print(bench, flags, &Enum.each(Bench.lines(&1), fn line -> Mix.shell().info(line) end))
    Answer.picture!(plot, options, &Bench.plot(bench, &1))
    if Enum.any?(bench.runs, &(&1.figures.failed > 0)), do: exit({:shutdown, 1})
    :ok
  end
end
