defmodule Mix.Tasks.Vllm.Pull do
  @shortdoc "Downloads a model from the Hugging Face hub"

  @moduledoc """
  Downloads a model from the Hugging Face hub, unless it is here, and prints its path.

      mix vllm.pull MODEL [--revision REVISION] [--subfolder FOLDER] [--download-dir FOLDER] [--json]

      mix vllm.pull Qwen/Qwen2.5-0.5B-Instruct
      mix vllm.pull TheBloke/Mistral-7B-Instruct-v0.2-GGUF:Q8_0

  Only the files that an engine needs are fetched. The options are those of `VLLM.Hub.pull/2` by
  their own names, so that `--stall-timeout 600000` waits ten minutes for a byte. A token for private
  and gated models is taken from `HF_TOKEN`, where nobody sees it among the processes of the machine.

  `--json` prints `{"path": "…"}` and nothing else, no bar either.

  A download that was interrupted goes on where it was. Ends with status 1 where the model
  cannot be had.
  """

  use Mix.Task

  alias Mix.Vllm.{Answer, Arguments}

  @requirements ["app.config"]

  @impl Mix.Task
  def run(argv) do
    {model, options, flags} = Arguments.parse!(argv, "vllm.pull", ["json"])
    options = if "json" in flags, do: Map.put(options, "progress", false), else: options
    path = model |> VLLM.Hub.pull(options) |> Answer.ok!()
    Answer.print(%{path: path}, flags, &Mix.shell().info(&1.path))
  end
end
