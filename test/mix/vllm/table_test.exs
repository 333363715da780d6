defmodule Mix.Vllm.TableTest do
  use ExUnit.Case, async: true

  alias Mix.Vllm.Table

  doctest Table

  defp lines(columns, rows) do
    for line <- Table.lines(columns, rows),
        do: line |> IO.ANSI.format(false) |> IO.iodata_to_binary()
  end

  test "columns are as wide as what is in them, and numbers stand to the right" do
    rows = [["awq", "3.9 GiB", {:green, "yes"}], ["bfloat16", "15.0 GiB", ""]]

    assert lines(["format", {:right, "memory"}, "fits"], rows) == [
             "format      memory  fits",
             "awq        3.9 GiB  yes",
             "bfloat16  15.0 GiB"
           ]
  end

  test "a long last column goes on below itself" do
    why = String.duplicate("because ", 20) <> "of that"
    [title | rest] = lines(["format", "why"], [["awq", why], ["gptq", "no"]])
    assert title == "format  why"
    assert ["awq     because" <> _, "        because" <> _, "gptq    no"] = rest
    assert Enum.all?(rest, &(String.length(&1) <= 110))
    assert rest |> Enum.take(2) |> Enum.map_join(" ", &String.slice(&1, 8..-1)) == why
  end

  test "a table without rows has no lines" do
    assert Table.lines(["format"], []) == []
  end

  test "numbers are written in full" do
    assert Enum.map([0, 999, 1000, 1_234_567, nil], &Table.whole/1) ==
             ["0", "999", "1,000", "1,234,567", "?"]
  end
end
