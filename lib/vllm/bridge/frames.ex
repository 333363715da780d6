defmodule VLLM.Bridge.Frames do
  @moduledoc false
  # Cuts what comes from a worker into frames. A value, and pure.
  #
  # `{:packet, 4}` would have the port do so, but it takes memory for whatever
  # length a worker announces, up to 4 GiB, before anybody can refuse it. Here a
  # length is looked at as soon as it is there. Frames that come in one read are
  # parts of its binary; one that comes in several is put together once.

  @enforce_keys [:max]
  defstruct [:max, chunks: [], have: 0, need: 4]

  @type t :: %__MODULE__{
          max: pos_integer(),
          # The beginning of a frame, with its length: the last read first.
          chunks: [binary()],
          have: non_neg_integer(),
          need: pos_integer()
        }

  @doc "For frames of at most `max` bytes."
  @spec new(pos_integer()) :: t()
  def new(max), do: %__MODULE__{max: max}

  @doc "What a frame is sent as: its length and itself."
  @spec wrap(iodata()) :: iodata()
  def wrap(frame), do: [<<IO.iodata_length(frame)::32>> | frame]

  @doc """
  The frames that are whole with `bytes`, in their order, and the rest, which is `:too_long` where
  a frame begins that is longer than it may be.
  """
  @spec cut(t(), binary()) :: {[binary()], t() | :too_long}
  def cut(%{have: have, need: need} = frames, bytes) when have + byte_size(bytes) < need do
    {[], %{frames | chunks: [bytes | frames.chunks], have: have + byte_size(bytes)}}
  end

  def cut(%{chunks: []} = frames, bytes), do: cut(frames.max, bytes, [])

  def cut(frames, bytes) do
    [bytes | frames.chunks]
    |> Enum.reverse()
    |> IO.iodata_to_binary()
    |> then(&cut(frames.max, &1, []))
  end

  defp cut(max, <<size::32, _rest::binary>>, whole) when size > max,
    do: {Enum.reverse(whole), :too_long}

  defp cut(max, <<size::32, frame::binary-size(size), rest::binary>>, whole),
    do: cut(max, rest, [frame | whole])

  defp cut(max, <<>>, whole), do: {Enum.reverse(whole), new(max)}

  defp cut(max, <<size::32, _rest::binary>> = bytes, whole),
    do: {Enum.reverse(whole), part(max, bytes, size + 4)}

  defp cut(max, bytes, whole), do: {Enum.reverse(whole), part(max, bytes, 4)}

  defp part(max, bytes, need),
    do: %__MODULE__{max: max, chunks: [bytes], have: byte_size(bytes), need: need}
end
