defmodule VLLM.Bridge.MessagePackTest do
  use ExUnit.Case, async: true

  alias VLLM.Bridge.MessagePack
  alias VLLM.Bridge.MessagePack.{Bin, Ext, Timestamp}

  doctest MessagePack

  # The tests with random data draw from :rand as ExUnit seeds it: running again with the seed that
  # ExUnit prints gives the same data.

  @reference Path.expand("../../../python/tests/reference_msgpack.py", __DIR__)

  defp encode(term) do
    {:ok, iodata} = MessagePack.encode(term)
    IO.iodata_to_binary(iodata)
  end

  defp parts([head | tail]), do: parts(head) ++ parts(tail)
  defp parts(part), do: [part]

  defp text(length), do: String.duplicate("x", length)
  defp list(length), do: List.duplicate(nil, length)
  defp nils(length), do: :binary.copy(<<0xC0>>, length)

  describe "formats" do
    test "nil and booleans" do
      assert_both(nil, <<0xC0>>)
      assert_both(false, <<0xC2>>)
      assert_both(true, <<0xC3>>)
    end

    test "every size of integer at both of its ends" do
      assert_both(0, <<0x00>>)
      assert_both(127, <<0x7F>>)
      assert_both(128, <<0xCC, 0x80>>)
      assert_both(255, <<0xCC, 0xFF>>)
      assert_both(256, <<0xCD, 0x01, 0x00>>)
      assert_both(65_535, <<0xCD, 0xFF, 0xFF>>)
      assert_both(65_536, <<0xCE, 0x00, 0x01, 0x00, 0x00>>)
      assert_both(4_294_967_295, <<0xCE, 0xFF, 0xFF, 0xFF, 0xFF>>)
      assert_both(4_294_967_296, <<0xCF, 0, 0, 0, 1, 0, 0, 0, 0>>)
      assert_both(18_446_744_073_709_551_615, <<0xCF, -1::64>>)

      assert_both(-1, <<0xFF>>)
      assert_both(-32, <<0xE0>>)
      assert_both(-33, <<0xD0, 0xDF>>)
      assert_both(-128, <<0xD0, 0x80>>)
      assert_both(-129, <<0xD1, 0xFF, 0x7F>>)
      assert_both(-32_768, <<0xD1, 0x80, 0x00>>)
      assert_both(-32_769, <<0xD2, 0xFF, 0xFF, 0x7F, 0xFF>>)
      assert_both(-2_147_483_648, <<0xD2, 0x80, 0, 0, 0>>)
      assert_both(-2_147_483_649, <<0xD3, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F, 0xFF, 0xFF, 0xFF>>)
      assert_both(-9_223_372_036_854_775_808, <<0xD3, 0x80, 0::56>>)
    end

    test "floats are written in 64 bits" do
      assert_both(0.0, <<0xCB, 0::64>>)
      assert_both(1.0, <<0xCB, 0x3F, 0xF0, 0::48>>)
      assert_both(-2.5, <<0xCB, 0xC0, 0x04, 0::48>>)
      assert_both(1.7976931348623157e308, <<0xCB, 0x7F, 0xEF, -1::48>>)
      assert_both(5.0e-324, <<0xCB, 1::64>>)
      assert encode(-0.0) == <<0xCB, 0x80, 0::56>>
      assert {:ok, zero} = MessagePack.decode(<<0xCB, 0x80, 0::56>>)
      assert <<zero::float>> == <<0x80, 0::56>>
    end

    test "the infinities and NaN are atoms" do
      assert_both(:infinity, <<0xCB, 0x7F, 0xF0, 0::48>>)
      assert_both(:neg_infinity, <<0xCB, 0xFF, 0xF0, 0::48>>)
      assert_both(:nan, <<0xCB, 0x7F, 0xF8, 0::48>>)

      assert_decodes(<<0xCB, 0xFF, 0xF8, 0::48>>, :nan)
      assert_decodes(<<0xCB, 0x7F, 0xF0, 1::48>>, :nan)
      assert_decodes(<<0xCA, 0x7F, 0x80, 0, 0>>, :infinity)
      assert_decodes(<<0xCA, 0xFF, 0x80, 0, 0>>, :neg_infinity)
      assert_decodes(<<0xCA, 0x7F, 0xC0, 0, 0>>, :nan)
      assert_decodes(<<0xCA, 0x7F, 0x80, 0, 1>>, :nan)
    end

    test "floats are read in 32 bits too" do
      assert_decodes(<<0xCA, 0x3F, 0x80, 0, 0>>, 1.0)
      assert_decodes(<<0xCA, 0xC0, 0x20, 0, 0>>, -2.5)
      assert_decodes(<<0xCA, 0x3D, 0xCC, 0xCC, 0xCD>>, 0.10000000149011612)
    end

    test "every size of string at both of its ends" do
      assert_both("", <<0xA0>>)
      assert_both(text(31), <<0xBF, text(31)::binary>>)
      assert_both(text(32), <<0xD9, 32, text(32)::binary>>)
      assert_both(text(255), <<0xD9, 255, text(255)::binary>>)
      assert_both(text(256), <<0xDA, 1, 0, text(256)::binary>>)
      assert_both(text(65_535), <<0xDA, 255, 255, text(65_535)::binary>>)
      assert_both(text(65_536), <<0xDB, 0, 1, 0, 0, text(65_536)::binary>>)
      assert_both("äß漢🙂\0", <<0xAC, "äß漢🙂\0">>)
    end

    test "every size of binary at both of its ends" do
      for {length, header} <- [
            {0, <<0xC4, 0>>},
            {255, <<0xC4, 255>>},
            {256, <<0xC5, 1, 0>>},
            {65_535, <<0xC5, 255, 255>>},
            {65_536, <<0xC6, 0, 1, 0, 0>>}
          ] do
        data = :binary.copy(<<0xFF>>, length)
        assert encode(MessagePack.bin(data)) == header <> data
        assert_decodes(header <> data, data)
      end
    end

    test "every size of array at both of its ends" do
      assert_both([], <<0x90>>)
      assert_both(list(15), <<0x9F, nils(15)::binary>>)
      assert_both(list(16), <<0xDC, 0, 16, nils(16)::binary>>)
      assert_both(list(65_535), <<0xDC, 255, 255, nils(65_535)::binary>>)
      assert_both(list(65_536), <<0xDD, 0, 1, 0, 0, nils(65_536)::binary>>)
      assert_both([1, ["a", []], 2], <<0x93, 1, 0x92, 0xA1, ?a, 0x90, 2>>)
    end

    test "every size of map at both of its ends" do
      assert_both(%{}, <<0x80>>)
      assert_both(%{"a" => %{}, "b" => [1]}, <<0x82, 0xA1, ?a, 0x80, 0xA1, ?b, 0x91, 1>>)

      for {size, header} <- [
            {15, <<0x8F>>},
            {16, <<0xDE, 0, 16>>},
            {65_535, <<0xDE, 255, 255>>},
            {65_536, <<0xDF, 0, 1, 0, 0>>}
          ] do
        map = Map.new(1..size, &{&1, nil})
        pairs = for n <- 1..size, into: <<>>, do: encode(n) <> <<0xC0>>

        assert <<^header::binary-size(byte_size(header)), _::binary>> = encode(map)
        assert_decodes(encode(map), map)
        assert_decodes(header <> pairs, map)
      end
    end

    test "every size of extension at both of its ends" do
      for {length, header} <- [
            {0, <<0xC7, 0, 5>>},
            {1, <<0xD4, 5>>},
            {2, <<0xD5, 5>>},
            {3, <<0xC7, 3, 5>>},
            {4, <<0xD6, 5>>},
            {5, <<0xC7, 5, 5>>},
            {8, <<0xD7, 5>>},
            {16, <<0xD8, 5>>},
            {17, <<0xC7, 17, 5>>},
            {255, <<0xC7, 255, 5>>},
            {256, <<0xC8, 1, 0, 5>>},
            {65_535, <<0xC8, 255, 255, 5>>},
            {65_536, <<0xC9, 0, 1, 0, 0, 5>>}
          ] do
        data = :binary.copy(<<0xC1>>, length)
        assert_both(%Ext{type: 5, data: data}, header <> data)
      end

      assert_both(%Ext{type: 127, data: "x"}, <<0xD4, 127, ?x>>)
      assert_both(%Ext{type: -128, data: "x"}, <<0xD4, 128, ?x>>)
    end

    test "every form of timestamp at both of its ends" do
      assert_both(%Timestamp{seconds: 0}, <<0xD6, 0xFF, 0::32>>)
      assert_both(%Timestamp{seconds: 4_294_967_295}, <<0xD6, 0xFF, -1::32>>)

      assert_both(%Timestamp{seconds: 4_294_967_296}, <<0xD7, 0xFF, 0::30, 1::2, 0::32>>)
      assert_both(%Timestamp{seconds: 0, nanoseconds: 1}, <<0xD7, 0xFF, 1::30, 0::34>>)

      assert_both(
        %Timestamp{seconds: 17_179_869_183, nanoseconds: 999_999_999},
        <<0xD7, 0xFF, 999_999_999::30, -1::34>>
      )

      assert_both(
        %Timestamp{seconds: 17_179_869_184},
        <<0xC7, 12, 0xFF, 0::32, 17_179_869_184::64>>
      )

      assert_both(%Timestamp{seconds: -1}, <<0xC7, 12, 0xFF, 0::32, -1::64>>)

      assert_both(
        %Timestamp{seconds: -9_223_372_036_854_775_808, nanoseconds: 999_999_999},
        <<0xC7, 12, 0xFF, 999_999_999::32, 0x80, 0::56>>
      )

      assert_both(
        %Timestamp{seconds: 9_223_372_036_854_775_807},
        <<0xC7, 12, 0xFF, 0::32, 0x7F, -1::56>>
      )
    end

    test "a timestamp that the specification does not allow stays an extension" do
      for data <- [
            "",
            "xyz",
            <<1_000_000_000::30, 0::34>>,
            <<1_000_000_000::32, 0::64>>,
            <<0::128>>
          ] do
        ext = %Ext{type: -1, data: data}
        assert_both(ext, encode(ext))
      end
    end

    test "longer forms than needed are read" do
      for bytes <- [
            <<0xCC, 5>>,
            <<0xCD, 5::16>>,
            <<0xCE, 5::32>>,
            <<0xCF, 5::64>>,
            <<0xD0, 5>>,
            <<0xD1, 5::16>>,
            <<0xD2, 5::32>>,
            <<0xD3, 5::64>>
          ] do
        assert_decodes(bytes, 5)
      end

      assert_decodes(<<0xD9, 1, ?x>>, "x")
      assert_decodes(<<0xDA, 1::16, ?x>>, "x")
      assert_decodes(<<0xDB, 1::32, ?x>>, "x")
      assert_decodes(<<0xC6, 1::32, ?x>>, "x")
      assert_decodes(<<0xDC, 1::16, 5>>, [5])
      assert_decodes(<<0xDD, 1::32, 5>>, [5])
      assert_decodes(<<0xDE, 1::16, 5, 6>>, %{5 => 6})
      assert_decodes(<<0xDF, 1::32, 5, 6>>, %{5 => 6})
      assert_decodes(<<0xC7, 1, 9, ?x>>, %Ext{type: 9, data: "x"})
      assert_decodes(<<0xC8, 1::16, 9, ?x>>, %Ext{type: 9, data: "x"})
      assert_decodes(<<0xC9, 1::32, 9, ?x>>, %Ext{type: 9, data: "x"})
      assert_decodes(<<0xC7, 4, -1, 7::32>>, %Timestamp{seconds: 7})
    end

    defp assert_both(term, bytes) do
      assert encode(term) == bytes
      assert_decodes(bytes, term)
    end

    defp assert_decodes(bytes, term) do
      assert MessagePack.decode(bytes) === {:ok, term}
    end
  end

  describe "encoding" do
    test "writes other atoms as strings and charlists as arrays" do
      assert encode(:stop) == <<0xA4, "stop">>
      assert encode(Elixir.VLLM) == <<0xAB, "Elixir.VLLM">>
      assert encode(%{max_tokens: 1}) == <<0x81, 0xAA, "max_tokens", 1>>
      assert encode('ab') == <<0x92, ?a, ?b>>
    end

    test "takes any encodable term as a key" do
      map = %{1 => 1, 1.0 => 2, nil => 3, [1, %{}] => 4, %{"a" => 1} => 5, "" => 6, true => 7}
      assert MessagePack.decode(encode(map)) === {:ok, map}
    end

    test "writes a DateTime as a timestamp, whatever its zone" do
      for {datetime, timestamp} <- [
            {~U[2026-11-20 19:00:00Z], %Timestamp{seconds: 1_795_201_200}},
            {~U[1969-12-31 23:59:59.999999Z], %Timestamp{seconds: -1, nanoseconds: 999_999_000}},
            {~U[0000-01-01 00:00:00.5Z],
             %Timestamp{seconds: -62_167_219_200, nanoseconds: 500_000_000}},
            {~U[-0001-01-01 00:00:00Z], %Timestamp{seconds: -62_198_755_200}},
            {%{~U[1970-01-01 02:00:00Z] | time_zone: "X", utc_offset: 3600, std_offset: 3600},
             %Timestamp{seconds: 0}}
          ] do
        assert encode(datetime) == encode(timestamp)
      end
    end

    test "does not copy what is long" do
      long = text(1025)
      {:ok, iodata} = MessagePack.encode([1, MessagePack.bin([long, [?y]]), 2, long, 3])

      assert iodata |> parts() |> Enum.count(&:erts_debug.same(&1, long)) == 2

      assert IO.iodata_to_binary(iodata) ==
               <<0x95, 1, 0xC5, 1026::16, long::binary, ?y, 2, 0xDA, 1025::16, long::binary, 3>>
    end

    test "makes iodata of a byte alone, too" do
      for {term, byte} <- [{7, 7}, {-32, 0xE0}, {nil, 0xC0}, {[], 0x90}] do
        assert encode(term) == <<byte>>
      end
    end

    test "takes iodata as raw bytes" do
      assert encode(MessagePack.bin(["a", [?b | <<255>>], []])) == <<0xC4, 3, ?a, ?b, 255>>
    end

    test "names what has no form and where it is" do
      reference = make_ref()
      improper = [1 | 2]

      for term <- [
            {1, 2},
            self(),
            reference,
            &is_atom/1,
            <<1::3>>,
            improper,
            1..2,
            ~D[2026-01-01]
          ] do
        assert MessagePack.encode(term) == {:error, {:unsupported, term, []}}
      end

      assert MessagePack.encode(%{a: [0, %{b: [[], {1}]}]}) ==
               {:error, {:unsupported, {1}, [:a, 1, :b, 1]}}

      assert MessagePack.encode([%{1 => 1, 2 => 2, {3} => 3}]) ==
               {:error, {:unsupported, {3}, [0, {3}]}}

      assert MessagePack.encode([{:temperature, 0.5}]) ==
               {:error, {:unsupported, {:temperature, 0.5}, [0]}}

      large = Map.new(1..100, &{&1, &1}) |> Map.put(57, self())
      assert MessagePack.encode(large) == {:error, {:unsupported, self(), [57]}}
    end

    test "refuses our own structs with the wrong content" do
      for term <- [
            %Bin{data: [:a]},
            %Bin{data: nil},
            %Ext{type: 1, data: nil},
            %Ext{type: 1.0, data: ""},
            %Timestamp{seconds: 1.0}
          ] do
        assert MessagePack.encode([term]) == {:error, {:unsupported, term, [0]}}
      end
    end

    test "refuses numbers that do not fit" do
      for term <- [
            2 ** 64,
            -(2 ** 63) - 1,
            2 ** 1000,
            %Ext{type: 128, data: ""},
            %Ext{type: -129, data: ""},
            %Timestamp{seconds: 2 ** 63},
            %Timestamp{seconds: -(2 ** 63) - 1},
            %Timestamp{seconds: 0, nanoseconds: -1},
            %Timestamp{seconds: 0, nanoseconds: 1_000_000_000}
          ] do
        assert MessagePack.encode(%{"n" => term}) == {:error, {:out_of_range, term, ["n"]}}
      end
    end

    test "refuses strings that are not UTF-8" do
      for binary <- [<<0xFF>>, "ok" <> <<0xC3>>, <<0xED, 0xA0, 0x80>>, text(2000) <> <<0x80>>] do
        assert MessagePack.encode(%{"a" => ["", binary]}) == {:error, {:invalid_utf8, ["a", 1]}}
      end
    end

    test "refuses 4 GiB" do
      data = List.duplicate(:binary.copy(<<0>>, 1_048_576), 4096)
      assert MessagePack.encode([MessagePack.bin(data)]) == {:error, {:too_long, 2 ** 32, [0]}}

      [_ | rest] = data
      almost = [:binary.copy(<<0>>, 1_048_575) | rest]

      assert {:ok, [[<<0xC6, 0xFFFFFFFF::32>> | ^almost]]} =
               MessagePack.encode(MessagePack.bin(almost))
    end

    test "encode! raises with a message for each reason" do
      for {term, message} <- [
            {%{"a" => [self()]},
             "cannot encode #{inspect(self())} at [\"a\", 0] as MessagePack: it has no form there"},
            {{1}, "cannot encode {1} as MessagePack: it has no form there"},
            {[2 ** 64],
             "cannot encode 18446744073709551616 at [0] as MessagePack: it is out of range"},
            {[<<255>>],
             "cannot encode the binary at [0] as a MessagePack string: it is not valid UTF-8 " <>
               "(mark raw bytes with VLLM.Bridge.MessagePack.bin/1)"},
            {MessagePack.bin(List.duplicate(:binary.copy(<<0>>, 1_048_576), 4096)),
             "cannot encode the value of size 4294967296 as MessagePack: the limit is 2^32 - 1"},
            {nested(513, &[&1]),
             "cannot encode a term as MessagePack that is nested more than 512 deep"}
          ] do
        assert_raise ArgumentError, message, fn -> MessagePack.encode!(term) end
      end
    end
  end

  describe "decoding" do
    test "tells what is wrong" do
      assert MessagePack.decode(<<>>) == {:error, :incomplete}
      assert MessagePack.decode(<<0xC1>>) == {:error, {:invalid, 0xC1}}
      assert MessagePack.decode(<<0x92, 1, 0xC1>>) == {:error, {:invalid, 0xC1}}
      assert MessagePack.decode(<<1, 2, 3>>) == {:error, {:trailing, 2}}
    end

    test "takes values off a binary one by one" do
      assert {:ok, [1], rest} = MessagePack.decode_prefix(<<0x91, 1, 0x81, 1, 2, 0xCD, 0>>)
      assert {:ok, %{1 => 2}, rest} = MessagePack.decode_prefix(rest)
      assert MessagePack.decode_prefix(rest) == {:error, :incomplete}
    end

    test "returns strings that are not UTF-8 as they are" do
      assert MessagePack.decode(<<0xA2, 0xFF, 0xC3>>) == {:ok, <<0xFF, 0xC3>>}
    end

    test "takes the last of equal keys" do
      assert MessagePack.decode(<<0x83, 1, 2, 1, 3, 1, 4>>) == {:ok, %{1 => 4}}
    end

    test "makes no atoms" do
      name = "never_an_atom_" <> Integer.to_string(System.unique_integer([:positive]))
      assert MessagePack.decode(encode(%{name => name})) == {:ok, %{name => name}}
      assert_raise ArgumentError, fn -> String.to_existing_atom(name) end
    end

    test "refuses a length beyond the end before it reads on or allocates" do
      # 0xC1 is invalid wherever a value is expected: to see it would mean to have read on.
      contents = :binary.copy(<<0xC1>>, 100)

      for header <- [
            <<0xD9, 101>>,
            <<0xDA, 0xFFFF::16>>,
            <<0xDB, 0xFFFFFFFF::32>>,
            <<0xC4, 101>>,
            <<0xC5, 0xFFFF::16>>,
            <<0xC6, 0xFFFFFFFF::32>>,
            <<0xC7, 100>>,
            <<0xC8, 0xFFFF::16>>,
            <<0xC9, 0xFFFFFFFF::32>>,
            <<0xDC, 101::16>>,
            <<0xDD, 0xFFFFFFFF::32>>,
            <<0xDE, 51::16>>,
            <<0xDF, 0xFFFFFFFF::32>>
          ] do
        assert in_small_heap(fn -> MessagePack.decode(header <> contents) end) ==
                 {:error, :incomplete}
      end

      hostile = :binary.copy(<<0xDD, 0xFFFFFFFF::32>>, 100_000)
      assert in_small_heap(fn -> MessagePack.decode(hostile) end) == {:error, :incomplete}
    end

    defp in_small_heap(fun) do
      task =
        Task.async(fn ->
          Process.flag(:max_heap_size, 20_000)
          fun.()
        end)

      Task.await(task)
    end
  end

  describe "nesting" do
    test "goes 512 deep in both directions" do
      for wrap <- [&[&1], &%{"a" => &1}, &%{&1 => 1}] do
        deep = nested(512, wrap)
        assert MessagePack.decode(encode(deep)) == {:ok, deep}
        assert MessagePack.encode(wrap.(deep)) == {:error, {:too_deep, 512}}
      end
    end

    test "is refused beyond that, however long the input is" do
      for bytes <- [<<0x91>>, <<0x81>>, <<0x81, 1>>, <<0xDC, 1::16>>, <<0xDF, 1::32>>] do
        assert MessagePack.decode(:binary.copy(bytes, 1_000_000)) == {:error, {:too_deep, 512}}
      end
    end

    test "counts only what is open" do
      flat = List.duplicate([[], %{}], 2000)
      assert MessagePack.decode(encode(flat)) == {:ok, flat}

      beside = [nested(511, &[&1]), nested(511, &%{1 => &1})]
      assert MessagePack.decode(encode(beside)) == {:ok, beside}
    end
  end

  defp nested(depth, wrap), do: Enum.reduce(1..depth, 0, fn _, inner -> wrap.(inner) end)

  describe "random data" do
    test "comes back as it was" do
      for _ <- 1..2000 do
        term = random_term(4)
        assert MessagePack.decode(encode(term)) === {:ok, plain(term)}
      end
    end

    test "is incomplete at every strict prefix" do
      for _ <- 1..300 do
        bytes = encode(random_term(2))

        for length <- 0..(byte_size(bytes) - 1) do
          assert MessagePack.decode_prefix(binary_part(bytes, 0, length)) ==
                   {:error, :incomplete}
        end
      end
    end

    test "is read up to its end, whatever follows" do
      for _ <- 1..1000 do
        term = random_term(2)
        rest = :rand.bytes(:rand.uniform(20))
        assert MessagePack.decode_prefix(encode(term) <> rest) === {:ok, plain(term), rest}
        assert MessagePack.decode(encode(term) <> rest) == {:error, {:trailing, byte_size(rest)}}
      end
    end

    test "never makes the decoder raise" do
      for _ <- 1..20_000 do
        bytes = :rand.bytes(:rand.uniform(64) - 1)

        # Random bytes rarely go far; under an array and with one byte changed they do.
        assert_result(bytes)
        assert_result(<<0xDC, 1::16>> <> bytes)
      end

      for _ <- 1..5000 do
        bytes = encode(random_term(3))
        position = :rand.uniform(byte_size(bytes)) - 1
        <<before::binary-size(position), _, rest::binary>> = bytes
        assert_result(<<before::binary, :rand.uniform(256) - 1, rest::binary>>)
      end
    end

    defp assert_result(bytes) do
      case MessagePack.decode(bytes) do
        {:ok, _term} -> :ok
        {:error, :incomplete} -> :ok
        {:error, {:invalid, 0xC1}} -> :ok
        {:error, {:trailing, count}} -> assert count in 1..byte_size(bytes)
        {:error, {:too_deep, 512}} -> :ok
      end
    end
  end

  describe "python-msgpack" do
    @describetag :tmp_dir

    test "reads our data and writes the same bytes", %{tmp_dir: folder} do
      source = Path.join(folder, "source")
      target = Path.join(folder, "target")

      lengths = [31, 32, 255, 256, 65_535, 65_536]
      long = for n <- lengths, do: [text(n), MessagePack.bin(:rand.bytes(n)), Enum.to_list(1..n)]
      maps = for n <- [15, 16, 65_535, 65_536], do: Map.new(1..n, &{&1, nil})
      terms = long ++ maps ++ for(_ <- 1..1500, do: random_term(3, :portable))

      write_frames(source, Enum.map(terms, &MessagePack.encode!/1))
      reference!(["reencode", source, target])

      frames = read_frames(target)
      assert length(frames) == length(terms)

      for {term, frame} <- Enum.zip(terms, frames) do
        assert frame == encode(term)
        assert MessagePack.decode(frame) === {:ok, plain(term)}
      end
    end

    test "writes data that we read and write back", %{tmp_dir: folder} do
      source = Path.join(folder, "source")
      target = Path.join(folder, "target")
      seed = Integer.to_string(:rand.uniform(1_000_000))

      reference!(["generate", seed, "500", source])

      frames =
        for frame <- read_frames(source) do
          assert {:ok, term} = MessagePack.decode(frame)
          MessagePack.encode!(term)
        end

      assert length(frames) > 500
      write_frames(target, frames)
      reference!(["compare", source, target])
    end

    defp reference!(arguments) do
      {output, status} =
        System.cmd(VLLM.TestPython.executable!(), [@reference | arguments], stderr_to_stdout: true)

      assert status == 0, output
    end

    defp write_frames(path, frames) do
      File.write!(path, for(frame <- frames, do: [<<IO.iodata_length(frame)::32>>, frame]))
    end

    defp read_frames(path) do
      for <<length::32, frame::binary-size(length) <- File.read!(path)>>, do: frame
    end
  end

  # What decoding gives for a term that was encoded.
  defp plain(%Bin{data: data}), do: IO.iodata_to_binary(data)

  defp plain(%DateTime{} = datetime) do
    {seconds, microseconds} = DateTime.to_gregorian_seconds(datetime)

    %Timestamp{seconds: seconds - 62_167_219_200, nanoseconds: microseconds * 1000}
  end

  defp plain(struct) when is_struct(struct), do: struct
  defp plain(map) when is_map(map), do: Map.new(map, fn {k, v} -> {plain(k), plain(v)} end)
  defp plain(list) when is_list(list), do: Enum.map(list, &plain/1)

  defp plain(atom) when is_atom(atom) do
    if atom in [nil, true, false, :nan, :infinity, :neg_infinity],
      do: atom,
      else: Atom.to_string(atom)
  end

  defp plain(other), do: other

  # `:portable` leaves out what python-msgpack does not take: extension types below 0 and maps
  # with keys that are not hashable, or equal in Python.
  defp random_term(depth, scope \\ :all) do
    case if depth > 0, do: :rand.uniform(16), else: :rand.uniform(12) do
      n when n <= 3 -> random_integer()
      n when n <= 6 -> random_text()
      7 -> pick([nil, true, false, :nan, :infinity, :neg_infinity, :stop, :"größer als"])
      8 -> pick([:rand.normal(), :rand.uniform() * 1.0e300, 0.0, -0.0])
      9 -> MessagePack.bin(pick([:rand.bytes(random_length()), ["a", [0, 255], "ä"]]))
      10 -> %Ext{type: random_type(scope), data: :rand.bytes(random_length())}
      11 -> %Timestamp{seconds: random_seconds(), nanoseconds: pick([0, 1, 999_999_999])}
      12 -> DateTime.from_unix!(:rand.uniform(10 ** 17) - 5 * 10 ** 16, :microsecond)
      n when n <= 14 -> random_list(depth, scope)
      _ -> Map.new(random_list(depth, scope), &{random_key(depth, scope), &1})
    end
  end

  defp random_list(depth, scope) do
    for _ <- 1..pick([0, 1, 2, 5, 15, 16])//1, do: random_term(depth - 1, scope)
  end

  defp random_key(_depth, :portable), do: pick([random_integer(), random_text(), :model])

  defp random_key(depth, :all) do
    pick([random_integer(), random_text(), :model, nil, random_list(depth - 1, :all)])
  end

  defp random_integer do
    magnitude = :rand.uniform(2 ** pick([3, 6, 8, 9, 16, 17, 31, 33, 63]))
    pick([magnitude, -magnitude, pick([0, 2 ** 64 - 1, -(2 ** 63)])])
  end

  defp random_text do
    for _ <- 1..random_length()//1, into: "", do: pick(["a", "z", " ", "\0", "ß", "漢", "🙂"])
  end

  defp random_length, do: pick([0, 1, 2, 3, 4, 8, 16, 31, 40])

  defp random_type(:portable), do: :rand.uniform(128) - 1
  defp random_type(:all), do: pick([-128, -2, 0, 127])

  defp random_seconds do
    pick([0, -1, 2 ** 32 - 1, 2 ** 32, 2 ** 34 - 1, 2 ** 34, 2 ** 63 - 1, -(2 ** 63)])
  end

  defp pick(list), do: Enum.at(list, :rand.uniform(length(list)) - 1)
end
