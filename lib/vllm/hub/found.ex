defmodule VLLM.Hub.Found do
  alias VLLM.Fields

  @fields [
    id: "its name, as `VLLM.llm/2` takes it",
    downloads: "in the last thirty days",
    likes: "of users of the hub",
    size:
      "of its safetensors weights, in bytes; nil where the hub does not tell, as of GGUF files, of " <>
        "which a repository has many",
    parameters: "how many numbers its weights have; nil where the hub does not tell",
    method: "by which it is quantized, after its tags and its name; nil for a plain model",
    gated?: "whether its owner must grant access",
    private?: "whether only its owner sees it",
    task: "what it is for, in the hub's words (`\"text-generation\"`), or nil",
    last_modified: "a string in ISO 8601, or nil"
  ]

  @moduledoc """
  A model that the hub has, from `VLLM.Hub.search/2`.

  #{Fields.docs(@fields)}
  """

  @names Keyword.keys(@fields)
  defstruct @names

  @type t :: %__MODULE__{
          id: String.t(),
          downloads: non_neg_integer() | nil,
          likes: non_neg_integer() | nil,
          size: non_neg_integer() | nil,
          parameters: non_neg_integer() | nil,
          method: String.t() | nil,
          gated?: boolean(),
          private?: boolean(),
          task: String.t() | nil,
          last_modified: String.t() | nil
        }

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    struct!(__MODULE__, Fields.take(wire, @names))
  end
end
