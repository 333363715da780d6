defmodule VLLM.Real.PoolingTest do
  # The demo model as an embedder, one engine for the whole module; and the
  # models that python/tests/pooling_models.py makes of it. What the numbers
  # must be is tested there.
  use ExUnit.Case

  alias VLLM.{
    Classification,
    DemoModel,
    DocExamples,
    Embedding,
    Error,
    PoolingOutput,
    Score,
    Server
  }

  @moduletag timeout: 300_000

  @texts ["The capital of France is", "The capital of Japan is", "Seven is a number."]

  setup_all do
    %{llm: DemoModel.start!("demo", runner: "pooling", convert: "embed")}
  end

  defp dot(one, other), do: Enum.zip_with(one, other, &(&1 * &2)) |> Enum.sum()

  test "an embedder says what it is", %{llm: llm} do
    assert %{runner: "pooling", pooling_task: "embed", labels: nil} = VLLM.engine_info!(llm)
  end

  test "each prompt has a vector of length 1, in the order of the prompts", %{llm: llm} do
    assert {:ok, [first, second, _] = embeddings} = VLLM.embed(llm, @texts)

    for %Embedding{dimensions: 256, data: data} = embedding <- embeddings do
      assert byte_size(data) == 4 * 256
      numbers = Embedding.to_list(embedding)
      assert length(numbers) == 256
      assert_in_delta dot(numbers, numbers), 1.0, 1.0e-3
    end

    assert Embedding.to_list(first) != Embedding.to_list(second)
    assert [again] = VLLM.embed!(llm, %{prompt_token_ids: first.prompt_token_ids})
    assert_in_delta dot(Embedding.to_list(first), Embedding.to_list(again)), 1.0, 1.0e-2
  end

  test "scores are the cosines of the vectors", %{llm: llm} do
    [query | _] = vectors = Enum.map(VLLM.embed!(llm, @texts), &Embedding.to_list/1)
    assert {:ok, scores} = VLLM.score(llm, hd(@texts), @texts)
    assert Enum.map(scores, & &1.index) == [0, 1, 2]

    for {%Score{score: score}, vector} <- Enum.zip(scores, vectors) do
      assert_in_delta score, dot(query, vector), 2.0e-2
    end

    assert [%Score{}, %Score{}, %Score{}] = VLLM.score!(llm, @texts, Enum.reverse(@texts))
    assert VLLM.score!(llm, "The", []) == []
  end

  test "documents are sorted by how well they fit", %{llm: llm} do
    [query | _] = @texts
    documents = ["Seven is a number.", query, "The capital of Japan is"]
    assert {:ok, [best | _] = scores} = VLLM.rerank(llm, query, documents)
    assert %Score{index: 1, score: score} = best
    assert_in_delta score, 1.0, 1.0e-2
    assert Enum.map(scores, & &1.score) == Enum.sort(Enum.map(scores, & &1.score), :desc)
    assert VLLM.rerank!(llm, query, documents, top_n: 1) |> Enum.map(& &1.index) == [1]
    assert VLLM.rerank!(llm, query, []) == []
  end

  # What `curl` is answered at a path of a server of this engine.
  defp curl(llm, path, body) do
    {:ok, answer} = VLLM.JSON.decode(curl(llm, path, body, []))
    answer
  end

  defp curl(llm, path, body, switches) do
    url = Server.url(start_supervised!({Server, models: [{"pool", llm}], port: 0}))
    body = VLLM.JSON.encode(Map.put(body, :model, "pool"))
    json = ["-H", "Content-Type: application/json", "-d", body]
    {said, 0} = System.cmd("curl", ["-sS" | switches] ++ ["#{URI.merge(url, path)}" | json])
    stop_supervised!({Server, 0})
    said
  end

  @tag :slow
  test "vectors and scores over HTTP are those that Elixir gets", %{llm: llm} do
    [first | _] = VLLM.embed!(llm, @texts)
    assert %{"data" => [one | _] = data} = curl(llm, "/v1/embeddings", %{input: @texts})
    assert Enum.map(data, & &1["index"]) == [0, 1, 2]
    assert_in_delta dot(one["embedding"], Embedding.to_list(first)), 1.0, 1.0e-2
    base64 = %{input: hd(@texts), encoding_format: "base64"}
    assert %{"data" => [%{"embedding" => text}]} = curl(llm, "/v1/embeddings", base64)
    assert byte_size(Base.decode64!(text)) == 4 * 256

    # As bytes they come with a head that says where each begins.
    said = curl(llm, "/v1/embeddings", %{base64 | encoding_format: "bytes"}, ["-i"])
    [head, bytes] = String.split(said, "\r\n\r\n", parts: 2)
    assert bytes == Base.decode64!(text)
    [metadata] = for "metadata: " <> text <- String.split(head, "\r\n"), do: text
    assert {:ok, %{"data" => [%{"start" => 0, "end" => 1024}]}} = VLLM.JSON.decode(metadata)

    [query | _] = @texts
    asked = %{text_1: query, text_2: @texts}
    assert %{"data" => scores} = curl(llm, "/v1/score", asked)
    assert %{"data" => ^scores} = curl(llm, "/score", asked)

    for {mine, theirs} <- Enum.zip(VLLM.score!(llm, query, @texts), scores),
        do: assert_in_delta(mine.score, theirs["score"], 1.0e-2)

    asked = %{query: query, documents: Enum.reverse(@texts), top_n: 1}

    for path <- ["/rerank", "/v1/rerank", "/v2/rerank"] do
      assert %{"results" => [%{"index" => 2, "document" => document}]} = curl(llm, path, asked)
      assert document["text"] == query
    end

    assert %{"error" => %{"code" => "unsupported"}} =
             curl(llm, "/v1/completions", %{prompt: "The"})
  end

  test "encode gives the engine's own task as it is", %{llm: llm} do
    assert [%PoolingOutput{shape: [256]} = output] = VLLM.encode!(llm, hd(@texts))
    [embedding] = VLLM.embed!(llm, hd(@texts))
    assert_in_delta dot(PoolingOutput.to_list(output), Embedding.to_list(embedding)), 1.0, 1.0e-2
  end

  test "more prompts than the engine computes together keep their order", %{llm: llm} do
    prompts = for i <- 1..500, do: %{prompt_token_ids: [5, 3 + i]}
    assert {:ok, embeddings} = VLLM.embed(llm, prompts)
    ids = Enum.map(prompts, & &1.prompt_token_ids)
    assert Enum.map(embeddings, & &1.prompt_token_ids) == ids
  end

  test "the examples of the docs run", %{llm: llm} do
    DocExamples.run(:pooling, llm)
  end

  test "a text that is too long can be cut", %{llm: llm} do
    text = String.duplicate("The capital of France is Paris. ", 1000)
    assert {:error, %Error{reason: :prompt_too_long} = error} = VLLM.embed(llm, ["The", text])
    assert error.details["prompt_index"] == 1
    options = [tokenization_kwargs: [truncate_prompt_tokens: -1]]
    assert [embedding] = VLLM.embed!(llm, text, options)
    assert length(embedding.prompt_token_ids) == 1024
  end

  test "parameters can be given inline and as a struct", %{llm: llm} do
    params = VLLM.pooling_params!(use_activation: true)
    assert [raw] = VLLM.embed!(llm, "The", pooling_params: params, use_activation: false)
    assert [unit] = VLLM.embed!(llm, "The", pooling_params: params)
    [raw, unit] = Enum.map([raw, unit], &Embedding.to_list/1)
    assert dot(raw, raw) > 2.0
    assert_in_delta dot(raw, unit), :math.sqrt(dot(raw, raw)), 0.1
  end

  test "what this engine cannot do is an error that says which can", %{llm: llm} do
    assert {:error, %Error{reason: :unsupported, message: message}} = VLLM.classify(llm, "The")
    assert message =~ ~s(`convert: "classify"`)

    assert {:error, %Error{reason: :unsupported, message: message}} =
             VLLM.encode(llm, "The", pooling_task: "token_embed")

    assert message =~ ~s(`pooler_config: %{task: "token_embed"}`)
    assert {:error, %Error{reason: :unsupported, message: message}} = VLLM.generate(llm, "The")
    assert message =~ ~s(`runner: "generate"`)

    assert {:error, %Error{reason: :invalid_option, details: %{"option" => "dimensions"}}} =
             VLLM.embed(llm, "The", dimensions: 16)
  end

  describe "models that are made here" do
    @describetag :slow
    @describetag :tmp_dir

    setup %{tmp_dir: dir} do
      script = Path.expand("../../python/tests/pooling_models.py", __DIR__)
      {:ok, python} = VLLM.Python.executable()
      {output, status} = System.cmd(python, [script, dir], stderr_to_stdout: true)
      assert status == 0, output
      :ok
    end

    defp start!(folder, options \\ []) do
      VLLM.llm!(folder, Keyword.merge(DemoModel.options(), options))
    end

    test "classify, and score pairs with one class", %{tmp_dir: dir} do
      llm = start!(Path.join(dir, "classifier"))

      for classification <- VLLM.classify!(llm, @texts) do
        assert %Classification{labels: ["animal", "city", "number"], probs: probs} =
                 classification

        assert_in_delta Enum.sum(probs), 1.0, 1.0e-3
        likeliest = Enum.find_index(probs, &(&1 == Enum.max(probs)))
        assert classification.label == Enum.at(classification.labels, likeliest)
      end

      assert {:error, %Error{reason: :unsupported, message: message}} = VLLM.score(llm, "a", "b")
      assert message =~ "3 classes"
      DocExamples.run(:classifying, llm)
      VLLM.stop(llm)

      llm = start!(Path.join(dir, "cross-encoder"))
      documents = [" Paris.", " Tokyo."]
      scores = VLLM.score!(llm, hd(@texts), documents)

      assert [%Score{score: first}, %Score{score: second}] = scores
      assert first != second

      for %Score{score: score, prompt_token_ids: ids} <- scores do
        assert [%Classification{probs: [prob], labels: ["relevance"]}] =
                 VLLM.classify!(llm, %{prompt_token_ids: ids})

        assert_in_delta score, prob, 1.0e-2
      end

      # The same over HTTP.
      best = Enum.max_by(scores, & &1.score)
      asked = %{query: hd(@texts), documents: documents}
      assert %{"results" => [top, _other]} = curl(llm, "/rerank", asked)
      assert top["index"] == best.index
      assert_in_delta top["relevance_score"], best.score, 1.0e-2

      VLLM.stop(llm)
    end

    test "make 4,096 vectors of 1,024 numbers", %{tmp_dir: dir} do
      llm = start!(Path.join(dir, "wide"), runner: "pooling", convert: "embed")
      prompts = for i <- 1..4096, do: %{prompt_token_ids: [5, 3 + rem(i, 1000)]}
      assert {:ok, embeddings} = VLLM.embed(llm, prompts)
      ids = Enum.map(prompts, & &1.prompt_token_ids)
      assert Enum.map(embeddings, & &1.prompt_token_ids) == ids
      assert Enum.all?(embeddings, &(&1.dimensions == 1024 and byte_size(&1.data) == 4096))
      VLLM.stop(llm)
    end
  end

  @tag :slow
  test "tokens have vectors of their own" do
    options = [runner: "pooling", convert: "embed", pooler_config: [task: "token_embed"]]
    llm = DemoModel.start!("demo", options)
    assert [%PoolingOutput{} = output] = VLLM.encode!(llm, hd(@texts))
    assert output.shape == [length(output.prompt_token_ids), 256]
    assert [[_ | _] | _] = rows = PoolingOutput.to_list(output)
    for row <- rows, do: assert_in_delta(dot(row, row), 1.0, 1.0e-2)
    assert [%Score{score: score}] = VLLM.score!(llm, hd(@texts), hd(@texts))
    assert_in_delta score, length(rows), 0.1
    DocExamples.run(:token_pooling, llm)
    VLLM.stop(llm)
  end
end
