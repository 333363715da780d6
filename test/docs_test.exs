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

  test "the examples of engines that change, sleep and end run" do
    DocExamples.run(:scripted, VLLM.Test.start!(script: "", enable_sleep_mode: true))
  end

  @tag :slow
  @tag timeout: 300_000
  test "the example of starting an engine runs" do
    DocExamples.run(:starting, nil, %{"/models/llama" => DemoModel.path()})
  end
end
