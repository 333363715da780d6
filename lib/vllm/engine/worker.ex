defmodule VLLM.Engine.Worker do
  @moduledoc false
  # One worker of an engine: a state machine around one run of the worker
  # program at a time.
  #
  #     starting ──▶ ready ──▶ dead ──▶ starting …      (after a pause)
  #        └────────────────────┴─────▶ failed          (refused, or too often)
  #
  # It owns the port, routes answers to the callers that wait for them, has the
  # requests of dead callers aborted, follows the worker's log and restarts the
  # program. Requests do not pass through it (see VLLM.Bridge.Connection), so it
  # never does anything slow. In state dead and failed there is no program: a new run begins
  # only after the guard of the old one has said that all of it is gone.

  @behaviour :gen_statem

  require Logger

  alias VLLM.Bridge.{Connection, Log, Program}
  alias VLLM.Engine.{Progress, Table}
  alias VLLM.{Error, Options, Telemetry}

  # How often the log is looked at, in ms: often while people watch it load.
  @log_interval %{starting: 100, ready: 500}

  # The pause before a restart doubles from the first to the last, in ms.
  @first_pause 200
  @last_pause 30_000

  defstruct [
    :config,
    :table,
    :index,
    :program,
    :conn,
    :log,
    :started_at,
    # The request that the worker itself has under way while starting.
    :request,
    :info,
    :error,
    deaths: []
  ]

  def child_spec({config, table, index}) do
    %{
      id: {__MODULE__, index},
      start: {__MODULE__, :start_link, [config, table, index]},
      # To end a worker takes as long as its processes take to be gone.
      shutdown: 15_000
    }
  end

  def start_link(config, table, index) do
    :gen_statem.start_link(__MODULE__, {config, table, index}, [])
  end

  @impl true
  def callback_mode, do: [:handle_event_function, :state_enter]

  @impl true
  def init({config, table, index}) do
    Process.flag(:trap_exit, true)
    {:ok, :starting, %__MODULE__{config: config, table: table, index: index}}
  end

  ## Entering a state

  @impl true
  def handle_event(:enter, _old, :starting, data) do
    Table.put_status(data.table, data.index, :starting)
    data = %{data | started_at: System.monotonic_time(), info: nil}
    Telemetry.load_start(metadata(data))
    {:keep_state, data, [{:state_timeout, 0, :start}]}
  end

  def handle_event(:enter, _old, :ready, data) do
    Table.put_worker(
      data.table,
      data.index,
      Map.merge(limits(data), %{conn: data.conn, index: data.index})
    )

    Table.put_info(data.table, data.info)
    progress(data, %{phase: :ready})
    Table.put_status(data.table, data.index, :ready)
    Telemetry.load_stop(data.started_at, metadata(data))
    :keep_state_and_data
  end

  def handle_event(:enter, _old, :dead, data) do
    Table.put_status(data.table, data.index, :starting)
    pause = pause(length(data.deaths))
    Logger.warning("#{name(data)}: #{data.error.message} Restart in #{pause} ms.", meta(data))
    {:keep_state_and_data, [{:state_timeout, pause, :restart}]}
  end

  def handle_event(:enter, _old, :failed, data) do
    Table.put_status(data.table, data.index, {:failed, data.error})
    Telemetry.load_exception(data.started_at, metadata(data), data.error)
    Logger.error("#{name(data)}: #{data.error.message}", meta(data))
    :keep_state_and_data
  end

  ## Starting: the program, the handshake, the load

  def handle_event(:state_timeout, :start, :starting, data) do
    progress(data, %{phase: :python})

    case start_program(data) do
      {:ok, program} ->
        conn = Connection.new(program.port, option(data, :max_frame))
        data = %{data | program: program, conn: conn, log: Log.new(program.run_dir)}
        data = ask(data, :hello, "hello", %{"protocol" => 1, "max_frame" => conn.max_frame})

        {:keep_state, data,
         [
           {:state_timeout, option(data, :load_timeout), :load_timeout},
           {{:timeout, :log}, @log_interval.starting, :read}
         ]}

      {:error, error} ->
        {:next_state, :failed, %{data | error: error}}
    end
  end

  def handle_event(
        :info,
        {ref, answer},
        :starting,
        %{request: {step, %{ref: ref} = request}} = data
      ) do
    case {step, Connection.answer(request, answer)} do
      {:hello, {:ok, _hello}} ->
        options = Map.merge(data.config.engine_options, data.config.secrets.().engine_options)

        {:keep_state,
         ask(data, :load, "load", %{"model" => data.config.model, "options" => options})}

      {:load, {:ok, info}} ->
        {:next_state, :ready, %{data | info: info, request: nil, error: nil}}

      {_step, {:error, %Error{reason: :engine_dead} = error}} ->
        # vLLM's processes died while they loaded; the worker itself may go on.
        died(stop_program(data, error), error)

      {_step, {:error, error}} ->
        # The worker is well and says no; to ask again would change nothing.
        {:next_state, :failed, stop_program(%{data | request: nil}, Options.or_ours(error))}
    end
  end

  def handle_event(:state_timeout, :load_timeout, :starting, data) do
    data = read_log(data)

    error =
      Error.new(
        :load_timeout,
        "#{name(data)} was not ready within #{option(data, :load_timeout)} ms. If the model is " <>
          "still being downloaded or read, give it longer with `load_timeout:`.",
        %{"log" => Log.recent(data.log)}
      )

    {:next_state, :failed, stop_program(data, error)}
  end

  def handle_event(:state_timeout, :restart, :dead, data), do: {:next_state, :starting, data}

  ## What the program says

  def handle_event(:info, {port, {:data, frame}}, _state, %{program: %{port: port}} = data) do
    with true <- byte_size(frame) <= data.conn.max_frame || {:malformed, "too long"},
         :ok <- receive_message(Connection.parse(frame), data) do
      :keep_state_and_data
    else
      {:malformed, reason} -> malformed(data, reason)
    end
  end

  def handle_event(:info, {:malformed, port, reason}, _state, %{program: %{port: port}} = data) do
    malformed(data, reason)
  end

  def handle_event(
        :info,
        {port, {:exit_status, status}},
        _state,
        %{program: %{port: port}} = data
      ) do
    # The guard has spoken: every process of this run is gone.
    data = read_log(data)

    case VLLM.Bridge.ended(status, Log.recent(data.log)) do
      %Error{reason: :engine_dead} = error -> died(data, error)
      # To try again would change nothing.
      error -> {:next_state, :failed, %{close(data, error) | error: error, request: nil}}
    end
  end

  ## What callers do

  def handle_event(:info, {:watch, port, id, _ref, pid}, _state, %{program: %{port: port}} = data) do
    Connection.watch(data.conn, id, pid)
    :keep_state_and_data
  end

  # The caller wrote to a run that is over.
  def handle_event(:info, {:watch, _port, _id, ref, _pid}, _state, data) do
    error =
      data.error || Error.new(:engine_dead, "The worker ended before the request reached it.")

    send(ref, {ref, {:error, error}})
    :keep_state_and_data
  end

  def handle_event(:info, {{:caller_down, id}, _monitor, :process, _pid, _reason}, _state, data) do
    if data.conn, do: Connection.notify(data.conn, "cancel", %{"id" => id})
    :keep_state_and_data
  end

  ## The rest

  def handle_event({:timeout, :log}, :read, state, data) when state in [:starting, :ready] do
    {:keep_state, read_log(data), [{{:timeout, :log}, @log_interval[state], :read}]}
  end

  def handle_event({:timeout, :log}, :read, _state, _data), do: :keep_state_and_data

  # Leftovers of a run that is over: its port, its writer, its answers.
  def handle_event(:info, _message, _state, _data), do: :keep_state_and_data

  @impl true
  def terminate(_reason, _state, data) do
    _ = stop_program(data, Connection.stopped())
    Table.delete_worker(data.table, data.index)
    :ok
  end

  @impl true
  def format_status(_opt, [_dictionary, state, data]) do
    {state, %{data | conn: nil, request: nil, log: nil}}
  end

  ## Inside

  defp start_program(%{config: %{start_program: nil} = config} = data) do
    env = config.secrets.().env
    Program.start(["-m", "vllm_bridge"], python: option(data, :python), env: env)
  end

  defp start_program(data), do: data.config.start_program.(data.table)

  defp ask(data, step, method, params) do
    {:ok, request} = Connection.request(data.conn, method, params)
    %{data | request: {step, request}}
  end

  defp receive_message({:response, id, body}, data) do
    # Nobody waits for the answer to a request that was cancelled.
    _ = Connection.deliver(data.conn, id, {:response, body})
    :ok
  end

  defp receive_message({:notification, "load_progress", %{"phase" => phase}}, data) do
    case Progress.phase(phase) do
      nil -> :ok
      phase -> progress(data, %{phase: phase})
    end
  end

  defp receive_message({:notification, "deltas", %{"deltas" => rows}}, data) when is_list(rows) do
    Enum.each(rows, fn [id | row] -> Connection.deliver_delta(data.conn, id, row) end)
  end

  # A newer worker may tell more.
  defp receive_message({:notification, _method, _params}, _data), do: :ok
  defp receive_message({:malformed, reason}, _data), do: {:malformed, reason}

  defp malformed(data, reason) do
    error = Error.new(:protocol, "The worker broke the protocol (#{reason}).")
    died(stop_program(data, error), error)
  end

  # The program is gone; what now?
  defp died(data, error) do
    data = close(data, error)
    now = System.monotonic_time(:second)
    deaths = [now | Enum.filter(data.deaths, &(now - &1 < option(data, :max_seconds)))]
    data = %{data | deaths: deaths, error: error, request: nil}

    if length(deaths) > option(data, :max_restarts) do
      {:next_state, :failed, %{data | error: gave_up(data, error)}}
    else
      {:next_state, :dead, data}
    end
  end

  defp gave_up(data, error) do
    Error.new(
      :failed,
      "The engine gave up after #{length(data.deaths) - 1} restarts within " <>
        "#{option(data, :max_seconds)} s. The last failure: #{error.message}",
      Map.put(error.details, "reason", Atom.to_string(error.reason))
    )
  end

  # Ends the program, if one runs, and returns when nothing of it is left.
  defp stop_program(%{program: nil} = data, _error), do: data

  defp stop_program(data, error) do
    Table.delete_worker(data.table, data.index)
    Program.stop(data.program, fn -> Connection.notify(data.conn, "shutdown", %{}) end)
    close(%{data | error: error}, error)
  end

  # Tells everyone who waits; the connection and the run folder go.
  defp close(%{program: nil} = data, _error), do: data

  defp close(data, error) do
    Table.delete_worker(data.table, data.index)
    Connection.close(data.conn, error)
    Program.clean_up(data.program)
    %{data | program: nil, conn: nil, log: nil}
  end

  defp read_log(%{log: nil} = data), do: data

  defp read_log(data) do
    {lines, log} = Log.read(data.log)

    for line <- lines do
      case Progress.of_line(line) do
        nil -> :ok
        progress -> progress(data, progress)
      end

      Logger.log(Log.level(line), fn -> "#{name(data)}: #{line}" end, meta(data))
    end

    %{data | log: log}
  end

  defp progress(data, progress) do
    Table.put_progress(data.table, data.index, progress)
    Telemetry.load_progress(data.started_at, Map.merge(metadata(data), progress))
    Logger.info(fn -> "#{name(data)}: #{Progress.describe(progress)}" end, meta(data))
  end

  # A little off the beat, so that replicas do not restart all at once.
  defp pause(deaths) do
    pause = min(@first_pause * Integer.pow(2, min(deaths - 1, 20)), @last_pause)
    pause + :rand.uniform(div(pause, 4) + 1)
  end

  defp limits(data) do
    max_in_flight = option(data, :max_in_flight) || data.info["max_num_seqs"] || 256
    %{window: max_in_flight, limit: max_in_flight + option(data, :max_queue)}
  end

  defp option(data, name), do: Map.fetch!(data.config.options, name)
  defp name(data), do: VLLM.Engine.display_name(data.config)

  defp meta(data),
    do: [vllm_engine: data.config.name || data.config.model, vllm_worker: data.index]

  defp metadata(data) do
    %{engine: data.config.name, model: data.config.model, worker: data.index}
  end
end
