defmodule Mix.Tasks.Vllm.Finetune do
  @shortdoc "Trains a LoRA adapter over a model"

  @moduledoc """
  Trains a LoRA adapter over a model, and prints what came of it: the loss on what was held out, before and
  after, and how many of the model's other answers are still the same.

      mix vllm.finetune MODEL DATA --to NAME [--plot FILE] [--json]
      mix vllm.finetune MODEL DATA --to NAME --estimate [--json]

      mix vllm.finetune Qwen/Qwen2.5-0.5B-Instruct /data/tickets.jsonl --to tickets --load-in-4bit --epochs 3

  `DATA` is a `.jsonl`, `.json` or `.txt` file, or a folder of such; guides/finetuning.md says what is in them.
  Options are those of `VLLM.Job.finetune/3`: `--r 16`, `--learning-rate 1e-4`, `--held-out 0.05`, `--replay PATH`,
  `--target-modules q_proj,v_proj`, `--merge`, `--threads 4`, … A token for private and gated models is taken from
  `HF_TOKEN`.

  The job runs in this task and shows a bar. `Ctrl-C` interrupts it, and its last state is kept:
  `mix vllm.jobs --retry ID` goes on from there. `--plot` writes a picture of the losses, a `.svg`, `.png` or `.pdf`,
  which matplotlib draws (`mix vllm.setup --with matplotlib`). `--estimate`
  trains nothing and tells what it would take: size, disk, memory and time. `--json` prints the outputs
  (`VLLM.Job.Output`) or the estimate (`VLLM.Job.Estimate`) and nothing else. Ends with status 1 where there is no adapter.
  """

  use Mix.Task

  alias Mix.Vllm.{Answer, Arguments, Outputs}
  alias VLLM.Job

  @requirements ["app.start"]

  # Options of a training that are on when they are named.
  @switches ~w(merge load_in_4bit load_in_8bit gradient_checkpointing use_rslora)

  @impl Mix.Task
  def run(argv) do
    {arguments, options, flags} =
      Arguments.parse_all!(argv, "vllm.finetune", ["json", "estimate"], @switches)

    {model, data} = model_and_data!(arguments)
    {plot, options} = Map.pop(options, "plot")
    Answer.check_picture!(plot, "losses.svg", options)
    options = listed(options)

    if "estimate" in flags do
      estimate = model |> Job.estimate(data, options) |> Answer.ok!()
      Answer.print(estimate, flags, &Outputs.print_estimate/1)
    else
      job = model |> Job.finetune(data, options) |> Answer.ok!()
      Outputs.await(job, flags)
      Answer.picture!(plot, options, &Job.plot(job, &1))
    end
  end

  defp model_and_data!([model, data]), do: {model, data}

  defp model_and_data!(_others),
    do: Mix.raise("mix vllm.finetune takes a model and its data: `mix vllm.finetune MODEL DATA`")

  # Of a single word peft makes a pattern.
  defp listed(%{"target_modules" => modules} = options) when is_binary(modules) do
    case String.split(modules, ",", trim: true) do
      [_, _ | _] = names -> %{options | "target_modules" => names}
      _word -> options
    end
  end

  defp listed(options), do: options
end
