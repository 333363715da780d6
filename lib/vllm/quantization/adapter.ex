defmodule VLLM.Quantization.Adapter do
  alias VLLM.Fields

  @fields [
    type: "of peft's kinds, in lower case: `\"lora\"`, `\"ia3\"`, …; vLLM loads LoRA only",
    base_model: "the model that it was made for: a folder or a hub id, as its config has it",
    rank: "of its matrices; the largest where they differ. What `max_lora_rank` must be at least",
    alpha: "the number by which they are scaled, over the rank",
    target_modules: "names, or parts of names, of the layers that it changes",
    dora: "whether it is a DoRA, which learns magnitudes as well; vLLM loads none",
    rslora: "whether `:alpha` is over the root of the rank",
    modules_to_save: "layers that it replaces as a whole"
  ]

  @moduledoc """
  An adapter of peft, from `VLLM.Quantization.detect/2`.

  #{Fields.docs(@fields)}
  """

  @names Keyword.keys(@fields)
  defstruct @names

  @type t :: %__MODULE__{
          type: String.t(),
          base_model: String.t() | nil,
          rank: pos_integer() | nil,
          alpha: number() | nil,
          target_modules: [String.t()],
          dora: boolean(),
          rslora: boolean(),
          modules_to_save: [String.t()]
        }

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    struct!(__MODULE__, Fields.take(wire, @names))
  end
end
