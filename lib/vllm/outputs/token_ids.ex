defmodule VLLM.TokenIds do
  @moduledoc false
  # Token ids as they come from a worker: little-endian u32, one after another.

  @doc """
  The ids of a binary; of nil, nil.

      iex> VLLM.TokenIds.unpack(<<72, 0, 0, 0, 105, 0, 0, 0>>)
      [72, 105]
  """
  @spec unpack(binary() | nil) :: [non_neg_integer()] | nil
  def unpack(nil), do: nil
  def unpack(bytes), do: for(<<id::32-little <- bytes>>, do: id)
end
