defmodule VLLM.Test.Request do
  @moduledoc """
  What an engine of `VLLM.Test` was asked: one prompt, conversation or set of texts to score.

    * `:method` - `"generate"` (also of streams), `"beam_search"`, `"chat"`, `"pool"` (`VLLM.embed/3`,
      `classify/3`, `encode/3`) or `"score"` (and `VLLM.rerank/4`)
    * `:prompt` - the prompt's text, nil if it was given as token ids or embeddings; of a conversation,
      the content of the last message
    * `:prompt_token_ids` - the prompt's tokens, if it was given as token ids; else nil
    * `:messages` - a conversation's messages, as maps with string keys; else nil
    * `:sampling_params` - the parameters that the call gave, as a map with string keys
    * `:stream?` - whether it is a stream
    * `:params` - all of the request, as a map with string keys: also `"tools"`, `"pooling_params"`,
      `"data_1"` and `"data_2"` (the texts to score), …
  """

  alias VLLM.TokenIds

  @enforce_keys [:method, :params]
  defstruct [
    :method,
    :prompt,
    :prompt_token_ids,
    :messages,
    :params,
    sampling_params: %{},
    stream?: false
  ]

  @type t :: %__MODULE__{
          method: String.t(),
          prompt: String.t() | nil,
          prompt_token_ids: [non_neg_integer()] | nil,
          messages: [map()] | nil,
          sampling_params: %{String.t() => term()},
          stream?: boolean(),
          params: %{String.t() => term()}
        }

  @doc false
  @spec from_wire(String.t(), map()) :: t()
  def from_wire(method, params) do
    {prompt, token_ids} = prompt(params)

    %__MODULE__{
      method: method,
      prompt: prompt,
      prompt_token_ids: token_ids,
      messages: params["messages"],
      sampling_params: Map.get(params, "sampling_params", %{}),
      stream?: is_map_key(params, "credit"),
      params: Map.drop(params, ["credit", "timeout", "queue_timeout"])
    }
  end

  defp prompt(%{"prompt" => text}) when is_binary(text), do: {text, nil}

  defp prompt(%{"prompt" => %{} = prompt}),
    do: {prompt["prompt"], TokenIds.unpack(prompt["prompt_token_ids"])}

  defp prompt(%{"messages" => messages}), do: {List.last(messages)["content"], nil}
  defp prompt(_params), do: {nil, nil}
end
