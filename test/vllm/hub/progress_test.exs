defmodule VLLM.Hub.ProgressTest do
  use ExUnit.Case, async: true
  doctest VLLM.Hub.Progress

  alias VLLM.Hub.Progress

  @wire %{"bytes" => 1, "total_bytes" => 4, "files" => 0, "total_files" => 2}

  test "what a worker tells becomes a struct, if it makes sense" do
    assert {:ok, %Progress{bytes: 1, total_bytes: 4, files: 0, total_files: 2} = progress} =
             Progress.from_wire(@wire)

    assert progress.seconds_left == nil
    assert {:ok, %{seconds_left: 1.5}} = Progress.from_wire(Map.put(@wire, "seconds_left", 1.5))

    for {name, value} <- [
          {"bytes", -1},
          {"files", nil},
          {"total_files", 1.5},
          {"seconds_left", "?"}
        ],
        do: assert(Progress.from_wire(Map.put(@wire, name, value)) == :error)
  end

  test "a bar fills a terminal that has room for it" do
    {:ok, progress} = Progress.from_wire(@wire)
    words = "1 of 4 B (25 %), 0 of 2 files"
    assert Progress.bar(progress, 120) == "[=======#{String.duplicate(" ", 23)}] " <> words
    assert Progress.bar(progress, String.length(words) + 11) == "[==      ] " <> words
    assert Progress.bar(progress, 20) == words
  end

  test "times are told as people tell them" do
    {:ok, progress} = Progress.from_wire(@wire)

    for {seconds, words} <- [
          {3.2, "3 s"},
          {89.0, "89 s"},
          {300, "5 min"},
          {5_500.0, "1 h 32 min"}
        ],
        do: assert(Progress.describe(%{progress | seconds_left: seconds}) =~ ", #{words} left")
  end

  test "a download of nothing is whole" do
    {:ok, progress} = Progress.from_wire(%{@wire | "bytes" => 0, "total_bytes" => 0})
    assert Progress.describe(progress) == "0 of 0 B (100 %), 0 of 2 files"
  end
end
