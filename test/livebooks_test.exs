defmodule VLLM.LivebooksTest do
  # What can be told of the notebooks without an engine; test/real/livebooks_test.exs runs them.
  use ExUnit.Case, async: true

  alias VLLM.Livebook

  @root Path.expand("..", __DIR__)

  @packages [{~r/\bKino\./, :kino}, {~r/\bNx\./, :nx}]

  test "a set-up cell installs this library, and the packages that the cells use" do
    assert length(Livebook.books()) >= 6

    for book <- Livebook.books() do
      %{setup: setup, cells: cells} = Livebook.read(book)

      assert {{:., _, [{:__aliases__, _, [:Mix]}, :install]}, _, [packages]} =
               Code.string_to_quoted!(setup.code)

      {packages, _} = Code.eval_quoted(packages, [], file: Livebook.path(book))
      {[path: path], versions} = Keyword.pop!(packages, :ex_vllm)
      assert Path.expand(path) == @root
      for {_name, version} <- versions, do: assert({:ok, _} = Version.parse_requirement(version))

      code = Enum.map_join(cells, "\n", & &1.code)
      assert Keyword.keys(versions) == for({used, name} <- @packages, code =~ used, do: name)
    end
  end

  test "code is formatted, also what is shown and not run" do
    for book <- Livebook.books(),
        %{setup: setup, cells: cells, shown: shown} = Livebook.read(book),
        code <- for(cell <- [setup | cells], do: cell.code) ++ shown do
      assert code |> Code.format_string!() |> IO.iodata_to_binary() == code
    end
  end

  test "what the books link to is there" do
    for book <- Livebook.books(),
        [_, link] <- Regex.scan(~r/\]\(([^)#]+)/, File.read!(Livebook.path(book))),
        not String.starts_with?(link, "https:") do
      assert File.exists?(Path.expand(link, Path.join(@root, "livebooks"))), "#{book}: #{link}"
    end
  end
end
