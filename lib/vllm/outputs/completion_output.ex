defmodule VLLM.CompletionOutput do
  @moduledoc """
  One completion of a prompt: vLLM's `CompletionOutput`, by the same names.

    * `:index` - which of the `n` completions it is, from 0
    * `:text` - the text
    * `:token_ids` - its tokens
    * `:cumulative_logprob` - sum of the tokens' log probabilities, if `logprobs` were asked for
    * `:logprobs` - a list with a `t:VLLM.Logprob.place/0` for each token, if asked for
    * `:finish_reason` - why it ended: `"stop"` (an end token or a stop string), `"length"`
      (`max_tokens` or the context's end) or `"repetition"` (what the sampling parameter
      `repetition_detection` looks for). vLLM's others (`"abort"`, `"error"`) are errors here, with
      what there is of the completions in `details["outputs"]`
    * `:stop_reason` - the stop string or token id that ended it; nil for the end-of-sequence token
    * `:message` - of `VLLM.chat/3`: the text taken apart, as a `VLLM.ChatMessage`; else nil
    * `:parsed` - of calls with `schema:`: what the text says as JSON, with maps of string keys; nil
      where it is none (cut off by `max_tokens`, say)
  """

  defstruct [
    :index,
    :text,
    :token_ids,
    :cumulative_logprob,
    :logprobs,
    :finish_reason,
    :stop_reason,
    :message,
    :parsed
  ]

  @type t :: %__MODULE__{
          index: non_neg_integer(),
          text: String.t(),
          token_ids: [non_neg_integer()],
          cumulative_logprob: float() | nil,
          logprobs: [VLLM.Logprob.place()] | nil,
          finish_reason: String.t() | nil,
          stop_reason: String.t() | non_neg_integer() | nil,
          message: VLLM.ChatMessage.t() | nil,
          parsed: term()
        }

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    %__MODULE__{
      index: wire["index"],
      text: wire["text"],
      token_ids: VLLM.TokenIds.unpack(wire["token_ids"]),
      cumulative_logprob: wire["cumulative_logprob"],
      logprobs: VLLM.Logprob.from_wire(wire["logprobs"]),
      finish_reason: wire["finish_reason"],
      stop_reason: wire["stop_reason"],
      message: VLLM.ChatMessage.from_wire(wire["message"]),
      parsed: wire["parsed"]
    }
  end
end
