defmodule VLLM.GuidesTest do
  # What the guides show is what the library does.
  use ExUnit.Case, async: true

  @migrating File.read!(Path.expand("../guides/migrating.md", __DIR__))

  @reliability File.read!(Path.expand("../guides/reliability.md", __DIR__))

  test "each promise of the reliability guide has tests, and they are there" do
    [_ | promises] = String.split(@reliability, ~r/^### \d+\. /m)
    assert length(promises) == 10

    for promise <- promises do
      [title | _] = String.split(promise, "\n")
      lines = Regex.scan(~r/^\* `((?:test|python\/tests)\/\S+)`: (.+)$/m, promise)
      assert lines != [], title

      for [_, file, names] <- lines, [_, name] <- Regex.scan(~r/"([^"]+)"/, names) do
        assert tests(file) =~ declaration(file, name), "#{file} has no test #{inspect(name)}"
      end
    end
  end

  defp tests(file), do: File.read!(Path.expand("../#{file}", __DIR__))

  # What a test's name takes from its surroundings is "…" in the guide.
  defp declaration(file, name) do
    pattern = name |> Regex.escape() |> String.replace("…", "\#{[^}]+}")
    if Path.extname(file) == ".py", do: ~r/def #{pattern}\(/, else: ~r/test "#{pattern}"/
  end

  test "the files that the architecture guide names are there" do
    guide = File.read!(Path.expand("../guides/architecture.md", __DIR__))
    names = Regex.scan(~r/`([a-z_]+(?:\/[A-Za-z_.]+)*\/(?:[A-Za-z_]+\.(?:exs?|py|md))?)`/, guide)
    folders = ["", "lib/vllm", "python/vllm_bridge"]

    for [_, name] <- names do
      paths = for folder <- folders, do: Path.expand(Path.join(["..", folder, name]), __DIR__)
      assert Enum.any?(paths, &File.exists?/1), name
    end
  end

  test "the examples of the migration guide run" do
    llm = VLLM.Test.start!(script: "Paris")
    blocks = Regex.scan(~r/^```elixir\n(.*?)^```$/ms, @migrating, capture: :all_but_first)

    {results, _bindings} =
      Enum.map_reduce(blocks, [llm: llm], fn [code], bindings ->
        Code.eval_string(code, bindings)
      end)

    assert results == [["Hello, my name isParis"], "Paris", "Paris", "Paris"]

    assert [generate, chat, structured, lora] = VLLM.Test.requests(llm)
    assert %{"temperature" => 0.8, "max_tokens" => 100} = generate.sampling_params
    assert Enum.map(chat.messages, & &1["role"]) == ["system", "user"]
    assert %{"regex" => "[0-9]{3}-[0-9]{4}"} = structured.sampling_params["structured_outputs"]
    assert %{"lora_name" => "my-adapter", "lora_int_id" => 1} = lora.params["lora_request"]
  end

  test "the functions that the migration guide keeps are there" do
    Code.ensure_loaded!(VLLM)
    [_, kept, rest] = String.split(@migrating, ~r/^## What (stays|the rest becomes)$/m)
    [_ | _] = names = Regex.scan(~r/VLLM\.([a-z_]+[!?]?)\/(\d)/, kept, capture: :all_but_first)

    # And of the rest those in the column of what they become.
    new =
      for line <- String.split(rest, "\n"), [_, _, new | _] <- [String.split(line, "|")], do: new

    more = Regex.scan(~r/VLLM\.([a-z_]+[!?]?)\/(\d)/, Enum.join(new), capture: :all_but_first)

    for [name, arity] <- names ++ more do
      exported? = function_exported?(VLLM, String.to_atom(name), String.to_integer(arity))
      assert exported?, "VLLM.#{name}/#{arity}"
    end
  end
end
