defmodule Mix.Tasks.Vllm.Quantize do
  @shortdoc "Quantizes a model into one or more formats"

  @moduledoc """
  Quantizes a model into one or more formats, and prints what came of it: name, size, and what was
  lost.

      mix vllm.quantize MODEL --to FORMATS [--name NAME] [--calibration PATH] [--no-verify] [--json]
      mix vllm.quantize MODEL --to FORMATS --estimate [--json]

      mix vllm.quantize Qwen/Qwen2.5-0.5B-Instruct --to gguf:Q4_K_M,awq --name qwen

  A format may have a word for its options, as `gguf:Q4_K_M` and `bitsandbytes:nf4` do; for options by
  their names there is `VLLM.Job.quantize/2`, whose other options are those of this task:
  `--threads 4`, `--max-samples 64`, `--revision main`, … A token for private and gated models is taken
  from `HF_TOKEN`.

  The job runs in this task and shows a bar. `Ctrl-C` interrupts it, and what was finished is kept:
  `mix vllm.jobs --retry ID` goes on. `--estimate` makes nothing and tells what it would take: the size of
  each output, disk with what is there only meanwhile, memory and time. `--json` prints the outputs (`VLLM.Job.Output`) or
  the estimate (`VLLM.Job.Estimate`) and nothing else.
  Ends with status 1 where an output could not be made.
  """

  use Mix.Task

  alias Mix.Vllm.{Answer, Arguments, Table}
  alias VLLM.{Bytes, Job, Terminal}

  @requirements ["app.start"]

  @impl Mix.Task
  def run(argv) do
    {model, options, flags} = Arguments.parse!(argv, "vllm.quantize", ["json", "estimate"])
    options = Map.update(options, "to", [], &String.split(to_string(&1), ",", trim: true))

    if "estimate" in flags,
      do:
        model |> Job.estimate(options) |> Answer.ok!() |> Answer.print(flags, &print_estimate/1),
      else: model |> Job.quantize(options) |> Answer.ok!() |> await(flags)
  end

  defp print_estimate(estimate) do
    columns = ["output" | Enum.map(["size", "disk", "memory", "minutes"], &{:right, &1})]
    rows = for one <- estimate.outputs, do: [one.label | sizes(one)]
    Table.print(columns, rows ++ [["together" | sizes(estimate)]])
  end

  defp sizes(%{bytes: bytes, disk: disk, memory: memory, minutes: {least, most}}),
    do:
      Enum.map([bytes, disk, memory], &Bytes.file/1) ++ ["#{minutes(least)} to #{minutes(most)}"]

  defp minutes(minutes) when minutes < 1, do: Table.decimal(minutes, 1)
  defp minutes(minutes), do: Integer.to_string(ceil(minutes))

  @doc "Waits for a job and prints its outputs, here and for `mix vllm.jobs`."
  @spec await(Job.t(), [String.t()]) :: :ok
  def await(job, flags) do
    shown = if "json" in flags, do: [progress: false], else: []
    unless "json" in flags, do: Mix.shell().info("Job #{job.id}")
    job |> Job.await(shown) |> Answer.ok!() |> Answer.print(flags, &print/1)
  end

  @doc "Prints outputs as a table."
  @spec print([Job.Output.t()]) :: :ok
  def print(outputs) do
    columns = ["output", "state", {:right, "size"}, {:right, "made in"}, "against its source"]
    Table.print(columns, Enum.map(outputs, &row/1))
  end

  defp row(output) do
    [
      output.name || output.label,
      Atom.to_string(output.state),
      Bytes.file(output.bytes),
      if(output.seconds, do: Terminal.time(output.seconds), else: "-"),
      quality(output)
    ]
  end

  defp quality(%{error: error}) when error != nil, do: error.message
  defp quality(%{quality: nil}), do: "not compared"

  defp quality(%{quality: quality}) do
    figures =
      for {name, word, factor, unit} <- [
            {"kl_mean", "KL divergence", 1, ""},
            {"same_top", "same top token", 100, " %"},
            {"perplexity", "perplexity", 1, ""}
          ],
          is_number(quality[name]),
          do: "#{word} #{Table.decimal(quality[name] * factor, 3)}#{unit}"

    verdict = if quality["verdict"] == "worse_than_usual", do: ["worse than usual"], else: []
    Enum.join(verdict ++ figures, ", ")
  end
end
