defmodule VLLM.Delta do
  @moduledoc """
  What one step of a stream adds to a completion.

    * `:index` - which of the `n` completions it belongs to, from 0
    * `:text` - the text to append; may be empty while a character is incomplete
    * `:token_ids` - its tokens
    * `:logprobs` - a `t:VLLM.Logprob.place/0` for each token, if asked for
    * `:finish_reason` - in the last delta of a completion, why it ended (see
      `VLLM.CompletionOutput`); nil before
    * `:stop_reason` - the stop string or token id that ended it
    * `:message` - of `VLLM.chat_stream/3`: what the text adds to the message, as a
      `VLLM.MessageDelta`; else nil

  A reader that is slower than the engine gets fewer and longer deltas.
  """

  defstruct [:index, :text, :token_ids, :logprobs, :finish_reason, :stop_reason, :message]

  @type t :: %__MODULE__{
          index: non_neg_integer(),
          text: String.t(),
          token_ids: [non_neg_integer()],
          logprobs: [VLLM.Logprob.place()] | nil,
          finish_reason: String.t() | nil,
          stop_reason: String.t() | non_neg_integer() | nil,
          message: VLLM.MessageDelta.t() | nil
        }

  @doc false
  @spec from_wire([term()]) :: t()
  def from_wire([index, text, token_ids, logprobs, finish_reason, stop_reason | message]) do
    %__MODULE__{
      index: index,
      text: text,
      token_ids: VLLM.TokenIds.unpack(token_ids),
      logprobs: VLLM.Logprob.from_wire(logprobs),
      finish_reason: finish_reason,
      stop_reason: stop_reason,
      message: message(message)
    }
  end

  @doc false
  @spec of_text(String.t(), [non_neg_integer()] | binary()) :: t()
  def of_text(text, token_ids) when is_list(token_ids),
    do: %__MODULE__{index: 0, text: text, token_ids: token_ids}

  def of_text(text, token_ids), do: of_text(text, VLLM.TokenIds.unpack(token_ids))

  defp message([]), do: nil
  defp message([message]), do: VLLM.MessageDelta.from_wire(message)
end
