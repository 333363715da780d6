defmodule VLLM.JSON do
  @moduledoc false
  # Terms as JSON text, and back. Elixir has both since 1.18, Erlang/OTP since 27,
  # and these are newer than what this library asks for.

  alias VLLM.JSON.Decoder

  @doc ~S"""
  A term as JSON text, indented, with names in order. Structs are their fields, and times are texts.

      iex> VLLM.JSON.encode(%{fits?: true, bits: [4, nil]})
      ~s({\n  "bits": [\n    4,\n    null\n  ],\n  "fits?": true\n})
  """
  @spec encode(term()) :: String.t()
  def encode(term), do: term |> value("\n") |> IO.iodata_to_binary()

  @doc ~S"""
  The same in one line, as what an event has to say.

      iex> VLLM.JSON.line(%{text: "a\nb", bits: [4, nil]})
      ~S({"bits": [4,null],"text": "a\nb"})
  """
  @spec line(term()) :: String.t()
  # No newline is left within a text.
  def line(term), do: term |> encode() |> String.replace(~r/\n */, "")

  @doc ~S"""
  The term that a JSON text stands for, with strings for names, and nil for `null`. Of several members of a
  name the last counts. What RFC 8259 does not allow is an error, and so are texts that are not UTF-8, numbers
  of many hundred digits, and what is nested more than a hundred deep.

      iex> VLLM.JSON.decode(~S({"bits": [4, -1.5e3, null], "text": "a\u00e9"}))
      {:ok, %{"bits" => [4, -1500.0, nil], "text" => "aé"}}
      iex> VLLM.JSON.decode("[1,]")
      :error
  """
  @spec decode(binary()) :: {:ok, term()} | :error
  def decode(text), do: Decoder.decode(text)

  defp value(nil, _line), do: "null"
  defp value(atom, _line) when is_boolean(atom), do: Atom.to_string(atom)
  defp value(atom, line) when is_atom(atom), do: atom |> Atom.to_string() |> value(line)
  defp value(number, _line) when is_number(number), do: to_string(number)
  defp value(text, _line) when is_binary(text), do: string(text)
  defp value(%DateTime{} = time, _line), do: string(DateTime.to_iso8601(time))
  defp value(%_{} = struct, line), do: struct |> Map.from_struct() |> value(line)

  defp value(map, line) when is_map(map) do
    map
    |> Enum.map(fn {name, value} -> {to_string(name), value} end)
    |> Enum.sort()
    |> wrapped("{", "}", line, fn {name, value}, line ->
      [string(name), ": ", value(value, line)]
    end)
  end

  defp value(list, line) when is_list(list), do: wrapped(list, "[", "]", line, &value/2)
  defp value(tuple, line) when is_tuple(tuple), do: tuple |> Tuple.to_list() |> value(line)

  defp wrapped([], open, close, _line, _each), do: [open, close]

  defp wrapped(items, open, close, line, each) do
    inner = line <> "  "

    [
      open,
      inner,
      items |> Enum.map(&each.(&1, inner)) |> Enum.intersperse([",", inner]),
      line,
      close
    ]
  end

  # Joined to a binary that grows in place: a list of its characters would be many times as large.
  defp string(text), do: [?", for(<<char::utf8 <- text>>, into: "", do: escaped(char)), ?"]

  defp escaped(?"), do: ~S(\")
  defp escaped(?\\), do: ~S(\\)
  defp escaped(?\n), do: ~S(\n)
  defp escaped(?\t), do: ~S(\t)
  defp escaped(char) when char < 0x20, do: to_string(:io_lib.format("\\u~4.16.0b", [char]))
  defp escaped(char), do: <<char::utf8>>
end
