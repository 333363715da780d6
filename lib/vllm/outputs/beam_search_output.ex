defmodule VLLM.BeamSearchOutput do
  @moduledoc """
  What a beam search found for one prompt: vLLM's `BeamSearchOutput`, and the prompt.

    * `:sequences` - a list of at most `beam_width` `VLLM.BeamSearchSequence`s, best first
    * `:prompt` - the prompt's text; nil if it was given as token ids
    * `:prompt_token_ids` - the prompt's tokens
  """

  alias VLLM.{BeamSearchSequence, TokenIds}

  defstruct [:sequences, :prompt, :prompt_token_ids]

  @type t :: %__MODULE__{
          sequences: [BeamSearchSequence.t()],
          prompt: String.t() | nil,
          prompt_token_ids: [non_neg_integer()]
        }

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    %__MODULE__{
      sequences: Enum.map(wire["outputs"], &BeamSearchSequence.from_wire/1),
      prompt: wire["prompt"],
      prompt_token_ids: TokenIds.unpack(wire["prompt_token_ids"])
    }
  end
end
