defmodule VLLM.Engine.Report do
  @moduledoc false
  # What a worker tells of itself, in Logger, as telemetry and to those who wait
  # for the engine.

  require Logger

  alias VLLM.Bridge.Log
  alias VLLM.Engine.{Config, Progress, Run, Table}
  alias VLLM.{Error, Telemetry}

  @typedoc "The data of a worker."
  @type worker :: %{
          :table => Table.t(),
          :slot => Table.slot(),
          :config => Config.t(),
          :run => Run.t() | nil,
          :started_at => integer() | nil,
          :progress => Progress.t() | nil,
          optional(atom()) => term()
        }

  @spec log(worker(), Logger.level(), (() -> String.t())) :: :ok
  def log(worker, level, text) do
    meta = [
      vllm_engine: worker.config.name || worker.config.model,
      vllm_worker: Table.index(worker.slot)
    ]

    Logger.log(level, fn -> "#{name(worker)}: #{text.()}" end, meta)
  end

  @spec load_start(worker()) :: :ok
  def load_start(worker), do: Telemetry.load_start(metadata(worker))

  @spec load_stop(worker()) :: :ok
  def load_stop(worker) do
    Table.put_load_time(worker.table, worker.slot, System.monotonic_time() - worker.started_at)
    count(worker, :loads, :ok)
    Telemetry.load_stop(worker.started_at, metadata(worker))
  end

  @spec failed(worker(), Error.t()) :: :ok
  def failed(worker, error) do
    Telemetry.load_exception(worker.started_at, metadata(worker), error)
    log(worker, :error, fn -> error.message end)
  end

  @spec progress(worker(), Progress.t()) :: worker()
  def progress(worker, progress) do
    Table.put_progress(worker.table, worker.slot, progress)
    Telemetry.load_progress(worker.started_at, Map.merge(metadata(worker), progress))
    level = if Progress.notable?(progress, worker.progress), do: :info, else: :debug
    log(worker, level, fn -> Progress.describe(progress) end)
    %{worker | progress: progress}
  end

  @doc "Says that the start waits for a node."
  @spec away(worker(), node()) :: :ok
  def away(worker, node),
    do: log(worker, :warning, fn -> "waits for the node #{node}, which cannot be reached" end)

  @doc "Counts a load that has ended with an error."
  @spec not_loaded(worker(), Error.t()) :: :ok
  def not_loaded(worker, error), do: count(worker, :loads, error.reason)

  @doc "Counts a death of the program, and notes it."
  @spec died(worker(), Error.t()) :: :ok
  def died(worker, error) do
    death = %{time: DateTime.utc_now(), replica: Table.index(worker.slot), error: error}
    Table.put_death(worker.table, death)
    hung? = is_map_key(error.details, "hung")
    count(worker, :deaths, if(hung?, do: :hung, else: error.reason))
  end

  @doc "Counts that the program is started again after its death."
  @spec restarts(worker()) :: :ok
  def restarts(worker),
    do: Table.count(worker.table, :restarts, {Table.index(worker.slot)})

  defp count(worker, name, outcome),
    do: Table.count(worker.table, name, {Table.index(worker.slot), outcome})

  @doc "Passes on what the program has logged since the last time."
  @spec follow_log(worker()) :: worker()
  def follow_log(%{run: nil} = worker), do: worker

  def follow_log(worker) do
    {lines, run} = Run.read_log(worker.run)

    for line <- lines, reduce: %{worker | run: run} do
      worker ->
        progress = Progress.of_line(line)
        worker = if progress, do: progress(worker, progress), else: worker
        log(worker, Log.level(line), fn -> line end)
        worker
    end
  end

  @spec name(worker()) :: String.t()
  def name(worker), do: Config.display_name(worker.config)

  defp metadata(%{config: config} = worker),
    do: %{engine: config.name, model: config.model, worker: Table.index(worker.slot)}
end
