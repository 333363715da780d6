defmodule VLLM.PoolingOutput do
  @moduledoc """
  What a pooling task made of a prompt, as it is, from `VLLM.encode/3`.

    * `:request_id` - the id that vLLM's logs know it by
    * `:shape` - the tensor's dimensions: `[dimensions]` or `[classes]` of tasks that give one vector,
      `[tokens, dimensions]` or `[tokens, classes]` of those that give one for each token
    * `:data` - its numbers, row by row, a binary of little-endian 32-bit floats: `to_list/1` and
      `to_nx/1` read it
    * `:prompt_token_ids` - the prompt's tokens
    * `:num_cached_tokens` - how many of them were in the prefix cache
  """

  alias VLLM.{Tensor, TokenIds}

  defstruct [:request_id, :shape, :data, :prompt_token_ids, :num_cached_tokens]

  @type t :: %__MODULE__{
          request_id: String.t(),
          shape: [non_neg_integer()],
          data: binary(),
          prompt_token_ids: [non_neg_integer()],
          num_cached_tokens: non_neg_integer()
        }

  @type nested :: float() | :nan | :infinity | :neg_infinity | [nested()]

  @doc """
  The numbers as lists, one in another for each dimension; `:nan`, `:infinity` and `:neg_infinity`
  stand for what Erlang has no float for.

      iex> data = for number <- [1.0, 2.0, 3.0, 4.0], into: <<>>, do: <<number::32-float-little>>
      iex> VLLM.PoolingOutput.to_list(%VLLM.PoolingOutput{shape: [2, 2], data: data})
      [[1.0, 2.0], [3.0, 4.0]]
  """
  @spec to_list(t()) :: nested()
  def to_list(%__MODULE__{data: data, shape: shape}), do: Tensor.to_list(data, shape)

  @doc """
  The tensor as an `Nx` tensor of type `f32` and the same shape.

  Raises `VLLM.Error` with the reason `:unsupported` where [Nx](https://hexdocs.pm/nx) is not among
  your dependencies.
  """
  @spec to_nx(t()) :: struct()
  def to_nx(%__MODULE__{data: data, shape: shape}), do: Tensor.to_nx(data, shape)

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    %__MODULE__{
      request_id: wire["request_id"],
      shape: wire["shape"],
      data: wire["data"],
      prompt_token_ids: TokenIds.unpack(wire["prompt_token_ids"]),
      num_cached_tokens: wire["num_cached_tokens"]
    }
  end
end
