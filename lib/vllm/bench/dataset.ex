defmodule VLLM.Bench.Dataset do
  @moduledoc false
  # What an engine is asked: random tokens, or the user's own prompts.

  alias VLLM.Bench.Statistics
  alias VLLM.{Error, Params, Tools}

  @enforce_keys [:input, :input_len, :options]
  defstruct [:input, :input_len, :options]

  @typedoc "One request: what is asked, how many tokens that has, and options of the call."
  @type t :: %__MODULE__{
          input: {:prompt, VLLM.prompt()} | {:conversation, [map()]},
          input_len: pos_integer(),
          options: keyword()
        }

  # How many requests there are where nobody says it, and how many of a file at most.
  @default 100
  @longest 1_000_000

  # What random prompts are made of: whatever tokens these texts have are no special ones.
  @texts for first <- ?a..?z, do: Enum.map_join(?a..?z, " ", &<<first, &1>>)

  # A request in a day.
  @slowest 1 / 86_400

  @doc """
  The user's own prompts, read where they are in a file, by the Python that `where` says; nil where
  there are none. What else is asked of requests is checked, too, before an engine is started for them.
  """
  @spec prompts(map(), %{atom() => term()}) :: {:ok, [term(), ...] | nil} | {:error, Error.t()}
  def prompts(%{prompts: nil, random_range_ratio: ratio}, _where) when ratio >= 1,
    do: invalid("random_range_ratio", "`random_range_ratio` is below 1.")

  def prompts(%{request_rate: rate}, _where) when is_number(rate) and rate < @slowest,
    do: invalid("request_rate", "`request_rate` is a request in a day at least.")

  def prompts(%{prompts: nil}, _where), do: {:ok, nil}

  def prompts(%{prompts: path} = known, where) when is_binary(path) do
    params = %{"path" => Path.expand(path), "limit" => known.num_prompts || @longest}

    with {:ok, records} <- Tools.general("prompts", params, where),
         do: {:ok, Enum.map(records, &record/1)}
  end

  def prompts(%{prompts: [_ | _] = prompts}, _where), do: {:ok, prompts}

  def prompts(_other, _where),
    do: invalid("prompts", "`prompts` are a list of some, or a path.")

  defp record(%{"messages" => messages, "tools" => tools}), do: {messages, tools || []}
  defp record(%{"prompt" => prompt}), do: prompt

  @doc "The requests of a round, of an engine whose tokenizer is asked what they have."
  @spec requests(VLLM.engine(), [term(), ...] | nil, map()) ::
          {:ok, [t(), ...]} | {:error, Error.t()}
  def requests(engine, nil, known) do
    count = known.num_prompts || @default
    ratio = known.random_range_ratio

    with {:ok, tokens} <- VLLM.tokenize(engine, @texts, add_special_tokens: false) do
      tokens = tokens |> Enum.concat() |> Enum.uniq() |> List.to_tuple()
      random = Statistics.random(known.seed)

      {requests, _random} =
        Enum.map_reduce(1..count, random, fn _, random ->
          {input_len, random} = around(known.random_input_len, ratio, random)
          {output_len, random} = around(known.random_output_len, ratio, random)

          {ids, random} =
            Enum.map_reduce(1..input_len, random, fn _, random ->
              {place, random} = :rand.uniform_s(tuple_size(tokens), random)
              {elem(tokens, place - 1), random}
            end)

          {%__MODULE__{
             input: {:prompt, %{prompt_token_ids: ids}},
             input_len: input_len,
             options: options(known, output_len, true)
           }, random}
        end)

      {:ok, requests}
    end
  end

  def requests(engine, prompts, known) do
    asked = options(known, known.output_len, false)

    count = known.num_prompts || length(prompts)

    with {:ok, requests} <- Params.map(prompts, &request(engine, &1, asked)),
         do: {:ok, requests |> Stream.cycle() |> Enum.take(count)}
  end

  defp request(engine, text, options) when is_binary(text) do
    with {:ok, tokens} <- VLLM.tokenize(engine, text),
         do: {:ok, new({:prompt, text}, tokens, options)}
  end

  defp request(_engine, %{prompt_token_ids: [_ | _] = ids} = prompt, options),
    do: {:ok, new({:prompt, prompt}, ids, options)}

  defp request(engine, {messages, tools}, options) do
    tools = if tools == [], do: [], else: [tools: tools]

    with {:ok, %{prompt_token_ids: ids}} <- VLLM.apply_chat_template(engine, messages, tools),
         do: {:ok, new({:conversation, messages}, ids, tools ++ options)}
  end

  defp request(engine, [message | _] = messages, options)
       when is_map(message) or is_list(message),
       do: request(engine, {messages, []}, options)

  defp request(_engine, _other, _options) do
    message = "Each of `prompts` is a string, `%{prompt_token_ids: ids}` or a conversation."
    invalid("prompts", message)
  end

  defp new(input, tokens, options),
    do: %__MODULE__{input: input, input_len: length(tokens), options: options}

  defp options(known, output_len, ignore_eos) do
    [
      max_tokens: output_len,
      ignore_eos: if(is_nil(known.ignore_eos), do: ignore_eos, else: known.ignore_eos),
      temperature: known.temperature,
      timeout: known.timeout
    ]
  end

  # As many as in `len`, or in a range around it.
  defp around(len, ratio, random) do
    low = max(floor(len * (1 - ratio)), 1)
    {more, random} = :rand.uniform_s(max(ceil(len * (1 + ratio)), low) - low + 1, random)
    {low + more - 1, random}
  end

  defp invalid(option, message),
    do: {:error, Error.new(:invalid_option, message, %{"option" => option})}

  @doc "When each of the requests comes, in seconds; nil where all come at once."
  @spec arrivals(pos_integer(), map()) :: [float()] | nil
  def arrivals(_count, %{request_rate: nil}), do: nil

  def arrivals(count, known),
    do: Statistics.arrivals(count, known.request_rate, known.burstiness, known.seed)
end
