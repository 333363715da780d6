defmodule VLLM.Tensor do
  @moduledoc false
  # Numbers in bulk: binaries of little-endian 32-bit floats with a shape.

  alias VLLM.Error

  # Erlang has no float for NaN and the infinities.
  @type nested :: float() | :nan | :infinity | :neg_infinity | [nested()]

  @doc "The numbers as lists, one in another for each dimension; without one, the number itself."
  @spec to_list(binary(), [non_neg_integer()]) :: nested()
  def to_list(data, []), do: data |> floats() |> hd()
  def to_list(data, [_count]), do: floats(data)

  def to_list(data, [count | shape]) do
    size = div(byte_size(data), max(count, 1))
    for row <- 0..(count - 1)//1, do: data |> binary_part(row * size, size) |> to_list(shape)
  end

  defp floats(<<number::32-float-little, rest::binary>>), do: [number | floats(rest)]
  defp floats(<<0x00, 0x00, 0x80, 0x7F, rest::binary>>), do: [:infinity | floats(rest)]
  defp floats(<<0x00, 0x00, 0x80, 0xFF, rest::binary>>), do: [:neg_infinity | floats(rest)]
  defp floats(<<_::32, rest::binary>>), do: [:nan | floats(rest)]
  defp floats(<<>>), do: []

  @doc "The numbers as an `Nx.Tensor`; raises where Nx is not there."
  @spec to_nx(binary(), [non_neg_integer()]) :: struct()
  def to_nx(data, shape) do
    unless Code.ensure_loaded?(Nx) do
      raise Error.new(
              :unsupported,
              "Nx is not there. Add `{:nx, \"~> 0.9\"}` to your dependencies, or take `to_list/1` " <>
                "or the binary in `:data`."
            )
    end

    # By way of apply: the package is not there when this is compiled alone.
    data = if System.endianness() == :little, do: data, else: reverse(data)
    tensor = apply(Nx, :from_binary, [data, {:f, 32}])
    apply(Nx, :reshape, [tensor, List.to_tuple(shape)])
  end

  defp reverse(data), do: for(<<bits::32-little <- data>>, into: <<>>, do: <<bits::32-big>>)
end
