defmodule VLLM.BeamSearchSequence do
  @moduledoc """
  One beam of a search: vLLM's `BeamSearchSequence`, by the same names.

    * `:text` - the completion's text
    * `:tokens` - the completion's tokens, without the prompt's
    * `:cum_logprob` - sum of the tokens' log probabilities, that of the end-of-sequence token
      included
    * `:logprobs` - a list with a `t:VLLM.Logprob.place/0` for each step of the search, with the
      tokens that were looked at
    * `:finish_reason` - `"stop"` (the end-of-sequence token) or `"length"` (`max_tokens` or the
      context's end)
    * `:stop_reason` - the end-of-sequence token's id; nil for other ends
  """

  alias VLLM.{Logprob, TokenIds}

  defstruct [:text, :tokens, :cum_logprob, :logprobs, :finish_reason, :stop_reason]

  @type t :: %__MODULE__{
          text: String.t(),
          tokens: [non_neg_integer()],
          cum_logprob: float(),
          logprobs: [Logprob.place()],
          finish_reason: String.t(),
          stop_reason: non_neg_integer() | nil
        }

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    %__MODULE__{
      text: wire["text"],
      tokens: TokenIds.unpack(wire["token_ids"]),
      cum_logprob: wire["cumulative_logprob"],
      logprobs: Logprob.from_wire(wire["logprobs"]),
      finish_reason: wire["finish_reason"],
      stop_reason: wire["stop_reason"]
    }
  end
end
