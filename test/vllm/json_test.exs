defmodule VLLM.JSONTest do
  use ExUnit.Case, async: true

  alias VLLM.JSON

  doctest JSON

  test "text is JSON whatever is in it" do
    assert JSON.encode("a \"b\" \\ \n \t \e é") == ~S("a \"b\" \\ \n \t \u001b é")
    assert JSON.encode(%{list: [], map: %{}, number: 1.5}) =~ ~S("list": [],)
    assert JSON.encode(~U[2026-11-27 12:30:00Z]) == ~s("2026-11-27T12:30:00Z")
    assert JSON.encode({1, :a, true, nil}) == "[\n  1,\n  \"a\",\n  true,\n  null\n]"
  end

  test "what is read is what was written" do
    term = %{
      "a" => [1, -2.5e-7, nil, true, "é\n\u2028😀\"\\/"],
      "b" => %{"c" => []},
      "" => 12_345_678_901_234_567_890
    }

    assert JSON.decode(JSON.encode(term)) == {:ok, term}
    assert JSON.decode(JSON.line(term)) == {:ok, term}
    assert JSON.decode(" 1e2 ") == {:ok, 100.0}
    assert JSON.decode(~S({"a": 1, "a": 2})) == {:ok, %{"a" => 2}}
    assert JSON.decode(~S("\ud83d\ude00\u00e9\n\/")) == {:ok, "😀é\n/"}
  end

  test "what is no JSON is an error, however large it is" do
    for text <-
          [
            "",
            "nul",
            "01",
            "1.",
            ".5",
            "+1",
            "1e",
            "[1,]",
            "[,1]",
            "{a: 1}",
            ~S({"a" 1}),
            ~S({"a": 1,}),
            "1 2",
            "'a'"
          ] ++
            [~S("\x"), ~S("\ud800"), ~S("a), "\"\n\"", <<?", 0xFF, ?">>, "NaN", "1e999", "﻿1"] do
      assert {text, JSON.decode(text)} == {text, :error}
    end

    # Deeper than anybody means it, and longer numbers: at once.
    assert JSON.decode(String.duplicate("[", 100) <> String.duplicate("]", 100)) |> elem(0) == :ok

    for text <- [
          String.duplicate("[", 1_000_000),
          String.duplicate("9", 1_000_000),
          "1." <> String.duplicate("0", 1_000_000)
        ],
        do: assert(JSON.decode(text) == :error)
  end

  test "a text of any length takes no memory but its own" do
    for {unit, written} <- [{"é", "é"}, {"\n", ~S(\n)}, {"\e", ~S(\u001b)}] do
      text = String.duplicate(unit, 200_000)
      # In a process that may have 1.6 MB beside binaries, which lie outside it.
      limit = %{size: 200_000, kill: true, error_logger: false}
      encode = fn -> exit({:size, byte_size(JSON.encode(%{"prompt" => text}))}) end
      {pid, monitor} = :erlang.spawn_opt(encode, [:monitor, max_heap_size: limit])
      assert_receive {:DOWN, ^monitor, :process, ^pid, reason}, 30_000
      assert reason == {:size, byte_size(~s({\n  "prompt": ""\n})) + 200_000 * byte_size(written)}
    end
  end
end
