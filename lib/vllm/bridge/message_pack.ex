defmodule VLLM.Bridge.MessagePack do
  @moduledoc """
  The [MessagePack](https://github.com/msgpack/msgpack/blob/master/spec.md) format, all of it.

  | Elixir                                       | encodes as               | decodes to             |
  |----------------------------------------------|--------------------------|------------------------|
  | `nil`, `true`, `false`                       | nil, bool                | the same               |
  | integer from `-2^63` to `2^64 - 1`           | the shortest int         | integer                |
  | float                                        | float 64                 | float                  |
  | `:nan`, `:infinity`, `:neg_infinity`         | float 64                 | the same               |
  | binary, valid UTF-8                          | the shortest str         | binary                 |
  | any other atom                               | str                      | binary                 |
  | `bin/1`                                      | the shortest bin         | binary                 |
  | proper list                                  | the shortest array       | list                   |
  | map with keys of any of these kinds          | the shortest map         | map, keys as they came |
  | `Timestamp`, `DateTime`                      | the shortest timestamp   | `Timestamp`            |
  | `Ext`                                        | the shortest ext         | `Ext`                  |

  Erlang has no float for NaN and the infinities, hence the three atoms. Float 32 is read too.
  Everything else, tuples and so keyword lists and other structs among them, is an encode error.

  The decoder takes any binary without raising and makes no atom but those of the table. Of equal
  keys in one map the last one counts. Strings are not checked to be UTF-8. A timestamp that the
  specification does not allow (of another length, or of a second or more of nanoseconds) stays
  an `Ext` of type -1.

  Arrays and maps may be nested 512 deep, in both directions: what `encode/1` writes, `decode/1`
  reads.
  """

  import Bitwise, only: [bsl: 2]

  alias __MODULE__.{Bin, Ext, Timestamp}

  defmodule Bin do
    @moduledoc "Raw bytes, to be encoded as bin and not as str; see `VLLM.Bridge.MessagePack.bin/1`."

    @enforce_keys [:data]
    defstruct [:data]

    @type t :: %__MODULE__{data: iodata}
  end

  defmodule Ext do
    @moduledoc "A value of an extension type: the type, from -128 to 127, and its bytes."

    @enforce_keys [:type, :data]
    defstruct [:type, :data]

    @type t :: %__MODULE__{type: -128..127, data: binary}
  end

  defmodule Timestamp do
    @moduledoc """
    A point in time: seconds since the Unix epoch, in 64 signed bits, and nanoseconds after them,
    from 0 to 999,999,999. It holds what `DateTime` cannot: nanoseconds, and every year.
    """

    @enforce_keys [:seconds]
    defstruct [:seconds, nanoseconds: 0]

    @type t :: %__MODULE__{seconds: integer, nanoseconds: 0..999_999_999}
  end

  @max_depth 512

  defguardp is_unsigned(integer, bits) when integer >= 0 and integer < bsl(1, bits)

  defguardp is_signed(integer, bits)
            when integer >= -bsl(1, bits - 1) and integer < bsl(1, bits - 1)

  @typedoc "The indexes and keys that lead to a value. A map key itself is found under itself."
  @type path :: [term]

  @typedoc """
  Why a term cannot be encoded:

    * `:unsupported` - it has no MessagePack form
    * `:out_of_range` - an integer, an extension type or a part of a timestamp that is too big or
      too small for its field
    * `:invalid_utf8` - the binary is not text; `bin/1` encodes it
    * `:too_long` - a string, list, map or extension of the given size, where the size must be
      less than `2^32`
    * `:too_deep` - lists and maps are nested deeper than the given limit
  """
  @type encode_error ::
          {:unsupported, term, path}
          | {:out_of_range, term, path}
          | {:invalid_utf8, path}
          | {:too_long, pos_integer, path}
          | {:too_deep, pos_integer}

  @typedoc """
  Why a binary cannot be decoded:

    * `:incomplete` - the binary ends before the value does
    * `:invalid` - the given byte starts no value (the format leaves only `0xC1` unused)
    * `:too_deep` - arrays and maps are nested deeper than the given limit
  """
  @type decode_error :: :incomplete | {:invalid, byte} | {:too_deep, pos_integer}

  @doc """
  Marks bytes as binary data, to be encoded as bin.

      iex> IO.iodata_to_binary(MessagePack.encode!(MessagePack.bin([<<255>>, "a"])))
      <<0xC4, 2, 255, ?a>>
  """
  @spec bin(iodata) :: Bin.t()
  def bin(data) when is_binary(data) or is_list(data), do: %Bin{data: data}

  @doc """
  Whether a binary can be encoded as a string, which is valid UTF-8.

      iex> {MessagePack.text?("é"), MessagePack.text?(<<255>>)}
      {true, false}
  """
  @spec text?(binary) :: boolean
  # Both are written in C: the first takes a half of the second, which takes a third of
  # String.valid?/1.
  def text?(binary),
    do: :unicode.bin_is_7bit(binary) or is_binary(:unicode.characters_to_binary(binary))

  @doc """
  Encodes a term.

  What is given is part of the result as it is, and not copied.

      iex> {:ok, iodata} = MessagePack.encode(%{"id" => 7, "stop" => ["\\n"]})
      iex> IO.iodata_to_binary(iodata)
      <<0x82, 0xA2, "id", 7, 0xA4, "stop", 0x91, 0xA1, ?\\n>>

      iex> MessagePack.encode(%{"options" => [1, self: 2]})
      {:error, {:unsupported, {:self, 2}, ["options", 1]}}
  """
  @spec encode(term) :: {:ok, iodata} | {:error, encode_error}
  def encode(term) do
    # In a list, since a byte alone is no iodata.
    {:ok, [put(term, [], @max_depth)]}
  catch
    {__MODULE__, reason} -> {:error, reason}
  end

  @doc """
  Encodes a term; raises an `ArgumentError` that says what cannot be encoded and where it is.

      iex> MessagePack.encode!(%{"seed" => 2 ** 64})
      ** (ArgumentError) cannot encode 18446744073709551616 at ["seed"] as MessagePack: it is out of range
  """
  @spec encode!(term) :: iodata
  def encode!(term) do
    case encode(term) do
      {:ok, iodata} -> iodata
      {:error, reason} -> raise ArgumentError, format_error(reason)
    end
  end

  @doc """
  Decodes a binary that holds one value and nothing else; `{:trailing, count}` is the error for
  `count` bytes after it.

  The strings in the result are references into the given binary. To keep a short string of a long
  binary for long, take a `:binary.copy/1` of it.

      iex> MessagePack.decode(<<0x82, 0xA2, "id", 7, 0xA4, "stop", 0x91, 0xA1, ?\\n>>)
      {:ok, %{"id" => 7, "stop" => ["\\n"]}}

      iex> MessagePack.decode(<<0xC3, 0xC3>>)
      {:error, {:trailing, 1}}
  """
  @spec decode(binary) :: {:ok, term} | {:error, decode_error | {:trailing, pos_integer}}
  def decode(binary) when is_binary(binary) do
    case decode_prefix(binary) do
      {:ok, term, <<>>} -> {:ok, term}
      {:ok, _term, rest} -> {:error, {:trailing, byte_size(rest)}}
      {:error, reason} -> {:error, reason}
    end
  end

  @doc """
  Decodes the value at the start of a binary and returns it with the bytes after it.

      iex> MessagePack.decode_prefix(<<0xC3, 1, 2>>)
      {:ok, true, <<1, 2>>}

      iex> MessagePack.decode_prefix(<<0xCD, 1>>)
      {:error, :incomplete}
  """
  @spec decode_prefix(binary) :: {:ok, term, rest :: binary} | {:error, decode_error}
  def decode_prefix(binary) when is_binary(binary) do
    get(binary, [], 1, :top, [], @max_depth)
  end

  @doc """
  An error's reason in words.

      iex> MessagePack.format_error(:incomplete)
      "the data ends before the value does"
  """
  @spec format_error(encode_error | decode_error | {:trailing, pos_integer}) :: String.t()
  def format_error(:incomplete), do: "the data ends before the value does"
  def format_error({:invalid, byte}), do: "the byte #{byte} starts no value"
  def format_error({:trailing, count}), do: "#{count} bytes follow the value"

  def format_error({:unsupported, term, path}) do
    "cannot encode #{excerpt(term)}#{at(path)} as MessagePack: it has no form there"
  end

  def format_error({:out_of_range, term, path}) do
    "cannot encode #{excerpt(term)}#{at(path)} as MessagePack: it is out of range"
  end

  def format_error({:invalid_utf8, path}) do
    "cannot encode the binary#{at(path)} as a MessagePack string: it is not valid UTF-8 " <>
      "(mark raw bytes with #{inspect(__MODULE__)}.bin/1)"
  end

  def format_error({:too_long, size, path}) do
    "cannot encode the value of size #{size}#{at(path)} as MessagePack: the limit is 2^32 - 1"
  end

  def format_error({:too_deep, limit}) do
    "cannot encode a term as MessagePack that is nested more than #{limit} deep"
  end

  ## Encoding
  #
  # What is made is iodata, in which a byte is a number and a string itself: it costs less than to append
  # to a binary, and ports take it as it is. `path` is that of the errors, the last step first, and `room` how
  # much deeper it may go.

  defp put(term, path, _room) when is_binary(term) do
    if text?(term),
      do: put_str(term, byte_size(term), path),
      else: refuse({:invalid_utf8, term}, path)
  end

  defp put(term, path, _room) when is_integer(term) do
    cond do
      is_unsigned(term, 7) -> term
      is_signed(term, 6) -> 256 + term
      is_unsigned(term, 8) -> <<0xCC, term>>
      is_unsigned(term, 16) -> <<0xCD, term::16>>
      is_unsigned(term, 32) -> <<0xCE, term::32>>
      is_unsigned(term, 64) -> <<0xCF, term::64>>
      is_signed(term, 8) -> <<0xD0, term>>
      is_signed(term, 16) -> <<0xD1, term::16>>
      is_signed(term, 32) -> <<0xD2, term::32>>
      is_signed(term, 64) -> <<0xD3, term::64>>
      true -> refuse({:out_of_range, term}, path)
    end
  end

  defp put(nil, _path, _room), do: 0xC0
  defp put(false, _path, _room), do: 0xC2
  defp put(true, _path, _room), do: 0xC3
  defp put(:nan, _path, _room), do: <<0xCB, 0x7FF8::16, 0::48>>
  defp put(:infinity, _path, _room), do: <<0xCB, 0x7FF0::16, 0::48>>
  defp put(:neg_infinity, _path, _room), do: <<0xCB, 0xFFF0::16, 0::48>>
  defp put(term, path, room) when is_atom(term), do: put(Atom.to_string(term), path, room)
  defp put(term, _path, _room) when is_float(term), do: <<0xCB, term::float>>

  # The guard fails for an improper list.
  defp put(term, path, room) when length(term) >= 0 do
    case length(term) do
      n when is_unsigned(n, 4) -> [0x90 + n | values(term, 0, path, deeper(room))]
      n when is_unsigned(n, 16) -> [<<0xDC, n::16>> | values(term, 0, path, deeper(room))]
      n when is_unsigned(n, 32) -> [<<0xDD, n::32>> | values(term, 0, path, deeper(room))]
      n -> refuse({:too_long, n}, path)
    end
  end

  defp put(%Bin{data: data} = term, path, _room) do
    case iodata_size(data) do
      :error -> refuse({:unsupported, term}, path)
      n when is_unsigned(n, 8) -> [0xC4, n | data]
      n when is_unsigned(n, 16) -> [<<0xC5, n::16>> | data]
      n when is_unsigned(n, 32) -> [<<0xC6, n::32>> | data]
      n -> refuse({:too_long, n}, path)
    end
  end

  defp put(%Ext{type: type, data: data} = term, path, _room)
       when is_integer(type) and is_binary(data) do
    if is_signed(type, 8),
      do: put_ext(type, data, byte_size(data), path),
      else: refuse({:out_of_range, term}, path)
  end

  defp put(%Timestamp{seconds: s, nanoseconds: ns} = term, path, _room)
       when is_integer(s) and is_integer(ns) do
    cond do
      ns not in 0..999_999_999 or not is_signed(s, 64) -> refuse({:out_of_range, term}, path)
      is_unsigned(s, 32) and ns == 0 -> put_ext(-1, <<s::32>>, 4, path)
      is_unsigned(s, 34) -> put_ext(-1, <<ns::30, s::34>>, 8, path)
      true -> put_ext(-1, <<ns::32, s::64>>, 12, path)
    end
  end

  defp put(%DateTime{} = term, path, room) do
    microseconds = DateTime.to_unix(term, :microsecond)

    timestamp = %Timestamp{
      seconds: Integer.floor_div(microseconds, 1_000_000),
      nanoseconds: Integer.mod(microseconds, 1_000_000) * 1000
    }

    put(timestamp, path, room)
  end

  defp put(term, path, room) when is_map(term) and not is_struct(term) do
    pairs = Map.to_list(term)

    case map_size(term) do
      n when is_unsigned(n, 4) -> [0x80 + n | pairs(pairs, path, deeper(room))]
      n when is_unsigned(n, 16) -> [<<0xDE, n::16>> | pairs(pairs, path, deeper(room))]
      n when is_unsigned(n, 32) -> [<<0xDF, n::32>> | pairs(pairs, path, deeper(room))]
      n -> refuse({:too_long, n}, path)
    end
  end

  defp put(term, path, _room), do: refuse({:unsupported, term}, path)

  defp put_str(data, n, path) do
    cond do
      is_unsigned(n, 5) -> [0xA0 + n, data]
      is_unsigned(n, 8) -> [0xD9, n, data]
      is_unsigned(n, 16) -> [<<0xDA, n::16>>, data]
      is_unsigned(n, 32) -> [<<0xDB, n::32>>, data]
      true -> refuse({:too_long, n}, path)
    end
  end

  defp put_ext(type, data, n, path) do
    case n do
      1 -> [<<0xD4, type>>, data]
      2 -> [<<0xD5, type>>, data]
      4 -> [<<0xD6, type>>, data]
      8 -> [<<0xD7, type>>, data]
      16 -> [<<0xD8, type>>, data]
      n when is_unsigned(n, 8) -> [<<0xC7, n, type>>, data]
      n when is_unsigned(n, 16) -> [<<0xC8, n::16, type>>, data]
      n when is_unsigned(n, 32) -> [<<0xC9, n::32, type>>, data]
      n -> refuse({:too_long, n}, path)
    end
  end

  defp values([value | values], index, path, room),
    do: [put(value, [index | path], room) | values(values, index + 1, path, room)]

  defp values([], _index, _path, _room), do: []

  defp pairs([{key, value} | pairs], path, room) do
    inner = [key | path]
    [put(key, inner, room), put(value, inner, room) | pairs(pairs, path, room)]
  end

  defp pairs([], _path, _room), do: []

  defp deeper(0), do: throw({__MODULE__, {:too_deep, @max_depth}})
  defp deeper(room), do: room - 1

  @spec refuse({atom, term}, path) :: no_return
  defp refuse({:invalid_utf8, _term}, path),
    do: throw({__MODULE__, {:invalid_utf8, Enum.reverse(path)}})

  defp refuse({why, what}, path), do: throw({__MODULE__, {why, what, Enum.reverse(path)}})

  defp iodata_size(data) do
    IO.iodata_length(data)
  rescue
    ArgumentError -> :error
  end

  defp at([]), do: ""
  defp at(path), do: " at " <> inspect(path, limit: 20, printable_limit: 60)

  defp excerpt(term), do: inspect(term, limit: 5, printable_limit: 60)

  ## Decoding
  #
  # One loop of tail calls that all take the binary first and match on it, so that the compiler
  # keeps one match context for the whole of it. `acc` has the values of the array or map being
  # read, the last one first, and `left` is how many are still to come; a map of n pairs has 2n.
  # `outer` has the same of the arrays and maps around it. `room` is how much deeper it may go.

  defp get(<<rest::bits>>, acc, 0, kind, outer, room), do: leave(rest, acc, kind, outer, room)

  # A clause for each byte, and not one that takes the bits apart, makes the dispatch a jump table,
  # which doubles the speed for small values.
  for n <- 0..127 do
    defp get(<<unquote(n), rest::bits>>, acc, left, kind, outer, room) do
      get(rest, [unquote(n) | acc], left - 1, kind, outer, room)
    end
  end

  for n <- -32..-1 do
    defp get(<<unquote(256 + n), rest::bits>>, acc, left, kind, outer, room) do
      get(rest, [unquote(n) | acc], left - 1, kind, outer, room)
    end
  end

  for n <- 0..31 do
    defp get(<<unquote(0xA0 + n), rest::bits>>, acc, left, kind, outer, room) do
      get_bytes(rest, unquote(n), acc, left, kind, outer, room)
    end
  end

  for n <- 0..15 do
    defp get(<<unquote(0x90 + n), rest::bits>>, acc, left, kind, outer, room) do
      open(rest, unquote(n), :array, acc, left, kind, outer, room)
    end

    defp get(<<unquote(0x80 + n), rest::bits>>, acc, left, kind, outer, room) do
      open(rest, unquote(2 * n), :map, acc, left, kind, outer, room)
    end
  end

  for {byte, value} <- [{0xC0, nil}, {0xC2, false}, {0xC3, true}] do
    defp get(<<unquote(byte), rest::bits>>, acc, left, kind, outer, room) do
      get(rest, [unquote(value) | acc], left - 1, kind, outer, room)
    end
  end

  for {byte, bits} <- [{0xCC, 8}, {0xCD, 16}, {0xCE, 32}, {0xCF, 64}] do
    defp get(<<unquote(byte), n::unquote(bits), rest::bits>>, acc, left, kind, outer, room) do
      get(rest, [n | acc], left - 1, kind, outer, room)
    end
  end

  for {byte, bits} <- [{0xD0, 8}, {0xD1, 16}, {0xD2, 32}, {0xD3, 64}] do
    defp get(<<unquote(byte), n::signed-unquote(bits), rest::bits>>, acc, left, kind, outer, room) do
      get(rest, [n | acc], left - 1, kind, outer, room)
    end
  end

  for {byte, bits, exponent_bits} <- [{0xCB, 64, 11}, {0xCA, 32, 8}] do
    exponent = 2 ** exponent_bits - 1
    fraction_bits = bits - exponent_bits - 1

    defp get(<<unquote(byte), n::float-unquote(bits), rest::bits>>, acc, left, kind, outer, room) do
      get(rest, [n | acc], left - 1, kind, outer, room)
    end

    # What a float segment does not match are the infinities and NaN.
    for {sign, value} <- [{0, :infinity}, {1, :neg_infinity}] do
      defp get(
             <<unquote(byte), unquote(sign)::1, unquote(exponent)::unquote(exponent_bits),
               0::unquote(fraction_bits), rest::bits>>,
             acc,
             left,
             kind,
             outer,
             room
           ) do
        get(rest, [unquote(value) | acc], left - 1, kind, outer, room)
      end
    end

    defp get(<<unquote(byte), _::unquote(bits), rest::bits>>, acc, left, kind, outer, room) do
      get(rest, [:nan | acc], left - 1, kind, outer, room)
    end
  end

  for {byte, bits} <- [{0xD9, 8}, {0xDA, 16}, {0xDB, 32}, {0xC4, 8}, {0xC5, 16}, {0xC6, 32}] do
    defp get(<<unquote(byte), n::unquote(bits), rest::bits>>, acc, left, kind, outer, room) do
      get_bytes(rest, n, acc, left, kind, outer, room)
    end
  end

  for {byte, bits} <- [{0xDC, 16}, {0xDD, 32}] do
    defp get(<<unquote(byte), n::unquote(bits), rest::bits>>, acc, left, kind, outer, room) do
      open(rest, n, :array, acc, left, kind, outer, room)
    end
  end

  for {byte, bits} <- [{0xDE, 16}, {0xDF, 32}] do
    defp get(<<unquote(byte), n::unquote(bits), rest::bits>>, acc, left, kind, outer, room) do
      open(rest, 2 * n, :map, acc, left, kind, outer, room)
    end
  end

  for {byte, n} <- [{0xD4, 1}, {0xD5, 2}, {0xD6, 4}, {0xD7, 8}, {0xD8, 16}] do
    defp get(<<unquote(byte), rest::bits>>, acc, left, kind, outer, room) do
      get_ext(rest, unquote(n), acc, left, kind, outer, room)
    end
  end

  for {byte, bits} <- [{0xC7, 8}, {0xC8, 16}, {0xC9, 32}] do
    defp get(<<unquote(byte), n::unquote(bits), rest::bits>>, acc, left, kind, outer, room) do
      get_ext(rest, n, acc, left, kind, outer, room)
    end
  end

  defp get(<<0xC1, _::bits>>, _acc, _left, _kind, _outer, _room), do: fail({:invalid, 0xC1})
  defp get(<<_::bits>>, _acc, _left, _kind, _outer, _room), do: fail(:incomplete)

  defp get_bytes(binary, n, acc, left, kind, outer, room) do
    case binary do
      <<data::binary-size(n), rest::bits>> -> get(rest, [data | acc], left - 1, kind, outer, room)
      <<_::bits>> -> fail(:incomplete)
    end
  end

  defp get_ext(binary, n, acc, left, kind, outer, room) do
    case binary do
      <<type::signed, data::binary-size(n), rest::bits>> ->
        get(rest, [ext(type, data) | acc], left - 1, kind, outer, room)

      <<_::bits>> ->
        fail(:incomplete)
    end
  end

  defp ext(-1, <<seconds::32>>), do: %Timestamp{seconds: seconds}

  defp ext(-1, <<nanoseconds::30, seconds::34>>) when nanoseconds <= 999_999_999 do
    %Timestamp{seconds: seconds, nanoseconds: nanoseconds}
  end

  defp ext(-1, <<nanoseconds::32, seconds::signed-64>>) when nanoseconds <= 999_999_999 do
    %Timestamp{seconds: seconds, nanoseconds: nanoseconds}
  end

  defp ext(type, data), do: %Ext{type: type, data: data}

  # Every value takes a byte at least: a length beyond the end of the binary is refused at once.
  defp open(<<rest::bits>>, n, new_kind, acc, left, kind, outer, room) when room > 0 do
    case rest do
      <<_::binary-size(n), _::bits>> ->
        get(rest, [], n, new_kind, [{acc, left, kind} | outer], room - 1)

      <<_::bits>> ->
        fail(:incomplete)
    end
  end

  defp open(<<_::bits>>, _n, _new_kind, _acc, _left, _kind, _outer, 0) do
    fail({:too_deep, @max_depth})
  end

  defp leave(<<rest::bits>>, values, :array, [{acc, left, kind} | outer], room) do
    get(rest, [:lists.reverse(values) | acc], left - 1, kind, outer, room + 1)
  end

  defp leave(<<rest::bits>>, values, :map, [{acc, left, kind} | outer], room) do
    get(rest, [:maps.from_list(to_pairs(values, [])) | acc], left - 1, kind, outer, room + 1)
  end

  defp leave(<<rest::bits>>, [value], :top, [], _room), do: {:ok, value, rest}

  defp to_pairs([value, key | values], pairs), do: to_pairs(values, [{key, value} | pairs])
  defp to_pairs([], pairs), do: pairs

  defp fail(reason), do: {:error, reason}
end
