defmodule VLLM.Models.Model do
  alias VLLM.Fields

  @fields [
    name:
      "as `VLLM.llm/2` takes it: `\"llama:Q4_K_M\"`, `\"my-llama\"`, `\"org/name\"` of one of the hub",
    label:
      "what tells it from other outputs of the same name: `\"Q4_K_M\"`; nil where it has none",
    aliases: "its other names, a list",
    kind: "`:model`, or `:adapter` for one that requests name as `lora_request:`",
    origin:
      "`:made` by a job, `:isq` for what a start quantized in place, `:local` for a folder or file that " <>
        "was registered, `:hub` for what was downloaded",
    path: "its folder or GGUF file; nil where no download of it has ended yet",
    missing?: "whether its files went away behind the library's back",
    size: "of its files, in bytes; of one of the hub, all revisions together",
    incomplete:
      "how many of these belong to files that are not whole yet: a download that was interrupted",
    method: "by which it is quantized, vLLM's name: `\"gguf\"`, `\"awq\"`; nil for a plain model",
    bits: "of each quantized weight, on average where they differ; nil for a plain model",
    base_model: "the model that an adapter belongs to, or a model says that it was made of",
    source: "what it was made of here: a hub id, a name here or a path; of one of the hub its id",
    revision: "the commit, or the fingerprint, of the source",
    revisions:
      "of one of the hub: the branches and tags that it was asked by, each with its commit, as a map",
    quality:
      "how it compares with its source, by the names of `VLLM.Quantization.compare/2`, a map with " <>
        "string keys; nil where nobody measured it",
    made:
      "how, of one that was made here: a map with string keys, such as `\"by\"`, `\"job\"`, `\"options\"`, " <>
        "`\"libraries\"` and `\"calibration\"`; nil else",
    registered_at: "when it got its name, a `DateTime`; nil of one of the hub",
    last_used: "when one of its files was last read or written, a `DateTime`, or nil"
  ]

  @moduledoc """
  A model or an adapter on this machine, from `VLLM.Models.list/1`.

  #{Fields.docs(@fields)}
  """

  @names Keyword.keys(@fields)
  defstruct @names

  @type t :: %__MODULE__{
          name: String.t(),
          label: String.t() | nil,
          aliases: [String.t()],
          kind: :model | :adapter,
          origin: :made | :isq | :local | :hub,
          path: Path.t() | nil,
          missing?: boolean(),
          size: non_neg_integer(),
          incomplete: non_neg_integer(),
          method: String.t() | nil,
          bits: number() | nil,
          base_model: String.t() | nil,
          source: String.t() | nil,
          revision: String.t() | nil,
          revisions: %{String.t() => String.t()},
          quality: %{String.t() => term()} | nil,
          made: %{String.t() => term()} | nil,
          registered_at: DateTime.t() | nil,
          last_used: DateTime.t() | nil
        }

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    model = struct!(__MODULE__, Fields.take(wire, @names))

    %{
      model
      | kind: kind(model.kind),
        origin: origin(model.origin),
        registered_at: time(model.registered_at),
        last_used: time(model.last_used)
    }
  end

  defp kind("adapter"), do: :adapter
  defp kind(_model), do: :model

  defp origin("made"), do: :made
  defp origin("isq"), do: :isq
  defp origin("hub"), do: :hub
  defp origin(_local), do: :local

  defp time(nil), do: nil
  defp time(seconds), do: seconds |> trunc() |> DateTime.from_unix!()
end
