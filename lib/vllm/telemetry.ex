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
  names of the wire protocol), `stream?`. `finish_reason` is that of the first completion, or nil.

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
  alias VLLM.Error

  @typedoc false
  @type about :: %{engine: term(), model: String.t(), payloads: boolean()}

  @typedoc false
  @type span :: %{started_at: integer(), metadata: map()}

  # Looking for a missing module is slow, so it is done once.
  @doc false
  @spec load() :: :ok
  def load do
    _ = Code.ensure_loaded(:telemetry)
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
        stream?: is_map_key(params, "credit")
      }

      metadata = if payloads, do: Map.put(metadata, :params, params), else: metadata
      execute([:vllm, :request, :start], %{system_time: System.system_time()}, metadata)
      %{started_at: started_at, metadata: metadata}
    end
  rescue
    # The table went with its engine.
    ArgumentError -> nil
  end

  @doc false
  @spec first_token(span() | nil) :: :ok
  def first_token(nil), do: :ok

  def first_token(span) do
    execute([:vllm, :stream, :first_token], duration(span.started_at), span.metadata)
  end

  @doc false
  @spec request_end(span() | nil, {:ok, term()} | {:error, Error.t()}) :: :ok
  def request_end(nil, _result), do: :ok

  def request_end(%{metadata: metadata} = span, {:ok, result}) do
    measurements = Map.merge(measurements(result), duration(span.started_at))
    stop = Map.put(metadata, :finish_reason, finish_reason(result))
    stop = if is_map_key(metadata, :params), do: Map.put(stop, :result, result), else: stop
    execute([:vllm, :request, :stop], measurements, stop)
  end

  def request_end(%{metadata: metadata} = span, {:error, error}) do
    metadata = Map.put(metadata, :error, error)
    execute([:vllm, :request, :exception], duration(span.started_at), metadata)
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

  # If telemetry is loaded but not started, it logs a warning at each event.
  defp running? do
    function_exported?(:telemetry, :execute, 3) and
      Process.whereis(:telemetry_handler_table) != nil
  end
end
