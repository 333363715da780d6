defmodule VLLM.Real.EmbedsTest do
  # The real engine, started for prompts of embeddings.
  use ExUnit.Case

  alias VLLM.{DemoModel, Error}

  @moduletag :slow
  @moduletag timeout: 300_000

  @hidden_size 256

  setup_all do
    %{llm: DemoModel.start!("demo", enable_prompt_embeds: true), table: table()}
  end

  test "embeddings complete like the tokens that they are of, whole and streamed", context do
    %{llm: llm, table: table} = context
    {prompts, completions} = Enum.unzip(DemoModel.facts())
    embedded = for ids <- VLLM.tokenize!(llm, prompts), do: embed(ids, table)
    options = [temperature: 0.0, max_tokens: 64]
    outputs = VLLM.generate!(llm, embedded, options)
    assert VLLM.text(outputs) == completions
    assert Enum.all?(outputs, &(&1.prompt == nil))
    # They are counted as tokens of which nothing is known.
    %{shape: {tokens, @hidden_size}} = hd(embedded)
    assert hd(outputs).prompt_token_ids == List.duplicate(0, tokens)
    assert llm |> VLLM.stream_text!(hd(embedded), options) |> Enum.join() == hd(completions)
  end

  test "embeddings of another model are refused, and the engine goes on", context do
    %{llm: llm, table: table} = context
    other = %{prompt_embeds: <<0::size(256)-unit(32)>>, shape: {2, 128}}
    assert {:error, %Error{reason: :invalid_prompt} = error} = VLLM.generate(llm, other)
    assert error.message =~ "takes 256"
    assert error.details["hidden_size"] == 256

    prompt = embed(VLLM.tokenize!(llm, "The"), table)

    assert {:error, %Error{reason: :unsupported}} =
             VLLM.beam_search(llm, prompt, beam_width: 2, max_tokens: 2)

    assert {:error, %Error{reason: :invalid_option, details: %{"option" => "prompt_logprobs"}}} =
             VLLM.generate(llm, prompt, prompt_logprobs: 1)

    assert DemoModel.wrong_facts(llm) == []
  end

  defp embed(ids, table) do
    rows =
      for id <- ids, into: <<>>, do: binary_part(table, id * 4 * @hidden_size, 4 * @hidden_size)

    %{prompt_embeds: rows, shape: {length(ids), @hidden_size}}
  end

  # What the model's first layer has for each token: a bfloat16 is the upper half of a float.
  defp table do
    <<size::64-little, header::binary-size(size), tensors::binary>> =
      File.read!(Path.join(DemoModel.path(), "model.safetensors"))

    [first, last] =
      ~r/"model\.embed_tokens\.weight":\{[^}]*"data_offsets":\[(\d+),(\d+)\]/
      |> Regex.run(header, capture: :all_but_first)
      |> Enum.map(&String.to_integer/1)

    for <<bits::binary-size(2) <- binary_part(tensors, first, last - first)>>,
      into: <<>>,
      do: <<0::16, bits::binary>>
  end
end
