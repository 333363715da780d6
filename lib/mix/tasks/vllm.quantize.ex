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

  alias Mix.Vllm.{Answer, Arguments, Outputs}
  alias VLLM.Job

  @requirements ["app.start"]

  @impl Mix.Task
  def run(argv) do
    {model, options, flags} = Arguments.parse!(argv, "vllm.quantize", ["json", "estimate"])
    options = Map.update(options, "to", [], &String.split(to_string(&1), ",", trim: true))

    if "estimate" in flags,
      do:
        model
        |> Job.estimate(options)
        |> Answer.ok!()
        |> Answer.print(flags, &Outputs.print_estimate/1),
      else: model |> Job.quantize(options) |> Answer.ok!() |> Outputs.await(flags)
  end
end
