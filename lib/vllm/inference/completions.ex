defmodule VLLM.Completions do
  @moduledoc false
  # Completions of prompts: at once, as streams, and of many prompts.

  alias VLLM.Engine.{Call, InFlight, Table}

  alias VLLM.{
    Cluster,
    Delta,
    Error,
    Inference,
    Options,
    Prompt,
    Remote,
    RequestOutput,
    SamplingParams,
    Streaming
  }

  alias VLLM.Streaming.{Forwarder, Pipeline}

  @doc "See `VLLM.generate/3`."
  @spec generate(VLLM.engine(), VLLM.prompt() | [VLLM.prompt()], keyword() | map()) ::
          {:ok, [RequestOutput.t()]} | {:error, Error.t()}
  def generate(engine, prompts, options) do
    with {:ok, call, params} <- prepare(options, Options.generate()),
         {:ok, prompts} <- Prompt.to_wire(prompts),
         {:ok, outputs} <-
           Inference.map(engine, "generate", params, {"prompt", prompts}, call),
         do: {:ok, Enum.map(outputs, &RequestOutput.from_wire/1)}
  end

  @doc "See `VLLM.stream/3`."
  @spec stream(VLLM.engine(), VLLM.prompt(), keyword() | map()) :: Enumerable.t()
  def stream(engine, prompt, options), do: Streaming.deltas(opener(engine, prompt, options))

  @doc "See `VLLM.stream!/3`."
  @spec stream!(VLLM.engine(), VLLM.prompt(), keyword() | map()) :: Enumerable.t()
  def stream!(engine, prompt, options), do: Streaming.deltas!(opener(engine, prompt, options))

  defp opener(engine, prompt, options) do
    engine = Remote.pin(engine)
    fn -> open(engine, prompt, options) end
  end

  @doc "The text of the first completion as it grows, of a stream of deltas."
  @spec texts(Enumerable.t()) :: Enumerable.t()
  def texts(deltas) do
    &Enumerable.reduce(deltas, &1, fn
      %Delta{index: 0, text: text}, acc when text != "" -> &2.(text, acc)
      _other, acc -> {:cont, acc}
    end)
  end

  @doc "See `VLLM.stream_to/4`."
  @spec stream_to(VLLM.engine(), VLLM.prompt(), pid(), keyword() | map()) :: reference()
  def stream_to(engine, prompt, pid, options),
    do: Forwarder.start(pid, fn -> open(engine, prompt, options) end)

  defp open(engine, prompt, options) do
    with {:ok, call, params} <- prepare(options, Options.generate() ++ Options.stream()),
         {:ok, prompt} <- one(prompt),
         do: {:ok, {engine, "generate", Map.put(params, "prompt", prompt), Call.begin(call)}}
  end

  @doc "See `VLLM.generate_stream/3`."
  @spec generate_stream(VLLM.engine(), Enumerable.t(), keyword() | map()) :: Enumerable.t()
  def generate_stream(engine, prompts, options) do
    engine = Remote.pin(engine)
    # Nothing else is looked at before it is enumerated.
    &Enumerable.reduce(answers(engine, prompts, options), &1, &2)
  end

  defp answers(engine, prompts, options) do
    with {:ok, call, params} <- prepare(options, Options.generate()),
         {:ok, answers} <- pipeline(engine, prompts, params, call) do
      answers
    else
      # No prompt can be completed, and each is told so.
      {:error, error} ->
        prompts
        |> Stream.with_index()
        |> Stream.map(fn {_, index} -> {index, {:error, error}} end)
    end
  end

  defp pipeline(engine, prompts, params, call) do
    request = fn prompt ->
      with {:ok, prompt} <- one(prompt), do: {:ok, Map.put(params, "prompt", prompt)}
    end

    job = %{request: request, result: &RequestOutput.from_wire/1, call: call}

    case Remote.find(engine) do
      {:here, id} ->
        with {:ok, table, _pid} <- Table.lookup(id),
             do: {:ok, Pipeline.run(&InFlight.new(table, "generate", &1), prompts, job)}

      {:there, node, id} ->
        {:ok, Remote.Pipeline.run(node, id, "generate", prompts, job)}

      {:cluster, members} ->
        {:ok, Pipeline.run(&Cluster.InFlight.new(members, "generate", &1), prompts, job)}
    end
  end

  defp one(prompt) do
    case Prompt.to_wire(prompt) do
      {:ok, [prompt]} ->
        {:ok, prompt}

      {:ok, prompts} ->
        {:error,
         Error.new(
           :invalid_prompt,
           "A stream takes one prompt; got #{length(prompts)}. See `VLLM.generate_stream/3`."
         )}

      error ->
        error
    end
  end

  @doc "The options of a call that generates, and what they make of its params on the wire."
  @spec prepare(keyword() | map(), [Options.spec()]) ::
          {:ok, Call.t(), map()} | {:error, Error.t()}
  def prepare(options, specs) do
    with {:ok, call, params, known} <-
           Inference.prepare(options, specs, :sampling_params, SamplingParams),
         {:ok, params} <- conform(params, known.schema),
         do: {:ok, call, params}
  end

  defp conform(params, nil), do: {:ok, params}

  defp conform(%{"sampling_params" => %{"structured_outputs" => given}}, _schema)
       when given != nil do
    {:error,
     Error.new(
       :invalid_option,
       "`schema:` and `structured_outputs:` both say what to conform to; give one of them.",
       %{"option" => "schema"}
     )}
  end

  defp conform(params, schema) do
    params = put_in(params["sampling_params"]["structured_outputs"], %{"json" => schema})
    {:ok, Map.put(params, "parse", true)}
  end
end
