defmodule VLLM.Score do
  @moduledoc """
  How well two texts fit together, from `VLLM.score/4` and `VLLM.rerank/4`.

    * `:request_id` - the id that vLLM's logs know it by
    * `:index` - which pair it is, from 0; of `VLLM.rerank/4`, which document
    * `:score` - the higher, the better they fit: the cosine of two vectors (-1 to 1), or what a
      cross-encoder says (0 to 1)
    * `:prompt_token_ids` - the tokens of both texts
    * `:num_cached_tokens` - how many of them were in the prefix cache
  """

  alias VLLM.{Tensor, TokenIds}

  defstruct [:request_id, :index, :score, :prompt_token_ids, :num_cached_tokens]

  @type t :: %__MODULE__{
          request_id: String.t(),
          index: non_neg_integer(),
          score: float(),
          prompt_token_ids: [non_neg_integer()],
          num_cached_tokens: non_neg_integer()
        }

  @doc false
  @spec from_wire(map(), non_neg_integer()) :: t()
  def from_wire(wire, index) do
    %__MODULE__{
      request_id: wire["request_id"],
      index: index,
      # A vector of one number comes from a cross-encoder, a bare one from vectors.
      score: Tensor.to_list(wire["data"], []),
      prompt_token_ids: TokenIds.unpack(wire["prompt_token_ids"]),
      num_cached_tokens: wire["num_cached_tokens"]
    }
  end
end
