defmodule VLLM.RequestOutput do
  @moduledoc """
  What came of one prompt: vLLM's `RequestOutput`, by the same names.

    * `:request_id` - the id that vLLM's logs know it by
    * `:prompt` - the prompt's text; nil if it was given as token ids
    * `:prompt_token_ids` - the prompt's tokens
    * `:prompt_logprobs` - a list with a `t:VLLM.Logprob.place/0` for each, if asked for
    * `:outputs` - a list of `n` `VLLM.CompletionOutput`s, by index
    * `:finished` - true
    * `:num_cached_tokens` - how many of the prompt's tokens were in the prefix cache
    * `:metrics` - a map of vLLM's figures for the request (seconds and counts, string keys), or nil
  """

  defstruct [
    :request_id,
    :prompt,
    :prompt_token_ids,
    :prompt_logprobs,
    :outputs,
    :finished,
    :num_cached_tokens,
    :metrics
  ]

  @type t :: %__MODULE__{
          request_id: String.t(),
          prompt: String.t() | nil,
          prompt_token_ids: [non_neg_integer()],
          prompt_logprobs: [VLLM.Logprob.place()] | nil,
          outputs: [VLLM.CompletionOutput.t()],
          finished: boolean(),
          num_cached_tokens: non_neg_integer() | nil,
          metrics: %{String.t() => number() | nil} | nil
        }

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    %__MODULE__{
      request_id: wire["request_id"],
      prompt: wire["prompt"],
      prompt_token_ids: VLLM.TokenIds.unpack(wire["prompt_token_ids"]),
      prompt_logprobs: VLLM.Logprob.from_wire(wire["prompt_logprobs"]),
      outputs: Enum.map(wire["outputs"], &VLLM.CompletionOutput.from_wire/1),
      finished: wire["finished"],
      num_cached_tokens: wire["num_cached_tokens"],
      metrics: wire["metrics"]
    }
  end

  @doc false
  @spec text(t()) :: String.t()
  @spec text([t()]) :: [String.t()]
  def text(%__MODULE__{outputs: [first | _]}), do: first.text
  def text(outputs) when is_list(outputs), do: Enum.map(outputs, &text/1)
end
