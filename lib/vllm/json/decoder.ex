defmodule VLLM.JSON.Decoder do
  @moduledoc false
  # JSON text as terms. It may come from anybody: nothing in it takes more memory
  # or time than its size, and no name becomes an atom.

  # How deep arrays and objects may be nested.
  @depth 100

  # How many characters a number may have; a plain integer of the size of the largest float has 309. It
  # takes the square of the time to read twice as many.
  @number 400

  @escapes %{
    ?" => ?",
    ?\\ => ?\\,
    ?/ => ?/,
    ?b => ?\b,
    ?f => ?\f,
    ?n => ?\n,
    ?r => ?\r,
    ?t => ?\t
  }

  @doc "See `VLLM.JSON.decode/1`."
  @spec decode(binary()) :: {:ok, term()} | :error
  def decode(text) do
    {value, rest} = text |> skip() |> value(@depth)
    if skip(rest) == "", do: {:ok, value}, else: :error
  catch
    :malformed -> :error
  end

  defp value("null" <> rest, _depth), do: {nil, rest}
  defp value("true" <> rest, _depth), do: {true, rest}
  defp value("false" <> rest, _depth), do: {false, rest}
  defp value("\"" <> rest, _depth), do: text(rest)

  defp value("[" <> rest, depth) when depth > 0 do
    case skip(rest) do
      "]" <> rest -> {[], rest}
      rest -> items(rest, depth - 1, [])
    end
  end

  defp value("{" <> rest, depth) when depth > 0 do
    case skip(rest) do
      "}" <> rest -> {%{}, rest}
      rest -> members(rest, depth - 1, %{})
    end
  end

  defp value(<<char, _::binary>> = text, _depth) when char == ?- or char in ?0..?9,
    do: number(text)

  defp value(_other, _depth), do: throw(:malformed)

  defp items(text, depth, items) do
    {item, rest} = value(text, depth)

    case skip(rest) do
      "," <> rest -> rest |> skip() |> items(depth, [item | items])
      "]" <> rest -> {Enum.reverse(items, [item]), rest}
      _other -> throw(:malformed)
    end
  end

  defp members("\"" <> rest, depth, members) do
    {name, rest} = text(rest)

    with ":" <> rest <- skip(rest) do
      {value, rest} = rest |> skip() |> value(depth)
      members = Map.put(members, name, value)

      case skip(rest) do
        "," <> rest -> rest |> skip() |> members(depth, members)
        "}" <> rest -> {members, rest}
        _other -> throw(:malformed)
      end
    else
      _other -> throw(:malformed)
    end
  end

  defp members(_other, _depth, _members), do: throw(:malformed)

  ## Numbers

  defp number(text) do
    head = binary_part(text, 0, min(byte_size(text), @number + 1))
    found = Regex.run(~r/\A(-?(?:0|[1-9][0-9]*))(\.[0-9]+)?([eE][+-]?[0-9]+)?/, head)
    [written | parts] = found || throw(:malformed)
    size = byte_size(written)
    if size > @number, do: throw(:malformed)
    {number(written, parts), binary_part(text, size, byte_size(text) - size)}
  end

  defp number(_written, [integer]), do: String.to_integer(integer)
  defp number(_written, [integer, "", exponent]), do: float(integer <> ".0" <> exponent)
  defp number(written, _parts), do: float(written)

  defp float(text) do
    String.to_float(text)
  rescue
    # Larger than any float.
    ArgumentError -> throw(:malformed)
  end

  ## Texts

  # Of what follows the first quote.
  defp text(rest) do
    {text, rest} = unescape(rest, "")
    if String.valid?(text), do: {text, rest}, else: throw(:malformed)
  end

  # What has no escape in it is taken as a whole, and joined to a binary that grows in place: a list of
  # bytes would be sixteen times as large as a long text.
  defp unescape(written, text) do
    size = plain(written, 0)
    <<run::binary-size(size), rest::binary>> = written
    escape(rest, <<text::binary, run::binary>>)
  end

  defp plain(<<byte, rest::binary>>, at) when byte >= 0x20 and byte not in ~c"\"\\",
    do: plain(rest, at + 1)

  defp plain(_rest, at), do: at

  defp escape(<<?", rest::binary>>, text), do: {text, rest}

  # A character beyond the first 65,536 is written as two.
  defp escape(
         <<?\\, ?u, d, high::binary-size(3), ?\\, ?u, low::binary-size(4), rest::binary>>,
         text
       )
       when d in ~c"dD" and binary_part(high, 0, 1) in ["8", "9", "a", "b", "A", "B"] do
    case {code(<<d, high::binary>>), code(low)} do
      {high, low} when low in 0xDC00..0xDFFF ->
        char = 0x10000 + (high - 0xD800) * 0x400 + low - 0xDC00
        unescape(rest, <<text::binary, char::utf8>>)

      _half ->
        throw(:malformed)
    end
  end

  defp escape(<<?\\, ?u, digits::binary-size(4), rest::binary>>, text),
    do: unescape(rest, <<text::binary, character(code(digits))::utf8>>)

  defp escape(<<?\\, escape, rest::binary>>, text) when is_map_key(@escapes, escape),
    do: unescape(rest, <<text::binary, @escapes[escape]>>)

  defp escape(_other, _text), do: throw(:malformed)

  defp character(char) when char in 0xD800..0xDFFF, do: throw(:malformed)
  defp character(char), do: char

  defp code(digits) do
    case Integer.parse(digits, 16) do
      {number, ""} when number >= 0 -> number
      _other -> throw(:malformed)
    end
  end

  defp skip(<<space, rest::binary>>) when space in ~c" \t\r\n", do: skip(rest)
  defp skip(rest), do: rest
end
