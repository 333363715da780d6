defmodule VLLM.Quantization.Format do
  alias VLLM.Fields

  @fields [
    name:
      "of a format of checkpoints (`\"gptq (4 bits)\"`); of what a plain model becomes, what that is",
    bits: "of each weight, where they are known",
    runs?:
      "whether this device computes it, as one linear layer shows that vLLM makes; nil where that " <>
        "does not tell",
    why_not: "why it does not, or cannot be told; else nil"
  ]

  @moduledoc """
  A use of a quantization method, from `VLLM.Quantization.methods/1`.

  #{Fields.docs(@fields)}
  """

  @names Keyword.keys(@fields)
  defstruct @names

  @type t :: %__MODULE__{
          name: String.t(),
          bits: number() | nil,
          runs?: boolean() | nil,
          why_not: String.t() | nil
        }

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    struct!(__MODULE__, Fields.take(wire, @names))
  end
end
