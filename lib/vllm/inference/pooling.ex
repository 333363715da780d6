defmodule VLLM.Pooling do
  @moduledoc false
  # What engines with vLLM's pooling runner do: vectors, classes and scores.

  alias VLLM.{
    Classification,
    Embedding,
    Error,
    Inference,
    Options,
    PoolingOutput,
    PoolingParams,
    Prompt,
    Remote,
    Score,
    Secrets
  }

  @doc "See `VLLM.embed/3`."
  @spec embed(VLLM.engine(), VLLM.prompt() | [VLLM.prompt()], keyword() | map()) ::
          {:ok, [Embedding.t()]} | {:error, Error.t()}
  def embed(engine, prompts, options) do
    with {:ok, call, params, _known} <- prepare(options, Options.pool()),
         {:ok, outputs} <- pool(engine, prompts, "embed", call, params) do
      {:ok, Enum.map(outputs, &Embedding.from_wire/1)}
    end
  end

  @doc "See `VLLM.classify/3`."
  @spec classify(VLLM.engine(), VLLM.prompt() | [VLLM.prompt()], keyword() | map()) ::
          {:ok, [Classification.t()]} | {:error, Error.t()}
  def classify(engine, prompts, options) do
    with {:ok, call, params, _known} <- prepare(options, Options.pool()),
         {:ok, outputs} <- pool(engine, prompts, "classify", call, params) do
      labels = if outputs != [], do: labels(engine, call)
      {:ok, Enum.map(outputs, &Classification.from_wire(&1, labels))}
    end
  end

  @doc "See `VLLM.encode/3`."
  @spec encode(VLLM.engine(), VLLM.prompt() | [VLLM.prompt()], keyword() | map()) ::
          {:ok, [PoolingOutput.t()]} | {:error, Error.t()}
  def encode(engine, prompts, options) do
    with {:ok, call, params, known} <- prepare(options, Options.encode()),
         {:ok, outputs} <- pool(engine, prompts, known.pooling_task, call, params) do
      {:ok, Enum.map(outputs, &PoolingOutput.from_wire/1)}
    end
  end

  @doc "See `VLLM.score/4`."
  @spec score(VLLM.engine(), texts, texts, keyword() | map()) ::
          {:ok, [Score.t()]} | {:error, Error.t()}
        when texts: String.t() | [String.t()]
  def score(engine, data_1, data_2, options) do
    with {:ok, call, params, _known} <- prepare(options, Options.score()),
         do: scores(engine, wrap(data_1), wrap(data_2), call, params)
  end

  @doc "See `VLLM.rerank/4`."
  @spec rerank(VLLM.engine(), String.t(), [String.t()], keyword() | map()) ::
          {:ok, [Score.t()]} | {:error, Error.t()}
  def rerank(engine, query, documents, options) do
    with {:ok, call, params, known} <- prepare(options, Options.rerank()),
         {:ok, scores} <- scores(engine, [query], documents, call, params) do
      scores = Enum.sort_by(scores, & &1.score, :desc)
      {:ok, if(known.top_n, do: Enum.take(scores, known.top_n), else: scores)}
    end
  end

  defp prepare(options, specs),
    do: Inference.prepare(options, specs, :pooling_params, PoolingParams)

  defp pool(engine, prompts, task, call, params) do
    params = if task, do: Map.put(params, "task", task), else: params

    with {:ok, prompts} <- Prompt.to_wire(prompts),
         do: Inference.map(engine, "pool", params, {"prompt", prompts}, call)
  end

  # All pairs are one request: what two vectors have to do with each other, and
  # which texts go into one prompt, is for vLLM to say.
  defp scores(engine, data_1, data_2, call, params) do
    params = Map.merge(params, %{"data_1" => data_1, "data_2" => data_2})

    with :ok <- check_texts(data_1),
         :ok <- check_texts(data_2),
         :ok <- check_pairs(length(data_1), length(data_2)),
         {:ok, outputs} <- if(data_2 == [], do: {:ok, []}, else: one(engine, params, call)) do
      {:ok, outputs |> Enum.with_index() |> Enum.map(fn {o, i} -> Score.from_wire(o, i) end)}
    end
  end

  defp one(engine, params, call) do
    case Remote.run(engine, {:map, "score", [params]}, call) do
      {:ok, [outputs]} ->
        {:ok, outputs}

      {:error, error} ->
        # The index would be the request's, and there is only one.
        {:error, %{error | details: Map.delete(error.details, "prompt_index")}}
    end
  end

  defp wrap(texts) when is_list(texts), do: texts
  defp wrap(text), do: [text]

  defp check_texts(texts) do
    if is_list(texts) and not List.improper?(texts) and
         Enum.all?(texts, &(is_binary(&1) and String.valid?(&1))),
       do: :ok,
       else: invalid("Texts to score are strings; got #{Secrets.inspect(texts)}.")
  end

  defp check_pairs(one, many) when one == many or one == 1, do: :ok

  defp check_pairs(one, many) do
    invalid(
      "Pairs are of one text with many, or of two lists of a length; got #{one} and #{many}."
    )
  end

  defp invalid(message), do: {:error, Error.new(:invalid_prompt, message)}

  # None where the engine was stopped after it had answered.
  defp labels(engine, call) do
    case Remote.run(engine, :labels, call) do
      {:ok, labels} -> labels
      {:error, _gone} -> nil
    end
  end
end
