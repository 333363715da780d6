defmodule VLLM.Embedding do
  @moduledoc """
  The vector of a prompt, from `VLLM.embed/3`.

    * `:request_id` - the id that vLLM's logs know it by
    * `:data` - the numbers, a binary of little-endian 32-bit floats: `to_list/1` and `to_nx/1` read it
    * `:dimensions` - how many they are
    * `:prompt_token_ids` - the prompt's tokens
    * `:num_cached_tokens` - how many of them were in the prefix cache

  A vector has the length 1, unless `use_activation: false` was given: the dot product of two is
  their cosine.
  """

  alias VLLM.{Tensor, TokenIds}

  defstruct [:request_id, :data, :dimensions, :prompt_token_ids, :num_cached_tokens]

  @type t :: %__MODULE__{
          request_id: String.t(),
          data: binary(),
          dimensions: pos_integer(),
          prompt_token_ids: [non_neg_integer()],
          num_cached_tokens: non_neg_integer()
        }

  @doc """
  The numbers as a list; `:nan`, `:infinity` and `:neg_infinity` stand for what Erlang has no float for.

      iex> VLLM.Embedding.to_list(%VLLM.Embedding{data: <<0.5::32-float-little, -1.0::32-float-little>>})
      [0.5, -1.0]
  """
  @spec to_list(t()) :: [float() | :nan | :infinity | :neg_infinity]
  def to_list(%__MODULE__{data: data}), do: Tensor.to_list(data, [div(byte_size(data), 4)])

  @doc """
  The numbers as an `Nx` tensor of type `f32`, a vector.

  Raises `VLLM.Error` with the reason `:unsupported` where [Nx](https://hexdocs.pm/nx) is not among
  your dependencies.
  """
  @spec to_nx(t()) :: struct()
  def to_nx(%__MODULE__{data: data}), do: Tensor.to_nx(data, [div(byte_size(data), 4)])

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(%{"shape" => [dimensions]} = wire) do
    %__MODULE__{
      request_id: wire["request_id"],
      data: wire["data"],
      dimensions: dimensions,
      prompt_token_ids: TokenIds.unpack(wire["prompt_token_ids"]),
      num_cached_tokens: wire["num_cached_tokens"]
    }
  end
end
