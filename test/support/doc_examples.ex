defmodule VLLM.DocExamples do
  @moduledoc """
  The examples in the docs of `VLLM`: each function's indented blocks, which the tests run one
  after the other, with variables kept. `iex>` ones are doctests instead.
  """

  import ExUnit.Assertions
  import ExUnit.CaptureIO

  # What an example needs besides an engine that generates.
  @groups [
    starting: [:llm],
    scripted: [:replicas, :scale, :drain, :restart, :reload, :sleep, :wake_up, :stop],
    pooling: [:embed, :score, :rerank],
    classifying: [:classify],
    token_pooling: [:encode],
    adapters: [:lora_request, :load_lora, :list_loras, :unload_lora]
  ]

  # The first start of an engine that compiles takes two minutes on a busy machine.
  @timeout 280_000

  @doc "Name, arity and doc of each public function of `VLLM`."
  def docs do
    {:docs_v1, _, _, _, _, _, docs} = Code.fetch_docs(VLLM)
    for {{:function, name, arity}, _, _, %{"en" => doc}, _} <- docs, do: {name, arity, doc}
  end

  @doc "The blocks of a doc: what is indented after an empty line."
  def blocks(doc) do
    for [block] <- Regex.scan(~r/(?<=\n\n)(?:    .+\n|\n)+/, "\n\n" <> doc <> "\n"),
        String.trim(block) != "",
        do: String.replace(block, ~r/^    /m, "")
  end

  @doc """
  Runs the examples of a group on the engine `llm`, in the order of the group.

  Texts of `replacements`, such as a path, stand for others where the examples run.
  """
  def run(group, llm, replacements \\ %{}) do
    examples =
      for {name, arity, doc} <- docs(),
          group(name) == group,
          blocks = Enum.reject(blocks(doc), &(&1 =~ "iex>")),
          blocks != [],
          do: {name, arity, blocks}

    assert examples != []

    for {name, arity, blocks} <- Enum.sort_by(examples, &place(group, &1)) do
      capture_io(fn -> evaluate("VLLM.#{name}/#{arity}", blocks, llm, replacements) end)
    end
  end

  # In a process of its own, for what a stream sends to it.
  defp evaluate(function, blocks, llm, replacements) do
    fn ->
      bindings =
        Enum.reduce(blocks, [llm: llm], fn block, bindings ->
          code =
            Enum.reduce(replacements, block, fn {old, new}, b -> String.replace(b, old, new) end)

          try do
            code |> Code.eval_string(bindings, file: function) |> elem(1)
          rescue
            error -> flunk("#{function}: #{Exception.message(error)}\n\n#{code}")
          end
        end)

      # No request is left to the tests that follow.
      for {_name, ref} <- bindings, is_reference(ref), do: VLLM.cancel(ref)
    end
    |> Task.async()
    |> Task.await(@timeout)
  end

  defp group(name) do
    name = twin(name)
    Enum.find_value(@groups, :generating, fn {group, names} -> name in names && group end)
  end

  defp place(group, {name, arity, _blocks}) do
    {Enum.find_index(@groups[group] || [], &(&1 == twin(name))), name, arity}
  end

  @doc "The name of a function without its `!`."
  def twin(name), do: name |> Atom.to_string() |> String.trim_trailing("!") |> String.to_atom()
end
