defmodule VLLM.Real.LivebooksTest do
  # The notebooks, cell by cell, on real engines: each gives the outputs that it shows.
  use ExUnit.Case

  alias VLLM.{DemoModel, Livebook}

  @moduletag :slow
  @moduletag timeout: 600_000

  @packages Path.expand("../support/livebook_packages.exs", __DIR__)

  # The compiler of this file does not see what that one defines.
  @compile {:no_warn_undefined, [Kino, Kino.Frame]}

  setup_all do
    modules = for {module, _binary} <- Code.compile_file(@packages), do: module

    # Others ask whether they are there.
    on_exit(fn ->
      for module <- modules do
        :code.purge(module)
        :code.delete(module)
      end
    end)
  end

  # The bindings at the end of a book whose cells have shown what it says.
  defp read(book) do
    {outputs, bindings} = Livebook.run(book)
    assert outputs != []
    for {line, shown, given} <- outputs, do: assert({line, given} == {line, shown})
    bindings
  end

  test "a language model in a Livebook" do
    read("start")
  end

  test "answers as they are written" do
    bindings = read("streaming")
    answers = Map.new(DemoModel.facts() ++ DemoModel.chats())
    assert Kino.Frame.text(bindings[:frame]) == answers["The colours of the rainbow are"]

    for {question, frame} <- bindings[:frames],
        do: assert(Kino.Frame.text(frame) == answers[question])

    Kino.submit(bindings[:form], %{question: "Who are you?"})
    assert Kino.Frame.text(bindings[:chat]) == "**Who are you?**" <> answers["Who are you?"]
  end

  test "answers that a program can read" do
    read("structured_outputs_and_tools")
  end

  test "texts as vectors" do
    read("embeddings")
  end

  test "choosing a quantized model" do
    read("choosing_a_model")
  end

  test "quantizing a model, and what that lost" do
    before = VLLM.Job.list()
    bindings = read("quantizing_a_model")
    assert Kino.Frame.text(bindings[:frame]) =~ "done"
    assert VLLM.Job.list() == before
  end
end
