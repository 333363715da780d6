defmodule VLLM.Engine.Worker do
  @moduledoc false
  # One worker of an engine: a state machine around one run of the worker
  # program at a time.
  #
  #                  ┌────────────── restart, reload ──────────────┐
  #                  ▼                                             │
  #     ┌──────▶ starting ──── loaded ───▶ ready ─── drain ───▶ draining
  #     │         │  │  ▲                    │                     │
  #   pause       │  │  └──── restart ────┐  │ death, hang         │ nothing is
  #     │         │  └─ refused ─▶ failed ┤  │                     │ in flight
  #     └─ dead ◀─┴───── death ──────▲────┼──┘                     ▼
  #          └────── too often ──────┘    └─────────────────── drained
  #
  # It owns the port, routes answers to the callers that wait for them, has the
  # requests of dead callers aborted, follows the worker's log, finds out
  # whether it hangs and restarts the program. Requests do not pass through it
  # (see VLLM.Bridge.Connection), so it never does anything slow.
  #
  # In dead, failed and drained there is no program, and a new run begins only
  # after the guard of the old one has reported that all of it is gone. A worker
  # that drains gets no new requests and finishes those it has. A reload is a
  # start with another config, with `fallback` as the config to return to if that
  # one does not load; meanwhile the worker counts as starting. The only replica
  # is reloaded by a second worker, beside the first (see VLLM.Engine.Replicas).

  @behaviour :gen_statem

  alias VLLM.Bridge.{Connection, Deltas, ExitStatus, Inbox}
  alias VLLM.Engine.{Config, Heartbeat, Progress, Report, Run, Table}
  alias VLLM.{Error, Options}

  # How often the log is read, in ms: more often while somebody may watch it load.
  @log_interval %{starting: 100, ready: 500, draining: 500}

  # The pause before a restart doubles from the first to the last, in ms.
  @first_pause 200
  @last_pause 30_000

  # How often a draining worker checks whether it is done, in ms.
  @drain_interval 20

  defstruct [
    :table,
    :slot,
    :config,
    :run,
    :started_at,
    # How far the start has come.
    :progress,
    # The worker's own request in flight: hello, then load.
    :request,
    :info,
    :error,
    :fallback,
    # Why a reload went back to the config before it.
    :reload_error,
    # What comes after draining: drained, or a start with a config.
    :next,
    # Who waits for it to be drained or ready.
    waiting: [],
    deaths: []
  ]

  @doc "The worker of a slot; `child` is another id for it, see `Table.put_child/3`."
  @spec child_spec({Table.t(), Table.slot() | reference()}) :: Supervisor.child_spec()
  def child_spec({table, child}) do
    %{
      id: child,
      start: {__MODULE__, :start_link, [table, child]},
      # Ending a worker takes as long as its operating system processes take to exit.
      shutdown: 15_000
    }
  end

  @spec start_link(Table.t(), Table.slot() | reference()) :: :gen_statem.start_ret()
  def start_link(table, child),
    do: :gen_statem.start_link(__MODULE__, {table, Table.slot(table, child)}, [])

  @doc "Asks a worker to end when nothing is in flight, or after `timeout` ms; for `receive_response`."
  @spec drain(pid(), timeout()) :: :gen_statem.request_id()
  def drain(worker, timeout), do: :gen_statem.send_request(worker, {:drain, timeout})

  @doc """
  Asks a worker to begin anew once it is drained, with `config` if that is given; the answer comes
  when it is ready. If it does not load with `config`, it goes back to the one before, and the
  answer is the error.
  """
  @spec restart(pid(), timeout(), Config.t() | nil) :: :gen_statem.request_id()
  def restart(worker, timeout, config \\ nil),
    do: :gen_statem.send_request(worker, {:restart, timeout, config})

  @doc "Gives a drained worker the config for its next start."
  @spec configure(pid(), Config.t()) :: :gen_statem.request_id()
  def configure(worker, config), do: :gen_statem.send_request(worker, {:configure, config})

  @doc "Has a worker that was started beside another take the place that the other has left."
  @spec take_place(pid()) :: :gen_statem.request_id()
  def take_place(worker), do: :gen_statem.send_request(worker, :take_place)

  @doc "Waits for a start to succeed or fail; for `receive_response`."
  @spec await(pid()) :: :gen_statem.request_id()
  def await(worker), do: :gen_statem.send_request(worker, :await)

  @doc "Asks these workers at once, and waits for their answers: the first error among them, or `:ok`."
  @spec each(Table.t(), [Table.slot()], (pid() -> :gen_statem.request_id()), timeout()) ::
          :ok | {:error, Error.t()}
  def each(table, slots, ask, timeout \\ :infinity) do
    requests = for slot <- slots, worker = Table.process(table, slot), do: ask.(worker)

    requests
    |> Enum.map(fn request ->
      case :gen_statem.receive_response(request, timeout) do
        {:reply, answer} -> answer
        {:error, {reason, _worker}} -> {:error, ended(reason)}
        :timeout -> {:error, Error.new(:timeout, "A worker did not end in time.")}
      end
    end)
    |> Enum.find(:ok, &(&1 != :ok))
  end

  defp ended(:shutdown), do: Connection.stopped()
  defp ended(_fault), do: Error.new(:internal, "A worker's process ended meanwhile.")

  @impl true
  def callback_mode, do: [:handle_event_function, :state_enter]

  @impl true
  def init({table, slot}) do
    Process.flag(:trap_exit, true)
    # A predecessor that was killed may have left its entry.
    Table.delete_worker(table, slot)
    Table.put_process(table, slot, self())
    data = %__MODULE__{table: table, slot: slot, config: Table.config(table, slot)}

    case Table.status(table, slot) do
      :drained ->
        {:ok, :drained, data}

      {:failed, error} ->
        {:ok, :failed, %{data | error: error}}

      _none_or_over ->
        Table.put_status(table, slot, :starting)
        {:ok, :starting, data}
    end
  end

  ## Entering a state

  @impl true
  def handle_event(:enter, _old, :starting, data) do
    # A run that was killed may have left its entry.
    Table.delete_worker(data.table, data.slot)
    Table.put_status(data.table, data.slot, :starting)
    data = %{data | started_at: System.monotonic_time(), progress: nil, info: nil, next: nil}
    Report.load_start(data)
    {:keep_state, data, [{:state_timeout, 0, :start}]}
  end

  def handle_event(:enter, _old, :ready, data) do
    Table.put_config(data.table, data.slot, data.config)
    Table.put_worker(data.table, data.slot, worker_row(data))
    Table.put_info(data.table, data.info)
    data = Report.progress(data, %{phase: :ready})
    Table.put_status(data.table, data.slot, :ready)
    Report.load_stop(data)
    data = %{data | fallback: nil}
    {data, replies} = answer(data, :ready, outcome(data.reload_error))
    {:keep_state, %{data | reload_error: nil}, replies ++ next_tick(data.run)}
  end

  def handle_event(:enter, _old, :draining, data) do
    Table.delete_worker(data.table, data.slot)
    Table.put_status(data.table, data.slot, :draining)
    {:keep_state_and_data, [{{:timeout, :drain}, 0, :look}]}
  end

  def handle_event(:enter, _old, :drained, data) do
    Table.put_status(data.table, data.slot, :drained)
    Report.log(data, :debug, fn -> "worker #{Table.index(data.slot)} is drained" end)
    {data, drained} = answer(data, :drained, :ok)
    {data, ready} = answer(data, :ready, {:error, drained()})
    {:keep_state, %{data | next: nil, error: nil}, drained ++ ready}
  end

  def handle_event(:enter, _old, :dead, data) do
    Table.put_status(data.table, data.slot, :dead)
    pause = pause(length(data.deaths))
    Report.log(data, :warning, fn -> "#{data.error.message} Restart in #{pause} ms." end)
    {:keep_state_and_data, [{:state_timeout, pause, :restart}]}
  end

  def handle_event(:enter, old, :failed, data) do
    # Already reported, if the worker process was restarted in this state.
    if old != :failed do
      Table.put_status(data.table, data.slot, {:failed, data.error})
      Report.failed(data, data.error)
    end

    {data, replies} = answer(data, :ready, {:error, data.reload_error || data.error})
    {:keep_state, %{data | reload_error: nil}, replies}
  end

  ## Starting: the program, the handshake, the load

  def handle_event(:state_timeout, :start, :starting, data) do
    data = Report.progress(data, %{phase: :python})

    case Run.start(data.table, data.slot, data.config) do
      {:ok, run} ->
        ask(%{data | run: run}, :hello, [
          {:state_timeout, option(data, :load_timeout), :load_timeout},
          {{:timeout, :log}, @log_interval.starting, :read}
        ])

      {:error, error} ->
        refused(data, error)
    end
  end

  def handle_event(
        :info,
        {inbox, ref, last},
        :starting,
        %{request: {step, %{address: {inbox, ref}} = request}} = data
      ) do
    case {step, Connection.answer(request, last)} do
      {:hello, {:ok, hello}} ->
        load(%{data | run: Run.greeted(data.run, hello), request: nil})

      {:load, {:ok, info}} ->
        {:next_state, :ready, %{data | info: info, request: nil, error: nil}}

      {_step, {:error, %Error{reason: :engine_dead} = error}} ->
        # vLLM's processes died while they loaded; the worker itself may go on.
        died(:starting, stop(data, error), error)

      {_step, {:error, error}} ->
        # The worker is healthy and refuses; another try would end the same way.
        refused(stop(data, error), Options.or_ours(error))
    end
  end

  def handle_event(:state_timeout, :load_timeout, :starting, data) do
    data = Report.follow_log(data)
    error = late(data, Run.missing(data.run))
    refused(kill(data, error), error)
  end

  # The program's own checkpoint is told of as those of other nodes are.
  def handle_event(
        :info,
        {:rank, teller, told},
        state,
        %{run: %{port: port, ranks: %{keepers: keepers}}} = data
      )
      when teller == port or is_map_key(keepers, teller) do
    if told == :away, do: Report.away(data, keepers[teller])

    case Run.hear(data.run, teller, told) do
      {:ok, run} when state == :starting and data.request == nil -> load(%{data | run: run})
      {:ok, run} -> {:keep_state, %{data | run: run}}
      {:error, error} -> ended_elsewhere(state, Report.follow_log(data), error)
    end
  end

  def handle_event(
        :info,
        {:EXIT, keeper, _reason},
        state,
        %{run: %{ranks: %{keepers: keepers}}} = data
      )
      when is_map_key(keepers, keeper) do
    error = Error.new(:engine_dead, "The process that keeps the run on #{keepers[keeper]} ended.")
    died(state, kill(data, error), error)
  end

  def handle_event(:state_timeout, :restart, :dead, data) do
    Report.restarts(data)
    {:next_state, :starting, data}
  end

  ## Draining and beginning anew

  def handle_event({:call, from}, {:drain, _timeout}, :drained, _data),
    do: {:keep_state_and_data, [{:reply, from, :ok}]}

  def handle_event({:call, from}, {:drain, timeout}, state, data) do
    data = %{data | waiting: [{from, :drained} | data.waiting]}

    case state do
      :ready ->
        {:next_state, :draining, %{data | next: :drained}, [{:state_timeout, timeout, :drain}]}

      :draining ->
        {:keep_state, %{data | next: :drained}, [{:state_timeout, timeout, :drain}]}

      _nothing_in_flight ->
        {:next_state, :drained, back_to_fallback(kill(data, Connection.stopped()))}
    end
  end

  def handle_event({:call, from}, {:restart, timeout, config}, state, data) do
    data = %{data | waiting: [{from, :ready} | data.waiting]}
    next = {:start, config}

    case state do
      :ready ->
        {:next_state, :draining, %{data | next: next}, [{:state_timeout, timeout, :drain}]}

      :draining ->
        {:keep_state, %{data | next: next}, [{:state_timeout, timeout, :drain}]}

      :starting when config == nil ->
        {:keep_state, with_config(data, nil)}

      :starting ->
        {:repeat_state, with_config(kill(data, Connection.stopped()), config)}

      _without_program ->
        {:next_state, :starting, with_config(data, config)}
    end
  end

  def handle_event({:call, from}, {:configure, config}, :drained, data) do
    Table.put_config(data.table, data.slot, config)
    {:keep_state, %{data | config: config}, [{:reply, from, :ok}]}
  end

  def handle_event({:call, from}, :take_place, _state, %{slot: {:beside, index}} = data) do
    Table.move(data.table, data.slot, index)
    run = data.run && %{data.run | slot: index}
    {:keep_state, %{data | slot: index, run: run}, [{:reply, from, :ok}]}
  end

  def handle_event({:call, from}, :await, state, data) do
    case state do
      :ready -> {:keep_state_and_data, [{:reply, from, :ok}]}
      :failed -> {:keep_state_and_data, [{:reply, from, {:error, data.error}}]}
      :drained -> {:keep_state_and_data, [{:reply, from, {:error, drained()}}]}
      _on_its_way -> {:keep_state, %{data | waiting: [{from, :ready} | data.waiting]}}
    end
  end

  def handle_event({:timeout, :drain}, :look, :draining, data) do
    if Connection.seal(data.run.conn),
      do: drained(stop(data, Connection.stopped())),
      else: {:keep_state_and_data, [{{:timeout, :drain}, @drain_interval, :look}]}
  end

  def handle_event({:timeout, :drain}, :look, _state, _data), do: :keep_state_and_data

  # The requests still in flight have used up their time.
  def handle_event(:state_timeout, :drain, :draining, data) do
    drained(stop(data, Connection.stopped()))
  end

  ## What the program says

  def handle_event(:info, {port, {:data, bytes}}, state, %{run: %{port: port}} = data) do
    {frames, run} = Run.frames(data.run, bytes)

    case receive_frames(frames, %{data | run: run}) do
      {:ok, data} -> {:keep_state, data}
      {{:malformed, reason}, data} -> malformed(state, data, reason)
    end
  end

  def handle_event(:info, {:malformed, port, reason}, state, %{run: %{port: port}} = data) do
    malformed(state, data, reason)
  end

  def handle_event(
        :info,
        {port, {:exit_status, status}},
        state,
        %{run: %{port: port}} = data
      ) do
    # The guard reports its exit status once every process of this run is gone.
    data = Report.follow_log(data)

    case ExitStatus.error(status, Run.recent(data.run)) do
      %Error{reason: :engine_dead} = error -> died(state, data, error)
      # Another try would end the same way.
      error when state == :draining -> died(state, data, error)
      error -> refused(close(data, error), error)
    end
  end

  # A caller wrote to a pipe that nobody reads any more: the port closed because
  # the guard is gone, and will not deliver an exit status.
  def handle_event(:info, {:EXIT, port, _reason}, state, %{run: %{port: port}} = data) do
    data = Report.follow_log(data)

    error =
      Error.new(
        :engine_dead,
        "The worker and its guard ended. `details[\"log\"]` has its last lines.",
        %{"log" => Run.recent(data.run)}
      )

    died(state, kill(data, error), error)
  end

  def handle_event({:timeout, :tick}, :tick, state, data) when state in [:ready, :draining] do
    case Run.tick(data.run) do
      {:ok, run} ->
        {:keep_state, %{data | run: run}, next_tick(run)}

      {:hung, who} ->
        data = Report.follow_log(data)
        error = Heartbeat.error(data.run.heartbeat, who, Run.recent(data.run))
        died(state, kill(data, error), error)
    end
  end

  def handle_event({:timeout, :tick}, :tick, _state, _data), do: :keep_state_and_data

  ## What callers do

  def handle_event(:info, {:watch, port, id, _address, pid}, _state, %{run: %{port: port}} = data) do
    Connection.watch(data.run.conn, id, pid)
    :keep_state_and_data
  end

  def handle_event(:info, {:unwatch, monitor}, _state, _data) do
    Connection.unwatch(monitor)
    :keep_state_and_data
  end

  # The caller wrote to an earlier run.
  def handle_event(:info, {:watch, _port, _id, address, _pid}, _state, data) do
    error =
      data.error || Error.new(:engine_dead, "The worker ended before the request reached it.")

    Inbox.send(address, {:error, error})
    :keep_state_and_data
  end

  def handle_event(:info, {{:caller_down, id}, _monitor, :process, _pid, _reason}, _state, data) do
    if data.run, do: count_left(data, [Connection.caller_down(data.run.conn, id)])
    :keep_state_and_data
  end

  ## The rest

  def handle_event({:timeout, :log}, :read, state, data) when is_map_key(@log_interval, state) do
    if state == :ready, do: count_left(data, Connection.sweep(data.run.conn))
    {:keep_state, Report.follow_log(data), [{{:timeout, :log}, @log_interval[state], :read}]}
  end

  def handle_event({:timeout, :log}, :read, _state, _data), do: :keep_state_and_data

  # Late messages of an earlier run: from its port, its writer, its answers.
  def handle_event(:info, _message, _state, _data), do: :keep_state_and_data

  @impl true
  def terminate(_reason, _state, data) do
    _ = stop(data, Connection.stopped())
    Table.delete_worker(data.table, data.slot)
    :ok
  end

  @impl true
  def format_status(_opt, [_dictionary, state, data]) do
    {state, %{data | run: nil, request: nil}}
  end

  ## What the program says

  defp ask(data, step, actions \\ []) do
    case Run.ask(data.run, step, data.config) do
      {:ok, request} -> {:keep_state, %{data | request: {step, request}}, actions}
      # What cannot be sent now cannot be sent later.
      {:error, error} -> refused(kill(data, error), error)
    end
  end

  # Once all nodes of the run are there.
  defp load(data) do
    with [] <- Run.missing(data.run),
         %{} <- data.run.hello,
         {:ok, run} <- Run.begin(data.run, data.config) do
      ask(%{data | run: run}, :load)
    else
      {:error, error} -> refused(kill(data, error), error)
      _not_yet -> {:keep_state, data}
    end
  end

  defp late(data, []) do
    Error.new(
      :load_timeout,
      "#{Report.name(data)} was not ready within #{option(data, :load_timeout)} ms. If the model is " <>
        "still being downloaded or read, give it longer with `load_timeout:`. What has come of a " <>
        "download is kept, and the next start goes on from there.",
      %{"log" => Run.recent(data.run)}
    )
  end

  defp late(data, missing) do
    Error.new(
      :node_down,
      "#{Report.name(data)} has waited #{option(data, :load_timeout)} ms (`load_timeout:`) for " <>
        "#{Enum.join(missing, ", ")}. See whether the node runs and has this library started, whether " <>
        "`Node.ping/1` answers `:pong`, and whether both nodes have the same cookie.",
      %{"nodes" => Enum.map(missing, &Atom.to_string/1)}
    )
  end

  # A node or its program is gone, or refuses to start.
  defp ended_elsewhere(state, data, %{reason: reason} = error)
       when state != :starting or reason in [:engine_dead, :node_down],
       do: died(state, kill(data, error), error)

  defp ended_elsewhere(:starting, data, error),
    do: refused(kill(data, error), Options.or_ours(error))

  defp receive_frames([], data), do: {:ok, data}
  defp receive_frames([:too_long], data), do: {{:malformed, "a frame that is too long"}, data}

  defp receive_frames([frame | frames], data) do
    case receive_message(Connection.parse(frame), data) do
      {:ok, data} -> receive_frames(frames, data)
      malformed -> {malformed, data}
    end
  end

  defp receive_message({:response, id, body}, data) do
    # Nobody waits for the answer to a request that was cancelled.
    _ = Connection.deliver(data.run.conn, id, {:response, body})
    {:ok, data}
  end

  defp receive_message({:notification, "deltas", %{"deltas" => rows}}, data) when is_list(rows) do
    with :ok <- Deltas.rows(data.run.conn, rows), do: {:ok, data}
  end

  defp receive_message({:notification, "packed_deltas", params}, data) do
    with {:ok, run} <- Run.packed_deltas(data.run, params), do: {:ok, %{data | run: run}}
  end

  defp receive_message({:notification, "pong", params}, data) do
    with {:ok, run} <- Run.pong(data.run, params), do: {:ok, %{data | run: run}}
  end

  defp receive_message({:notification, "load_progress", params}, data) do
    with %{"checkpoint" => checkpoint} <- params,
         do: send(self(), {:rank, data.run.port, {:checkpoint, checkpoint}})

    case Progress.of_wire(params) do
      nil -> {:ok, data}
      progress -> {:ok, Report.progress(data, progress)}
    end
  end

  # Newer workers may send notifications that this version does not know.
  defp receive_message({:notification, _method, _params}, data), do: {:ok, data}
  defp receive_message({:malformed, reason}, _data), do: {:malformed, reason}

  defp malformed(state, data, reason) do
    error = Error.new(:protocol, "The worker broke the protocol (#{reason}).")
    died(state, stop(data, error), error)
  end

  # `error` is kept for callers who still write to this run.
  defp stop(data, error), do: %{data | run: Run.stop(data.run, error), request: nil, error: error}
  defp kill(data, error), do: %{data | run: Run.kill(data.run, error), request: nil, error: error}

  defp close(data, error),
    do: %{data | run: Run.close(data.run, error), request: nil, error: error}

  ## What comes after

  defp died(state, data, error) do
    Report.died(data, error)
    after_death(state, data, error)
  end

  # The program has ended: drained, refused, dead or failed?
  defp after_death(:draining, data, error) do
    Report.log(data, :warning, fn -> error.message end)
    drained(close(data, error))
  end

  # The replica that serves is not affected; only the reload has failed.
  defp after_death(:starting, %{slot: {:beside, _}} = data, error),
    do: refused(close(data, error), error)

  defp after_death(:starting, %{fallback: %Config{}} = data, error),
    do: refused(close(data, error), error)

  defp after_death(state, data, error) do
    if state == :starting, do: Report.not_loaded(data, error)
    data = close(data, error)
    now = System.monotonic_time(:second)
    deaths = [now | Enum.filter(data.deaths, &(now - &1 < option(data, :max_seconds)))]
    data = %{data | deaths: deaths, error: error}

    if length(deaths) > option(data, :max_restarts),
      do: {:next_state, :failed, %{data | error: gave_up(data, error)}},
      else: {:next_state, :dead, data}
  end

  defp gave_up(data, error) do
    Error.new(
      :failed,
      "The engine gave up after #{length(data.deaths) - 1} restarts within " <>
        "#{option(data, :max_seconds)} s. The last failure: #{error.message} `VLLM.restart/3` " <>
        "starts it again.",
      Map.put(error.details, "reason", Atom.to_string(error.reason))
    )
  end

  # Not tried again. After a reload, the config before it is.
  defp refused(data, error) do
    Report.not_loaded(data, error)
    after_refusal(data, error)
  end

  defp after_refusal(%{fallback: nil} = data, error),
    do: {:next_state, :failed, %{data | error: error}}

  defp after_refusal(data, error) do
    Report.log(data, :error, fn -> "not reloaded. #{error.message}" end)
    {:repeat_state, %{back_to_fallback(data) | reload_error: error}}
  end

  defp back_to_fallback(data) do
    %{data | config: data.fallback || data.config, fallback: nil, deaths: [], reload_error: nil}
  end

  defp drained(%{next: :drained} = data), do: {:next_state, :drained, back_to_fallback(data)}

  defp drained(%{next: {:start, config}} = data) do
    {data, replies} = answer(data, :drained, :ok)
    {:next_state, :starting, with_config(data, config), replies}
  end

  defp with_config(data, nil), do: %{data | deaths: []}

  defp with_config(data, config) do
    %{data | config: config, fallback: data.fallback || data.config, deaths: []}
  end

  # Answers those who wait for `goal`.
  defp answer(data, goal, reply) do
    {reached, waiting} = Enum.split_with(data.waiting, &(elem(&1, 1) == goal))
    {%{data | waiting: waiting}, for({from, _} <- reached, do: {:reply, from, reply})}
  end

  defp outcome(nil), do: :ok
  defp outcome(error), do: {:error, error}

  defp drained, do: Error.new(:shutdown, "The replica was drained; see `VLLM.restart/3`.")

  # No ticks where `hang_timeout` is infinite.
  defp next_tick(%{heartbeat: nil}), do: []

  defp next_tick(%{heartbeat: heartbeat}),
    do: [{{:timeout, :tick}, Heartbeat.interval(heartbeat), :tick}]

  # With some jitter, so that replicas do not all restart at once.
  defp pause(deaths) do
    pause = min(@first_pause * Integer.pow(2, min(deaths - 1, 20)), @last_pause)
    pause + :rand.uniform(div(pause, 4) + 1)
  end

  defp worker_row(data) do
    max_in_flight = option(data, :max_in_flight) || data.info["max_num_seqs"] || 256
    limit = max_in_flight + option(data, :max_queue)
    %{index: Table.index(data.slot), conn: data.run.conn, window: max_in_flight, limit: limit}
  end

  # Requests whose callers died.
  defp count_left(data, methods) do
    for method <- methods,
        method != nil,
        do: Table.count(data.table, :requests, {method, :aborted})

    :ok
  end

  defp option(data, name), do: Map.fetch!(data.config.options, name)
end
