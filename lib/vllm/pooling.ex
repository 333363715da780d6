defmodule VLLM.Pooling do
  @moduledoc false
  # What engines with vLLM's pooling runner do: vectors, classes and scores.

  alias VLLM.Engine.{Call, Router, Table}

  alias VLLM.{
    Classification,
    Embedding,
    Error,
    Options,
    Params,
    PoolingOutput,
    PoolingParams,
    Prompt,
    Score
  }

  @pool Options.request() ++
          [
            {:pooling_params, :any, nil,
             "a `VLLM.PoolingParams`, a keyword list or a map; parameters given inline override it"},
            {:tokenization_kwargs, :any, nil,
             "how texts become tokens, as a keyword list or a map: `truncate_prompt_tokens` (an integer: " <>
               "cut what is longer; -1 cuts to what the model takes), `truncation_side` (`\"left\"` or " <>
               "`\"right\"`: where), `add_special_tokens`, `do_lower_case` (booleans), `pad_prompt_tokens` (an integer)"},
            {:priority, :any, nil,
             "an integer, lower is earlier; only for engines with `scheduling_policy: \"priority\"`"}
          ]

  @encode @pool ++
            [
              {:pooling_task, :string, nil,
               "`\"embed\"`, `\"classify\"`, `\"token_embed\"` or `\"token_classify\"`, as an assertion; by default the engine's"}
            ]

  @score @pool ++
           [
             {:chat_template, :string, nil,
              "a Jinja template that makes one prompt of a `query` and a `document` message, for cross-encoders that need one"}
           ]

  @rerank @score ++
            [{:top_n, :pos_integer, nil, "how many documents to return; by default all of them"}]

  @spec pool_options() :: [Options.spec()]
  def pool_options, do: @pool

  @spec encode_options() :: [Options.spec()]
  def encode_options, do: @encode

  @spec score_options() :: [Options.spec()]
  def score_options, do: @score

  @spec rerank_options() :: [Options.spec()]
  def rerank_options, do: @rerank

  @spec embed(VLLM.engine(), VLLM.prompt() | [VLLM.prompt()], keyword() | map()) ::
          {:ok, [Embedding.t()]} | {:error, Error.t()}
  def embed(engine, prompts, options) do
    with {:ok, call, params} <- params(options, @pool),
         {:ok, outputs, _table} <- pool(engine, prompts, "embed", call, params) do
      {:ok, Enum.map(outputs, &Embedding.from_wire/1)}
    end
  end

  @spec classify(VLLM.engine(), VLLM.prompt() | [VLLM.prompt()], keyword() | map()) ::
          {:ok, [Classification.t()]} | {:error, Error.t()}
  def classify(engine, prompts, options) do
    with {:ok, call, params} <- params(options, @pool),
         {:ok, outputs, table} <- pool(engine, prompts, "classify", call, params) do
      labels = if outputs != [], do: labels(table)
      {:ok, Enum.map(outputs, &Classification.from_wire(&1, labels))}
    end
  end

  @spec encode(VLLM.engine(), VLLM.prompt() | [VLLM.prompt()], keyword() | map()) ::
          {:ok, [PoolingOutput.t()]} | {:error, Error.t()}
  def encode(engine, prompts, options) do
    with {:ok, call, params} <- params(options, @encode),
         {:ok, outputs, _table} <- pool(engine, prompts, call.pooling_task, call, params) do
      {:ok, Enum.map(outputs, &PoolingOutput.from_wire/1)}
    end
  end

  @spec score(VLLM.engine(), texts, texts, keyword() | map()) ::
          {:ok, [Score.t()]} | {:error, Error.t()}
        when texts: String.t() | [String.t()]
  def score(engine, data_1, data_2, options) do
    with {:ok, call, params} <- params(options, @score),
         do: scores(engine, wrap(data_1), wrap(data_2), call, params)
  end

  @spec rerank(VLLM.engine(), String.t(), [String.t()], keyword() | map()) ::
          {:ok, [Score.t()]} | {:error, Error.t()}
  def rerank(engine, query, documents, options) do
    with {:ok, call, params} <- params(options, @rerank),
         {:ok, scores} <- scores(engine, [query], documents, call, params) do
      scores = Enum.sort_by(scores, & &1.score, :desc)
      {:ok, if(call.top_n, do: Enum.take(scores, call.top_n), else: scores)}
    end
  end

  # The options of a call, and what they make of its params on the wire.
  defp params(options, specs) do
    with {:ok, call, inline} <- Options.split(options, specs),
         {:ok, pooling} <- PoolingParams.new(call.pooling_params || []),
         {:ok, pooling} <- Params.put(pooling, inline, Enum.map(specs, &elem(&1, 0))),
         {:ok, tokenization} <- Options.to_map(call.tokenization_kwargs || []) do
      params = %{
        "pooling_params" => Params.to_wire(pooling),
        "tokenization_kwargs" => tokenization
      }

      {:ok, call,
       params
       |> put("priority", call.priority)
       |> put("chat_template", call[:chat_template])
       |> put("timeout", if(call.timeout != :infinity, do: call.timeout / 1000))}
    end
  end

  defp put(params, _name, nil), do: params
  defp put(params, name, value), do: Map.put(params, name, value)

  defp pool(engine, prompts, task, call, params) do
    call = Call.new(call)
    params = put(params, "task", task)

    with {:ok, prompts} <- Prompt.to_wire(prompts),
         {:ok, table, _pid} <- Table.lookup(engine),
         requests = Enum.map(prompts, &Map.put(params, "prompt", &1)),
         {:ok, outputs} <- Router.map(table, "pool", requests, call) do
      {:ok, outputs, table}
    end
  end

  # All pairs are one request: what two vectors have to do with each other, and
  # which texts go into one prompt, is for vLLM to say.
  defp scores(engine, data_1, data_2, call, params) do
    call = Call.new(call)
    params = Map.merge(params, %{"data_1" => data_1, "data_2" => data_2})

    with :ok <- check_texts(data_1),
         :ok <- check_texts(data_2),
         :ok <- check_pairs(length(data_1), length(data_2)),
         {:ok, table, _pid} <- Table.lookup(engine),
         {:ok, outputs} <- if(data_2 == [], do: {:ok, []}, else: one(table, params, call)) do
      {:ok, outputs |> Enum.with_index() |> Enum.map(fn {o, i} -> Score.from_wire(o, i) end)}
    end
  end

  defp one(table, params, call) do
    with {:error, error} <- Router.call(table, "score", params, call) do
      # The index would be the request's, and there is only one.
      {:error, %{error | details: Map.delete(error.details, "prompt_index")}}
    end
  end

  defp wrap(texts) when is_list(texts), do: texts
  defp wrap(text), do: [text]

  defp check_texts(texts) do
    if is_list(texts) and Enum.all?(texts, &(is_binary(&1) and String.valid?(&1))),
      do: :ok,
      else: invalid("Texts to score are strings; got #{inspect(texts, limit: 5)}.")
  end

  defp check_pairs(one, many) when one == many or one == 1, do: :ok

  defp check_pairs(one, many) do
    invalid(
      "Pairs are of one text with many, or of two lists of a length; got #{one} and #{many}."
    )
  end

  defp invalid(message), do: {:error, Error.new(:invalid_prompt, message)}

  defp labels(table) do
    Table.info(table)["labels"]
  rescue
    # The engine was stopped after it had answered.
    ArgumentError -> nil
  end
end
