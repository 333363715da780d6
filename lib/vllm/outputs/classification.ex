defmodule VLLM.Classification do
  @moduledoc """
  The classes of a prompt, from `VLLM.classify/3`.

    * `:request_id` - the id that vLLM's logs know it by
    * `:probs` - a probability for each class, a list of floats; with `use_activation: false` what
      the model gave before it made probabilities of it
    * `:labels` - the classes' names, a list in the same order: `id2label` of the model's config; nil
      if it has none for them
    * `:label` - the name of the likeliest, or nil
    * `:prompt_token_ids` - the prompt's tokens
    * `:num_cached_tokens` - how many of them were in the prefix cache
  """

  alias VLLM.{Tensor, TokenIds}

  defstruct [:request_id, :probs, :labels, :label, :prompt_token_ids, :num_cached_tokens]

  @type t :: %__MODULE__{
          request_id: String.t(),
          probs: [float()],
          labels: [String.t()] | nil,
          label: String.t() | nil,
          prompt_token_ids: [non_neg_integer()],
          num_cached_tokens: non_neg_integer()
        }

  @doc false
  @spec from_wire(map(), [String.t()] | nil) :: t()
  def from_wire(%{"shape" => [classes] = shape} = wire, labels) do
    probs = Tensor.to_list(wire["data"], shape)
    labels = if labels && length(labels) == classes, do: labels

    %__MODULE__{
      request_id: wire["request_id"],
      probs: probs,
      labels: labels,
      label: labels && likeliest(probs, labels),
      prompt_token_ids: TokenIds.unpack(wire["prompt_token_ids"]),
      num_cached_tokens: wire["num_cached_tokens"]
    }
  end

  defp likeliest(probs, labels) do
    {_prob, label} = probs |> Enum.zip(labels) |> Enum.max_by(&elem(&1, 0))
    label
  end
end
