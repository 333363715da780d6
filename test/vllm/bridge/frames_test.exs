defmodule VLLM.Bridge.FramesTest do
  use ExUnit.Case, async: true

  alias VLLM.Bridge.Frames

  defp wrap(frames), do: frames |> Enum.map(&Frames.wrap/1) |> IO.iodata_to_binary()

  # What comes of the bytes in reads of these sizes.
  defp cut(frames, bytes, sizes) do
    Enum.reduce(reads(bytes, sizes), {[], frames}, fn read, {whole, frames} ->
      {more, frames} = Frames.cut(frames, read)
      {whole ++ more, frames}
    end)
  end

  defp reads(<<>>, _sizes), do: []
  defp reads(bytes, []), do: [bytes]

  defp reads(bytes, [size | sizes]) do
    size = min(size, byte_size(bytes))
    <<read::binary-size(size), rest::binary>> = bytes
    [read | reads(rest, sizes)]
  end

  test "frames are the same however they are read" do
    for _ <- 1..2_000 do
      frames = for _ <- 1..:rand.uniform(6), do: :rand.bytes(:rand.uniform(60) - 1)
      bytes = wrap(frames)
      sizes = for _ <- 1..byte_size(bytes), do: :rand.uniform(Enum.random([1, 4, 200]))
      assert {^frames, rest} = cut(Frames.new(60), bytes, sizes)
      assert rest == Frames.new(60)
    end
  end

  test "frames of one read are parts of it, and one of several is put together once" do
    bytes = wrap([String.duplicate("a", 100), String.duplicate("b", 100)])
    {[first, second], _} = Frames.cut(Frames.new(100), bytes)

    for frame <- [first, second],
        do: assert(:binary.referenced_byte_size(frame) == byte_size(bytes))

    frame = String.duplicate("c", 10_000)
    {[whole], _} = cut(Frames.new(10_000), wrap([frame]), List.duplicate(64, 200))
    assert whole == frame
    assert :binary.referenced_byte_size(whole) == 10_004
  end

  test "a length is refused as soon as it is there, and what came before it is not lost" do
    {["a"], :too_long} = Frames.cut(Frames.new(5), wrap(["a"]) <> <<6::32>>)
    {["abcde"], _} = Frames.cut(Frames.new(5), wrap(["abcde"]))

    for sizes <- [[1, 1, 1, 1], [3, 1], [4]] do
      assert {[], :too_long} = cut(Frames.new(5), <<0xFFFFFFFF::32>>, sizes)
    end

    {[], rest} = Frames.cut(Frames.new(5), <<0, 0, 0>>)
    assert {[], :too_long} = Frames.cut(rest, <<6, 1>>)
  end
end
