defmodule VLLM.Job.Estimate do
  @fields [
    model: "the model that was asked about",
    outputs: "a list of maps, one for each output, see below",
    bytes: "of the files of all outputs",
    disk: "of these, and of what is there only while the job runs",
    memory:
      "the most that a step takes: one output is made at a time. Not of the verification, which loads " <>
        "the source and each output as an engine does, and waits for memory of its own",
    minutes:
      "`{least, most}`, with the verification (unless `verify: false`) and without a download: where " <>
        "nothing else runs, and while all that runs now goes on; a job stands back behind other processes"
  ]

  @output [
    label: "what it would be called (`\"Q4_K_M\"`)",
    format: "the format, by vLLM's name of it",
    options: "all options that it would be made with: a map with string keys",
    bytes: "of its files",
    disk: "of these, and of what is there only while it is made",
    memory: "the most that making it takes",
    minutes: "`{least, most}`, to make it",
    usual_kl:
      "the mean KL divergence that its format is known to have, of another model and text, as `:usual` of " <>
        "`VLLM.Quantization.compare/2`; nil where none is known, and of an adapter"
  ]

  @moduledoc """
  What a job would take, before anything is made. Sizes are in bytes.

  #{VLLM.Fields.docs(@fields)}

  ## Outputs

  #{VLLM.Fields.docs(@output)}
  """

  @enforce_keys Keyword.keys(@fields)
  defstruct @enforce_keys

  @type t :: %__MODULE__{
          model: String.t(),
          outputs: [map()],
          bytes: non_neg_integer(),
          disk: non_neg_integer(),
          memory: non_neg_integer(),
          minutes: {number(), number()}
        }

  @doc false
  @spec new(String.t(), [map()], map()) :: t()
  def new(model, asked, %{"outputs" => outputs, "together" => together}) do
    each =
      for {one, plan} <- Enum.zip(asked, outputs) do
        %{label: one["label"], format: one["format"], options: one["options"]}
        |> Map.merge(sizes(plan))
        |> Map.put(:usual_kl, plan["usual_kl"])
      end

    struct!(__MODULE__, Map.merge(%{model: model, outputs: each}, sizes(together)))
  end

  defp sizes(plan) do
    [least, most] = plan["minutes"]

    %{
      bytes: plan["bytes"],
      disk: plan["disk"],
      memory: plan["memory"],
      minutes: {least, most}
    }
  end
end
