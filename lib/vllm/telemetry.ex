defmodule VLLM.Telemetry do
  @moduledoc """
  The events that this library emits, through `:telemetry` where that application runs.

  Times are in native units (`System.convert_time_unit/3`).

  ## Loading

  | event | measurements | metadata |
  | --- | --- | --- |
  | `[:vllm, :load, :start]` | `system_time` | as below |
  | `[:vllm, :load, :progress]` | `duration` since the start | and `phase`; `done` and `total` where there are parts; the fields of `VLLM.Hub.Progress` while files are downloaded |
  | `[:vllm, :load, :stop]` | `duration` | as below |
  | `[:vllm, :load, :exception]` | `duration` | and `error`, a `VLLM.Error` |

  Metadata of all: `engine` (its name, or nil), `model`, `worker` (1 to `replicas`). A `phase` is one of `:python`, `:hub`, `:download`, `:import`,
  `:config`, `:quantizing`, `:engine`, `:weights`, `:warmup` and `:ready`.

  ## Downloads

  Those of `VLLM.Hub.pull/2`; what an engine downloads is part of its loading.

  | event | measurements | metadata |
  | --- | --- | --- |
  | `[:vllm, :pull, :start]` | `system_time` | `model`, as it was named |
  | `[:vllm, :pull, :progress]` | `duration` since the start, and the fields of `VLLM.Hub.Progress` | `model` |
  | `[:vllm, :pull, :stop]` | `duration` | `model`, `path` |
  | `[:vllm, :pull, :exception]` | `duration` | `model`, `error`, a `VLLM.Error` |

  ## Uploads

  Those of `VLLM.Models.push/3`.

  | event | measurements | metadata |
  | --- | --- | --- |
  | `[:vllm, :push, :start]` | `system_time` | as below |
  | `[:vllm, :push, :progress]` | `duration` since the start, and the fields of `VLLM.Hub.Progress`: what was sent | as below |
  | `[:vllm, :push, :stop]` | `duration` | and `url` of the repository |
  | `[:vllm, :push, :exception]` | `duration` | and `error`, a `VLLM.Error` |

  Metadata of all: `model`, as it was named, and `repository`.

  ## Jobs

  Those of `VLLM.Job`.

  | event | measurements | metadata |
  | --- | --- | --- |
  | `[:vllm, :job, :start]` | `system_time` | as below |
  | `[:vllm, :job, :progress]` | `duration` since the start, and of `VLLM.Job.Progress` the numbers that there are | and `state`, `output`, `phase` |
  | `[:vllm, :job, :stop]` | `duration` | as below |
  | `[:vllm, :job, :exception]` | `duration` | and `state` (`:failed`, `:cancelled` or `:interrupted`), `error`, a `VLLM.Error` |

  Metadata of all: `id`, `kind` (`:quantize` or `:finetune`), `name`, `source`. The start is when the job begins to run; a retry starts it once more.

  ## Requests

  A request is one prompt, conversation or set of texts that was sent to a worker: a call with three prompts makes three.

  | event | measurements | metadata |
  | --- | --- | --- |
  | `[:vllm, :request, :start]` | `system_time` | as below |
  | `[:vllm, :request, :stop]` | `duration`, and of the table below what there is | and `finish_reason`; `result` with payloads |
  | `[:vllm, :request, :exception]` | `duration` | and `error`, a `VLLM.Error` |
  | `[:vllm, :stream, :first_token]` | `duration` since the start, in the reader's eyes | as below |

  Metadata of all: `engine` and `model` as above, `method` (`"generate"`, `"chat"`, `"pool"`, `"score"`, `"tokenize"`, …: the
  names of the wire protocol), `stream?` (nil of an `"http_request"`: whether it streams its client asks vLLM, and a first token
  tells), `telemetry_span_context`, a reference that the events of one request share, and `gen_ai`. `finish_reason` is that
  of the first completion, or nil. An `"http_request"` that vLLM's API refuses has a stop, too: it was answered.

  `gen_ai` has what the event knows by the names of OpenTelemetry's
  [semantic conventions for generative AI](https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/), a map that can be the
  attributes of a span as it is: `:"gen_ai.operation.name"` (`"chat"`, `"text_completion"`, `"embeddings"`; else the task or the
  method), `:"gen_ai.provider.name"` (`"vllm"`), `:"gen_ai.request.model"`, `…request.stream` where it is one, of the sampling
  parameters those that were given (`…request.max_tokens`, `temperature`, `top_p`, `top_k`, `frequency_penalty`,
  `presence_penalty`, `seed`, `choice.count`); on first token `:"gen_ai.response.time_to_first_chunk"` (seconds); on stop
  `:"gen_ai.usage.input_tokens"`, `…usage.output_tokens`, `…usage.cache_read.input_tokens`, `:"gen_ai.response.id"`,
  `…response.finish_reasons`; on exception `:"error.type"`, the error's reason. Where nobody listens to an event, none of this
  is made. [guides/observability.md](guides/observability.md#opentelemetry) makes spans of it.

  | measurement of a stop | meaning |
  | --- | --- |
  | `prompt_tokens`, `completion_tokens` | how many tokens were read and, in all completions together, written |
  | `queue_time` | how long vLLM let the request wait before it began to compute it |
  | `time_to_first_token` | from its arrival in the worker |
  | `inter_token_latency` | the mean time between two tokens, where there are two |

  The times come from vLLM and are absent where it keeps no figures (`disable_log_stats: true`). A caller that leaves a
  stream, or whose other prompt fails, makes an exception with the reason `:aborted`. One that dies makes none.

  Prompts and what comes of them are in no event, unless the engine was started with `telemetry_payloads: true`. Then the
  metadata also has `params`, and on stop `result`: the request and its result as maps with string keys, as they travel.
  """

  alias VLLM.Engine.Table
  alias VLLM.{Error, Secrets}
  alias VLLM.Telemetry.GenAI

  @typedoc false
  @type about :: %{engine: term(), model: String.t(), payloads: boolean()}

  @typedoc false
  @type span :: %{started_at: integer(), metadata: map(), params: map()}

  @doc """
  Metrics of these events as definitions of the package
  [`telemetry_metrics`](https://hexdocs.pm/telemetry_metrics), for any of its reporters: LiveDashboard,
  `telemetry_metrics_prometheus`, StatsD, …

      def metrics, do: VLLM.Telemetry.metrics() ++ my_own_metrics()

  Durations of requests, times to the first token, between tokens and in the queue, and tokens, by
  `engine` and `method`; errors by `reason`; loads and jobs with their failures. Times are in
  milliseconds, and distributions have buckets for them. What vLLM itself counts is not among them:
  that is in `VLLM.Metrics.text/1`.

  Raises a `VLLM.Error` (`:unsupported`) where the package is not there.
  """
  @spec metrics() :: [struct()]
  def metrics do
    unless Code.ensure_loaded?(Telemetry.Metrics) do
      raise Error.new(
              :unsupported,
              "The package `telemetry_metrics` is not loaded. Add `{:telemetry_metrics, \"~> 1.0\"}` " <>
                "to the dependencies of your application.",
              %{"package" => "telemetry_metrics"}
            )
    end

    # With apply, because the package may be missing when this is compiled.
    for {kind, name, options} <- definitions(),
        do: apply(Telemetry.Metrics, kind, [name, options])
  end

  @seconds [5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000, 300_000]
  @tokens [1, 2, 5, 10, 15, 20, 30, 50, 75, 100, 150, 250, 500, 1_000]

  defp definitions do
    of_requests = [tags: [:engine, :method], tag_values: &named/1]
    of_engines = [tags: [:engine], tag_values: &named/1]
    failed = [tags: [:engine, :method, :reason], tag_values: &reasoned/1]

    [
      time(
        "vllm.request.stop.duration",
        @seconds,
        "Times of requests, from the call to the answer",
        of_requests
      ),
      time(
        "vllm.request.stop.time_to_first_token",
        @seconds,
        "Times to the first token, in vLLM",
        of_requests
      ),
      time(
        "vllm.request.stop.inter_token_latency",
        @tokens,
        "Mean times between two tokens",
        of_requests
      ),
      time("vllm.request.stop.queue_time", @seconds, "Times in vLLM's queue", of_requests),
      {:sum, "vllm.request.stop.prompt_tokens",
       [description: "Tokens of prompts"] ++ of_requests},
      {:sum, "vllm.request.stop.completion_tokens",
       [description: "Tokens of completions"] ++ of_requests},
      {:counter, "vllm.request.exception.count",
       [description: "Requests that ended with an error"] ++ failed},
      time(
        "vllm.stream.first_token.duration",
        @seconds,
        "Times to a stream's first token, for its reader",
        of_requests
      ),
      {:last_value, "vllm.load.stop.duration",
       [unit: {:native, :millisecond}, description: "Time of the last load"] ++ of_engines},
      {:counter, "vllm.load.exception.count",
       [description: "Loads that failed", tags: [:engine, :reason], tag_values: &reasoned/1]},
      {:counter, "vllm.job.stop.count", [description: "Jobs that are done", tags: [:kind]]},
      {:counter, "vllm.job.exception.count",
       [description: "Jobs that are not", tags: [:kind, :state]]}
    ]
  end

  defp time(name, buckets, description, options) do
    options =
      [
        unit: {:native, :millisecond},
        description: description,
        reporter_options: [buckets: buckets]
      ] ++ options

    {:distribution, name, options}
  end

  # The name of an engine may be any term.
  defp named(%{engine: nil, model: model} = metadata),
    do: %{metadata | engine: Path.basename(model)}

  defp named(%{engine: engine} = metadata), do: %{metadata | engine: Secrets.inspect(engine)}

  defp reasoned(%{error: error} = metadata),
    do: metadata |> named() |> Map.put(:reason, error.reason)

  # Looking for a missing module is slow, so it is done once.
  @doc false
  @spec load() :: :ok
  def load do
    for module <- [:telemetry, :telemetry_handler_table], do: Code.ensure_loaded(module)
    :ok
  end

  @doc false
  def load_start(metadata) do
    execute([:vllm, :load, :start], %{system_time: System.system_time()}, metadata)
  end

  @doc false
  def load_progress(started_at, metadata) do
    execute([:vllm, :load, :progress], duration(started_at), metadata)
  end

  @doc false
  def load_stop(started_at, metadata) do
    execute([:vllm, :load, :stop], duration(started_at), metadata)
  end

  @doc false
  def load_exception(started_at, metadata, error) do
    execute([:vllm, :load, :exception], duration(started_at), Map.put(metadata, :error, error))
  end

  @doc false
  def transfer_start(kind, metadata) do
    execute([:vllm, kind, :start], %{system_time: System.system_time()}, metadata)
  end

  @doc false
  def transfer_progress(kind, started_at, metadata, figures) do
    execute([:vllm, kind, :progress], Map.merge(figures, duration(started_at)), metadata)
  end

  @doc false
  def transfer_end(kind, started_at, metadata, {:ok, made}) do
    execute([:vllm, kind, :stop], duration(started_at), Map.merge(metadata, made))
  end

  def transfer_end(kind, started_at, metadata, {:error, error}) do
    execute([:vllm, kind, :exception], duration(started_at), Map.put(metadata, :error, error))
  end

  @doc false
  def job_start(metadata) do
    execute([:vllm, :job, :start], %{system_time: System.system_time()}, metadata)
  end

  @doc false
  def job_progress(started_at, metadata, progress) do
    numbers = Map.take(progress, [:done, :total, :bytes, :total_bytes, :seconds_left])
    figures = Map.reject(numbers, fn {_name, number} -> is_nil(number) end)
    metadata = Map.merge(metadata, Map.take(progress, [:state, :output, :phase]))
    execute([:vllm, :job, :progress], Map.merge(figures, duration(started_at)), metadata)
  end

  @doc false
  def job_end(started_at, metadata, :done, nil) do
    execute([:vllm, :job, :stop], duration(started_at), metadata)
  end

  def job_end(started_at, metadata, state, error) do
    metadata = Map.merge(metadata, %{state: state, error: error})
    execute([:vllm, :job, :exception], duration(started_at), metadata)
  end

  # Without telemetry there is no span, and a request emits no events.
  @doc false
  @spec request_start(Table.t(), String.t(), map(), integer()) :: span() | nil
  def request_start(table, method, params, started_at) do
    if running?() do
      %{payloads: payloads} = about = Table.about(table)

      metadata = %{
        engine: about.engine,
        model: about.model,
        method: method,
        stream?: stream?(method, params),
        telemetry_span_context: make_ref()
      }

      metadata = if payloads, do: Map.put(metadata, :params, params), else: metadata
      span = %{started_at: started_at, metadata: metadata, params: params}

      tell([:vllm, :request, :start], fn ->
        {%{system_time: System.system_time()}, with_gen_ai(span, %{})}
      end)

      span
    end
  rescue
    # The table went with its engine.
    ArgumentError -> nil
  end

  # What a client over HTTP asked for, only vLLM's app has read.
  defp stream?("http_request", _params), do: nil
  defp stream?(_method, params), do: is_map_key(params, "credit")

  @doc false
  @spec first_token(span() | nil) :: :ok
  def first_token(nil), do: :ok

  def first_token(span) do
    tell([:vllm, :stream, :first_token], fn ->
      %{duration: duration} = measurements = duration(span.started_at)
      {measurements, with_gen_ai(span, GenAI.first_token(duration))}
    end)
  end

  @doc false
  @spec request_end(span() | nil, {:ok, term()} | {:error, Error.t()}) :: :ok
  def request_end(nil, _result), do: :ok

  def request_end(span, {:ok, result}) do
    tell([:vllm, :request, :stop], fn ->
      figures = measurements(result)

      metadata =
        span
        |> with_gen_ai(GenAI.response(result, figures))
        |> Map.put(:finish_reason, finish_reason(result))

      payloads? = is_map_key(metadata, :params)

      {Map.merge(figures, duration(span.started_at)),
       if(payloads?, do: Map.put(metadata, :result, result), else: metadata)}
    end)
  end

  def request_end(span, {:error, error}) do
    tell([:vllm, :request, :exception], fn ->
      metadata = span |> with_gen_ai(GenAI.error(error)) |> Map.put(:error, error)
      {duration(span.started_at), metadata}
    end)
  end

  defp with_gen_ai(%{metadata: metadata, params: params}, more) do
    request = GenAI.request(metadata, params)
    Map.put(metadata, :gen_ai, Map.merge(request, more))
  end

  # A score's result is a list.
  defp measurements([%{"prompt_token_ids" => _} | _] = outputs),
    do: %{prompt_tokens: outputs |> Enum.map(&tokens/1) |> Enum.sum()}

  defp measurements(%{"outputs" => completions} = output) do
    output["metrics"]
    |> times()
    |> Map.put(:prompt_tokens, tokens(output, "prompt_token_ids"))
    |> Map.put(
      :completion_tokens,
      completions |> Enum.map(&tokens(&1, "token_ids")) |> Enum.sum()
    )
  end

  defp measurements(%{"prompt_token_ids" => _} = output), do: %{prompt_tokens: tokens(output)}
  defp measurements(_result), do: %{}

  defp tokens(output, name \\ "prompt_token_ids"), do: div(byte_size(output[name]), 4)

  # vLLM counts in seconds; what has not happened is 0.
  defp times(%{
         "queued_ts" => queued,
         "scheduled_ts" => scheduled,
         "first_token_ts" => first,
         "last_token_ts" => last,
         "first_token_latency" => latency,
         "num_generation_tokens" => tokens
       })
       when queued > 0 and scheduled > 0 and first > 0 do
    times = %{queue_time: native(scheduled - queued), time_to_first_token: native(latency)}

    if tokens > 1,
      do: Map.put(times, :inter_token_latency, native((last - first) / (tokens - 1))),
      else: times
  end

  defp times(_none), do: %{}

  defp native(seconds),
    do: System.convert_time_unit(round(seconds * 1_000_000_000), :nanosecond, :native)

  defp finish_reason(%{"outputs" => [%{"finish_reason" => reason} | _]}), do: reason
  defp finish_reason(_result), do: nil

  defp duration(started_at), do: %{duration: System.monotonic_time() - started_at}

  defp execute(event, measurements, metadata) do
    # With apply, because the package may be missing when this is compiled.
    if running?(), do: apply(:telemetry, :execute, [event, measurements, metadata])
    :ok
  end

  # Of what happens often: nothing is made that nobody listens to.
  defp tell(event, made) do
    if running?() and listened?(event) do
      {measurements, metadata} = made.()
      apply(:telemetry, :execute, [event, measurements, metadata])
    end

    :ok
  end

  # What telemetry itself asks before it calls anybody. The module is not part of its API: where it
  # has changed, every event is told.
  defp listened?(event) do
    if function_exported?(:telemetry_handler_table, :list_for_event, 1),
      do: apply(:telemetry_handler_table, :list_for_event, [event]) != [],
      else: true
  end

  # If telemetry is loaded but not started, it logs a warning at each event.
  defp running? do
    function_exported?(:telemetry, :execute, 3) and
      Process.whereis(:telemetry_handler_table) != nil
  end
end
