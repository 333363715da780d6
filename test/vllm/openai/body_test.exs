defmodule VLLM.OpenAI.BodyTest do
  use ExUnit.Case, async: true

  alias VLLM.JSON
  alias VLLM.OpenAI.Body

  doctest Body

  # Always the same ones, so that a failure can be looked at.
  setup do
    :rand.seed(:exsss, {1, 2, 3})
    :ok
  end

  @characters ["a", "é", "\"", "\\", "{", "}", "[", "]", ",", ":", "\n", "😀", "/", " "]

  defp text, do: Enum.map_join(1..:rand.uniform(8), fn _ -> Enum.random(@characters) end)

  defp value(0), do: Enum.random([nil, true, 1.5, -3, text()])

  defp value(depth) do
    case :rand.uniform(3) do
      1 -> value(0)
      2 -> for(_ <- 1..:rand.uniform(3), do: value(depth - 1))
      3 -> for(_ <- 1..:rand.uniform(3), into: %{}, do: {text(), value(depth - 1)})
    end
  end

  test "the members of any object are found as they were written" do
    for _ <- 1..500 do
      name = text()
      object = Map.merge(%{"a" => value(3), "b" => value(3)}, %{"model" => name})
      assert {:ok, members} = Body.members(JSON.encode(object), ["model", "a", "b", "c"])
      assert Map.keys(members) == ["a", "b", "model"]
      assert Body.text(members["model"]) == {:ok, name}
      # What lies deeper is indented there, and one that is written by itself is not.
      for key <- ["a", "b"],
          do: assert(squeezed(members[key]) == squeezed(JSON.encode(object[key])))
    end
  end

  defp squeezed(json), do: String.replace(json, ~r/\n */, "")

  test "the last of several members of a name counts, however it is written" do
    assert {:ok, %{"model" => ~s("b")}} =
             Body.members(~S({"model": "a", "mod\u0065l": "b"}), ["model"])
  end

  test "characters may be written by their numbers" do
    assert Body.text(~S("\ud83d\ude00\u00e9\n\/")) == {:ok, "😀é\n/"}

    for wrong <- [
          ~S("\ud83d"),
          ~S("\ude00"),
          ~S("\ud83dx"),
          ~S("\u12"),
          ~S("\u-123"),
          ~S("\x"),
          ~S("a)
        ],
        do: assert(Body.text(wrong) == :error)
  end

  test "names of any length take no memory but their own" do
    for unit <- ["x", ~S(\n), ~S(\u00e9)] do
      long = String.duplicate(unit, 200_000)
      body = ~s({"#{long}": 1, "model": "#{long}"})

      # In a process that may have 1.6 MB beside binaries, which lie outside it.
      read = fn ->
        {:ok, %{"model" => written}} = Body.members(body, ["model"])
        {:ok, text} = Body.text(written)
        exit({:size, byte_size(text)})
      end

      limit = %{size: 200_000, kill: true, error_logger: false}
      {pid, monitor} = :erlang.spawn_opt(read, [:monitor, max_heap_size: limit])
      assert_receive {:DOWN, ^monitor, :process, ^pid, reason}, 30_000
      {:ok, one} = Body.text("\"" <> unit <> "\"")
      assert reason == {:size, 200_000 * byte_size(one)}
    end
  end

  test "whatever comes, it is members or none" do
    whole = JSON.encode(%{"model" => "a\"b", "messages" => [%{"x" => [1, "}"]}]})

    for _ <- 1..2_000 do
      at = :rand.uniform(byte_size(whole)) - 1
      <<before::binary-size(at), _, rest::binary>> = whole
      byte = :rand.uniform(256) - 1
      body = Enum.random([before, before <> rest, <<before::binary, byte, rest::binary>>])

      case Body.members(body, ["model", "messages"]) do
        {:ok, members} -> for {_name, value} <- members, do: assert(byte_size(value) > 0)
        :error -> :ok
      end
    end
  end
end
