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
