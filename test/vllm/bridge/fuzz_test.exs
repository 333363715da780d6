defmodule VLLM.Bridge.FuzzTest do
  # What a worker may send, whatever it is: the codec and the reading of frames
  # never raise, take memory in proportion, and make no atom. bench/fuzz.exs runs
  # the same for a million frames. The seed that ExUnit prints gives the same again.
  use ExUnit.Case

  alias VLLM.Bridge.{Connection, MessagePack}
  alias VLLM.Bridge.MessagePack.Ext
  alias VLLM.Fuzz

  @reference Path.expand("../../../python/tests/reference_msgpack.py", __DIR__)

  setup_all do
    %{corpus: Fuzz.corpus(:from_worker)}
  end

  test "the recorded frames are messages", %{corpus: corpus} do
    assert tuple_size(corpus) > 30
    for frame <- Tuple.to_list(corpus), do: assert(Fuzz.read(frame) == :accepted)
  end

  test "every strict prefix of a message is malformed", %{corpus: corpus} do
    for frame <- Tuple.to_list(corpus), length <- 0..(byte_size(frame) - 1) do
      prefix = binary_part(frame, 0, length)
      assert {length, Fuzz.read(prefix)} == {length, :rejected}
      assert MessagePack.decode(prefix) == {:error, :incomplete}
    end
  end

  test "a hostile frame is a message or malformed, and makes no atom", %{corpus: corpus} do
    read = fn count ->
      Enum.frequencies(for _ <- 1..count, do: corpus |> Fuzz.frame() |> Fuzz.read())
    end

    # Neither all nor nothing goes through: the frames are hostile, and not only noise.
    assert %{accepted: accepted, rejected: rejected} = read.(10_000)
    assert accepted > 1_000 and rejected > 1_000

    # Elsewhere code may be loaded meanwhile, which brings atoms, but not five times in a row.
    assert Enum.any?(1..5, fn _ ->
             atoms = :erlang.system_info(:atom_count)
             read.(5_000)
             :erlang.system_info(:atom_count) == atoms
           end)
  end

  test "a hostile frame takes memory in proportion to its size", %{corpus: corpus} do
    for _ <- 1..3_000 do
      frame = Fuzz.frame(corpus)
      assert in_heap(40 * byte_size(frame), fn -> Fuzz.read(frame) end) in [:accepted, :rejected]
    end

    # What takes the most for its bytes.
    for bytes <- [<<0>>, <<0x90>>, <<0x80>>, <<0xA0>>, <<0xC4, 0>>, <<0x91, 0>>, <<0x81, 0, 0>>] do
      values = :binary.copy(bytes, 20_000)
      frame = <<0x93, 2, 0xA1, ?m, 0x81, 0xA1, ?k, 0xDC, 20_000::16, values::binary>>
      assert in_heap(40 * byte_size(frame), fn -> Fuzz.read(frame) end) == :accepted
    end
  end

  # A process that wants more than so many words, and some to start with, is killed.
  defp in_heap(words, fun) do
    limit = %{size: 50_000 + words, kill: true, error_logger: false}

    {pid, monitor} =
      :erlang.spawn_opt(fn -> exit({:result, fun.()}) end, [:monitor, max_heap_size: limit])

    receive do
      {:DOWN, ^monitor, :process, ^pid, {:result, result}} -> result
      {:DOWN, ^monitor, :process, ^pid, reason} -> reason
    end
  end

  test "what is well-formed and no message is malformed with a reason", %{corpus: corpus} do
    for {payload, reason} <- [
          {"", "the data ends before the value does"},
          {<<0xC1>>, "the byte 193 starts no value"},
          {<<0xC3>>, "neither a response nor a notification"},
          {<<0x94, 0x01, 0xFF>>, "a response without an id"},
          {<<0x94, 0x01, 0xA1, ?7, 0xC0, 0xC0>>, "a response without an id"},
          # A request, and the same notification with a byte more.
          {<<0x94, 0x00, 7, 0xA1, ?m, 0x80>>, "neither a response nor a notification"},
          {<<0x93, 0x02, 0xA1, ?m, 0x80, 0>>, "1 bytes follow the value"},
          {<<0x93, 0x02, 0xA1, ?m, 0x90>>, "neither a response nor a notification"},
          {:binary.copy(<<0x91>>, 100_000), "nested more than 512 deep"},
          {<<0x93, 0x02, 0xA1, ?m, 0xDF, 0xFFFFFFFF::32>>, "the data ends"}
        ] do
      assert {:malformed, told} = Connection.parse(payload)
      assert told =~ reason
    end

    assert {:response, 7, _} = Connection.parse(<<0x94, 0x01, 7, 0xC0, 0xC0>>)
    assert {:response, _, body} = Connection.parse(elem(corpus, 0))

    assert {:error, {:malformed, "2 bytes follow the value"}} =
             Connection.decode_response(body <> "ab")
  end

  test "text that is none and types of another's making come out as they are" do
    body = fn value -> <<0xC0, value::binary>> end
    assert {:ok, <<0xFF, 0xFE>>} = Connection.decode_response(body.(<<0xA2, 0xFF, 0xFE>>))

    assert {:ok, %Ext{type: 5, data: "abc"}} =
             Connection.decode_response(body.(<<0xC7, 3, 5, "abc">>))

    assert {:ok, %Ext{type: -1, data: "abc"}} =
             Connection.decode_response(body.(<<0xC7, 3, -1, "abc">>))

    # An error map with a reason of any kind is an error that says so.
    for error <- [<<0x01>>, <<0x90>>, <<0x81, 0xA6, "reason", 0xA1, 0xFF>>] do
      assert {:error, %VLLM.Error{reason: :protocol}} =
               Connection.decode_response(<<error::binary, 0xC0>>)
    end
  end

  @tag :tmp_dir
  test "python-msgpack is of the same opinion", %{corpus: corpus, tmp_dir: folder} do
    [source, target] = for name <- ["source", "target"], do: Path.join(folder, name)
    frames = for _ <- 1..4_000, do: Fuzz.frame(corpus)
    File.write!(source, for(frame <- frames, do: [<<byte_size(frame)::32>>, frame]))

    {output, status} =
      System.cmd(VLLM.TestPython.executable!(), [@reference, "judge", source, target],
        stderr_to_stdout: true
      )

    assert status == 0, output
    judged = for <<size::32, frame::binary-size(size) <- File.read!(target)>>, do: frame
    assert length(judged) == length(frames)

    both =
      for {frame, judged} <- Enum.zip(frames, judged) do
        case {MessagePack.decode(frame), judged} do
          {{:error, {:too_deep, 512}}, _} ->
            :neither

          {{:error, _}, ""} ->
            :neither

          {{:error, reason}, _} ->
            flunk("only we refuse #{Base.encode16(frame)}: #{inspect(reason)}")

          # Not every value can be a key there, nor a type below 0 be read; 1 and true are the same key.
          {{:ok, term}, ""} ->
            refute portable?(term), "only we take #{Base.encode16(frame)}"

          {{:ok, term}, judged} ->
            if portable?(term), do: assert(MessagePack.decode(judged) == {:ok, term})
        end
      end

    assert Enum.count(both, &(&1 == true)) > 500
  end

  defp portable?(%Ext{type: type}), do: type >= 0
  defp portable?(term) when is_struct(term), do: true
  defp portable?(term) when is_list(term), do: Enum.all?(term, &portable?/1)

  defp portable?(term) when is_map(term),
    do: Enum.all?(term, fn {key, value} -> is_binary(key) and portable?(value) end)

  defp portable?(_term), do: true
end
