defmodule VLLM.WireTest do
  use ExUnit.Case, async: true
  doctest VLLM.Wire

  alias VLLM.Bridge.MessagePack
  alias VLLM.{ChatMessage, ToolCall, Wire}

  test "atoms are strings and keyword lists maps, at any depth" do
    tool = %{
      type: :function,
      function: [name: "f", parameters: %{required: ["a", :b], x: nil, y: [], z: [[on: true]]}]
    }

    assert Wire.encode([tool]) ==
             {:ok,
              [
                %{
                  "type" => "function",
                  "function" => %{
                    "name" => "f",
                    "parameters" => %{
                      "required" => ["a", "b"],
                      "x" => nil,
                      "y" => [],
                      "z" => [%{"on" => true}]
                    }
                  }
                }
              ]}
  end

  test "numbers stay, and are keys as well" do
    term = %{5 => -100, 6 => 1.5, 7 => :neg_infinity, 8 => 2 ** 64 - 1, 9 => -(2 ** 63)}
    assert Wire.encode(term) == {:ok, term}
  end

  test "structs of this library have their form" do
    call = %ToolCall{id: "1", name: "f", arguments: "{}", parsed: %{}}

    assert Wire.encode(%{messages: [%ChatMessage{role: "assistant", tool_calls: [call]}]}) ==
             {:ok,
              %{
                "messages" => [
                  %{
                    "role" => "assistant",
                    "content" => nil,
                    "tool_calls" => [
                      %{
                        "id" => "1",
                        "type" => "function",
                        "function" => %{"name" => "f", "arguments" => "{}"}
                      }
                    ]
                  }
                ]
              }}

    assert Wire.encode(%{a: VLLM.structured_outputs!(choice: ["x"])}) ==
             {:ok, %{"a" => %{"choice" => ["x"]}}}
  end

  test "of a name that a keyword list has twice, the first counts" do
    assert Wire.encode(a: 1, b: [c: 1, c: 2], a: {2}) == {:ok, %{"a" => 1, "b" => %{"c" => 1}}}
  end

  test "what cannot be sent is named, with where it is" do
    for {term, what} <- [
          {{1, 2}, "a tuple"},
          {~D[2026-01-01], "a struct (`Date`)"},
          {1..2, "a struct (`Range`)"},
          {MapSet.new([1]), "a struct (`MapSet`)"},
          {&is_atom/1, "a function"},
          {self(), "a pid, a port or a reference"},
          {2 ** 64, "an integer of more than 64 bits"},
          {-(2 ** 63) - 1, "an integer of more than 64 bits"},
          {<<255>>, "a string that is not valid UTF-8"},
          {<<1::3>>, "a bitstring"},
          {[1 | 2], "an improper list"},
          {[{:a, 1} | {:b, 2}], "a tuple"},
          {%{{1} => 2}, "a tuple as a key"},
          {%{<<255>> => 2}, "a key that is not valid UTF-8"},
          {%{1.5 => 2}, "a float as a key"},
          {%{:a => 1, "a" => 2}, "a name that is given twice, as an atom and as a string,"}
        ] do
      assert {:error, {^what, path}} = Wire.encode(term)
      assert {:error, {^what, ["a", 1, "b" | ^path]}} = Wire.encode(%{a: [0, [b: term]]})
    end
  end

  test "what is nested too deep is refused, and what just fits is not" do
    nested = fn depth -> Enum.reduce(1..depth, 1, fn _, inner -> [inner] end) end
    assert {:ok, term} = Wire.encode(nested.(500))
    assert {:ok, _} = MessagePack.encode([0, 1, "load", %{"options" => %{"x" => term}}])
    assert {:error, {"a list, nested more than 500 deep,", path}} = Wire.encode(nested.(600))
    assert length(path) == 501
    assert Wire.describe({"a list", path}) =~ ~r/ at `(\[0\]){20}…`$/
  end
end
