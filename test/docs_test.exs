defmodule VLLM.DocsTest do
  # The other examples of the docs run on the engines of test/real.
  use ExUnit.Case, async: true

  alias VLLM.{DemoModel, DocExamples}

  test "each function has an example, or its twin has" do
    docs = DocExamples.docs()
    assert length(docs) >= 50

    shown = for {name, _, doc} <- docs, DocExamples.blocks(doc) != [], do: DocExamples.twin(name)

    assert for({name, arity, _} <- docs, DocExamples.twin(name) not in shown, do: {name, arity}) ==
             []

    # Nothing is public and without docs.
    documented = for {name, _, _} <- docs, do: name
    functions = VLLM.__info__(:functions) |> Keyword.keys() |> Enum.uniq()
    assert functions -- documented == []
  end

  test "each public module and each guide has its place on the docs' pages" do
    docs = Mix.Project.config()[:docs].()
    {:ok, modules} = :application.get_key(:ex_vllm, :modules)

    for module <- modules,
        {:docs_v1, _, _, _, %{"en" => _}, _, _} <- [Code.fetch_docs(module)],
        # Not those of test/support.
        List.to_string(module.module_info(:compile)[:source]) =~ "/lib/vllm",
        name = inspect(module) do
      groups = for {group, pattern} <- docs[:groups_for_modules], name =~ pattern, do: group
      assert match?([_one], groups), "#{name} is in the groups #{inspect(groups)} of mix.exs"
    end

    pages = for page <- docs[:extras], do: if(is_tuple(page), do: elem(page, 0), else: page)
    for page <- pages, do: assert(File.regular?(page), page)
    assert (Path.wildcard("guides/*.md") ++ Path.wildcard("livebooks/*.livemd")) -- pages == []

    # Two pages of one name would be one.
    names =
      for page <- docs[:extras] do
        with {_path, filename: name} <- page,
             do: name,
             else: (path -> Path.basename(path, Path.extname(path)))
      end

    assert names == Enum.uniq(names)
  end

  test "examples are no part of a list that is before them" do
    {:ok, modules} = :application.get_key(:ex_vllm, :modules)

    docs =
      for module <- modules,
          {:docs_v1, _, _, _, of_module, _, functions} <- [Code.fetch_docs(module)],
          {name, %{"en" => doc}} <- [
            {"", of_module} | for({n, _, _, doc, _} <- functions, do: {n, doc})
          ],
          do: {module, name, doc}

    assert length(docs) > 200
    # Markdown takes what is indented after a list for its last item's.
    in_list = ~r/^ {0,3}[*-] .*\n(?: +\S.*\n)*\n {4}\S/m
    assert for({module, name, doc} <- docs, doc =~ in_list, do: {module, name}) == []
  end

  test "the examples of engines that change, sleep and end run" do
    DocExamples.run(:scripted, VLLM.Test.start!(script: "", enable_sleep_mode: true))
  end

  @tag :slow
  @tag timeout: 300_000
  test "the example of starting an engine runs" do
    DocExamples.run(:starting, nil, %{"/models/llama" => DemoModel.path()})
  end
end
