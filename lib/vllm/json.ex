defmodule VLLM.JSON do
  @moduledoc false
  # Terms as JSON text. Elixir has an encoder since 1.18, Erlang/OTP since 27,
  # and both are newer than what this library asks for.

  @doc ~S"""
  A term as JSON text, indented, with names in order. Structs are their fields, and times are texts.

      iex> VLLM.JSON.encode(%{fits?: true, bits: [4, nil]})
      ~s({\n  "bits": [\n    4,\n    null\n  ],\n  "fits?": true\n})
  """
  @spec encode(term()) :: String.t()
  def encode(term), do: term |> value("\n") |> IO.iodata_to_binary()

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
