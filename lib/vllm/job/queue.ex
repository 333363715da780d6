defmodule VLLM.Job.Queue do
  @moduledoc false
  # The jobs of this BEAM: which of them wait, which run, and who wants to know how
  # far they are. A job that may run gets a VLLM.Job.Runner.
  #
  # Several BEAMs may share the data folder. Each runs its own jobs; those of others
  # are read from the disk.

  use GenServer

  require Logger

  alias VLLM.{Data, Error}

  alias VLLM.Job.{
    Finetune,
    Lock,
    Owner,
    Progress,
    Quantize,
    Record,
    Runner,
    Settings,
    Store,
    Tally
  }

  # How often the disk is asked about jobs of other BEAMs that somebody here follows, and whether
  # those want one that waits here to be cancelled, in ms.
  @tick 1_000

  @runners VLLM.Job.RunnerSupervisor

  # The modules of the kinds of jobs, see VLLM.Job.Kind.
  @kinds %{quantize: Quantize, finetune: Finetune}

  ## For those who use jobs

  @spec start_link(term()) :: GenServer.on_start()
  def start_link(_none), do: GenServer.start_link(__MODULE__, nil, name: __MODULE__)

  @doc "Adds a job, unless another that has not ended makes models of the same name."
  @spec submit(Record.t(), Settings.t()) :: {:ok, Record.t()} | {:error, Error.t()}
  def submit(record, settings), do: call({:submit, record, settings})

  @doc """
  Adds a job once more that has ended without all its outputs. `settings` makes its settings of the
  record; nil takes those that it had in this BEAM, if it had any.
  """
  @spec retry(String.t(), (Record.t() -> Settings.t()), boolean()) ::
          {:ok, Record.t()} | {:error, Error.t()}
  def retry(id, settings, new?), do: call({:retry, id, settings, new?})

  @doc "Ends a job of this BEAM and returns when nothing is left of it; asks that of another BEAM."
  @spec cancel(String.t()) :: :ok | :asked | {:error, Error.t()}
  def cancel(id), do: call({:cancel, id})

  @doc "Removes a job that has ended."
  @spec delete(String.t()) :: :ok | {:error, Error.t()}
  def delete(id), do: call({:delete, id})

  @doc "Has `pid` get `{ref, progress}` until the job has ended."
  @spec subscribe(String.t(), pid()) :: {:ok, reference()} | {:error, Error.t()}
  def subscribe(id, pid), do: call({:subscribe, id, pid})

  @doc "Ends that."
  @spec unsubscribe(reference()) :: :ok | {:error, Error.t()}
  def unsubscribe(ref), do: call({:unsubscribe, ref})

  defp call(request) do
    # What it waits for ends at once: a job whose workers are killed.
    GenServer.call(__MODULE__, request, :infinity)
  catch
    :exit, _gone ->
      {:error,
       Error.new(
         :not_running,
         "Jobs are not running: the application `:ex_vllm` is stopped, or stopped them after a " <>
           "fault, which the log tells. Start it: `Application.ensure_all_started(:ex_vllm)`."
       )}
  end

  @doc "A job as it is now."
  @spec get(String.t()) :: {:ok, Record.t()} | {:error, Error.t()}
  def get(id) do
    if record = Tally.record(id), do: {:ok, record}, else: Store.read(id)
  end

  @doc "The module of a job's kind."
  @spec kind(Record.t()) :: module()
  def kind(%Record{kind: kind}), do: Map.fetch!(@kinds, kind)

  @doc "All jobs as they are now, oldest first."
  @spec list() :: [Record.t()]
  def list, do: Enum.map(Store.list(), &Tally.of/1)

  ## The process

  @impl true
  def init(nil) do
    # The end of the application is not to be missed.
    Process.flag(:trap_exit, true)
    Tally.new()

    state = %{
      waiting: :queue.new(),
      running: %{},
      ending: %{},
      settings: %{},
      subscribers: %{},
      cancellers: %{}
    }

    {:ok, state, {:continue, :sweep}}
  end

  @impl true
  def handle_continue(:sweep, state) do
    # Nothing of this BEAM runs yet, also where this process had to be started again.
    Lock.exclusively(Data.jobs(), fn -> Store.sweep(Owner.this()) end)
    :timer.send_interval(@tick, :tick)
    {:noreply, state}
  end

  @impl true
  def handle_call({:submit, record, settings}, _from, state), do: add(record, settings, state)

  def handle_call({:retry, id, settings, new?}, _from, state) do
    with {:ok, record} <- get(id), :ok <- can_retry(record) do
      record = %{
        kind(record).again(record)
        | state: :queued,
          error: nil,
          progress: nil,
          ended_at: nil,
          memo: %{}
      }

      before = if new?, do: nil, else: state.settings[id]
      add(record, before || settings.(record), state)
    else
      {:error, error} -> {:reply, {:error, error}, state}
    end
  end

  def handle_call({:cancel, id}, from, state) do
    cond do
      is_map_key(state.running, id) ->
        Runner.cancel(state.running[id].pid)
        {:noreply, wait_for_end(state, id, from)}

      is_map_key(state.ending, id) ->
        {:noreply, wait_for_end(state, id, from)}

      :queue.member(id, state.waiting) ->
        {:reply, :ok, cancel_waiting(id, state)}

      true ->
        {:reply, cancel_elsewhere(id), state}
    end
  end

  def handle_call({:delete, id}, _from, state) do
    case get(id) do
      {:ok, record} ->
        if Record.ended?(record) and not is_map_key(state.ending, id) do
          Tally.forget(id)
          {:reply, Store.delete(id), %{state | settings: Map.delete(state.settings, id)}}
        else
          {:reply, {:error, running(record, "deleted")}, state}
        end

      {:error, error} ->
        {:reply, {:error, error}, state}
    end
  end

  def handle_call({:subscribe, id, pid}, _from, state) do
    case get(id) do
      {:ok, record} ->
        ref = make_ref()
        progress = Record.progress(record)
        send(pid, {ref, progress})

        if Record.ended?(record) do
          {:reply, {:ok, ref}, state}
        else
          subscriber = %{pid: pid, job: id, monitor: Process.monitor(pid), last: progress}
          {:reply, {:ok, ref}, put_in(state.subscribers[ref], subscriber)}
        end

      {:error, error} ->
        {:reply, {:error, error}, state}
    end
  end

  def handle_call({:unsubscribe, ref}, _from, state), do: {:reply, :ok, drop(state, ref)}

  @impl true
  def handle_cast({:progress, record}, state), do: {:noreply, tell(state, record)}

  @impl true
  # What runners tell comes before their end.
  def handle_info({:DOWN, monitor, :process, pid, _reason}, state) do
    running = Enum.find(state.running, fn {_id, runner} -> runner.monitor == monitor end)
    ending = Enum.find(state.ending, fn {_id, waits} -> waits == monitor end)

    cond do
      running != nil ->
        {:noreply, runner_ended(elem(running, 0), state)}

      ending != nil ->
        {:noreply,
         cut_off(elem(ending, 0), %{state | ending: Map.delete(state.ending, elem(ending, 0))})}

      true ->
        gone = for {ref, %{pid: ^pid}} <- state.subscribers, do: ref
        {:noreply, Enum.reduce(gone, state, &drop(&2, &1))}
    end
  end

  def handle_info(:tick, state) do
    asked = for id <- :queue.to_list(state.waiting), Store.cancel_requested?(id), do: id
    state = Enum.reduce(asked, state, &cancel_waiting/2)
    {:noreply, Enum.reduce(elsewhere(state), state, &follow/2)}
  end

  def handle_info(_message, state), do: {:noreply, state}

  @impl true
  def terminate(_reason, state) do
    # Runners have ended before, see VLLM.Job.Supervisor.
    for id <- Map.keys(state.running) ++ Map.keys(state.ending) ++ :queue.to_list(state.waiting),
        record = Tally.record(id),
        do: tell(state, if(Record.ended?(record), do: record, else: interrupt(record)))

    :ok
  end

  ## Adding

  # A name is one folder and one entry of the registry. Another BEAM may want it now, too.
  defp claim(record) do
    Lock.exclusively(Data.jobs(), fn ->
      case Enum.find(list(), &(&1.name == record.name and not Record.ended?(&1))) do
        nil -> Store.write(record)
        %{id: id} = same when id == record.id -> {:error, running(same, "retried")}
        other -> {:error, taken(other)}
      end
    end)
  end

  defp taken(other) do
    message =
      "The job #{other.id} (#{other.state}) makes models of the name `#{other.name}` already. Wait " <>
        "for it, cancel it (`VLLM.Job.cancel(#{inspect(other.id)})`), or take another `name:`."

    Error.new(:name_taken, message, %{"name" => other.name, "job" => other.id})
  end

  defp running(record, what) do
    message =
      "The job #{record.id} is #{record.state} and cannot be #{what}. Cancel it first: " <>
        "`VLLM.Job.cancel(#{inspect(record.id)})`."

    Error.new(:job_running, message, %{"job" => record.id})
  end

  defp can_retry(%{state: :done} = record) do
    message = "The job #{record.id} is done: there is nothing to retry."
    {:error, Error.new(:unsupported, message, %{"job" => record.id})}
  end

  defp can_retry(record),
    do: if(Record.ended?(record), do: :ok, else: {:error, running(record, "retried")})

  defp add(record, settings, state) do
    record = %{record | owner: Owner.this()}

    case claim(record) do
      :ok ->
        Tally.update(record)
        settings = Map.put(state.settings, record.id, settings)
        waiting = :queue.in(record.id, state.waiting)
        {:reply, {:ok, record}, start_next(%{state | settings: settings, waiting: waiting})}

      {:error, error} ->
        {:reply, {:error, error}, state}
    end
  end

  defp start_next(state) do
    limit = Application.get_env(:ex_vllm, :max_jobs, 1)

    with true <- map_size(state.running) + map_size(state.ending) < limit,
         {{:value, id}, waiting} <- :queue.out(state.waiting) do
      start_next(run(id, %{state | waiting: waiting}))
    else
      _full_or_empty -> say_who_waits(state)
    end
  end

  defp run(id, state) do
    record = Tally.record(id)

    args = %{
      record: record,
      kind: kind(record),
      settings: state.settings[id],
      queue: self()
    }

    {:ok, pid} = DynamicSupervisor.start_child(@runners, {Runner, args})
    put_in(state.running[id], %{pid: pid, monitor: Process.monitor(pid)})
  end

  defp say_who_waits(state) do
    for id <- :queue.to_list(state.waiting), %{waiting_for: nil} = record <- [Tally.record(id)] do
      Tally.update(%{record | waiting_for: "other jobs to end (`config :ex_vllm, max_jobs:`)"})
    end

    state
  end

  ## Ends

  defp runner_ended(id, state) do
    {_runner, state} = pop_in(state.running[id])

    # A runner that was killed leaves a worker that is being ended, and writes into the job's folder
    # meanwhile.
    case Tally.session(id) do
      session when is_pid(session) -> put_in(state.ending[id], Process.monitor(session))
      nil -> cut_off(id, state)
    end
  end

  # Nothing runs of it any more; its end is told, and noted where its runner could not.
  defp cut_off(id, state) do
    record = Tally.record(id)
    record = if Record.ended?(record), do: record, else: interrupt(record)
    Tally.count_end(record)
    state = tell(state, record)
    forget(id)
    {callers, state} = pop_in(state.cancellers[id])
    for from <- callers || [], do: GenServer.reply(from, :ok)
    start_next(state)
  end

  defp interrupt(record) do
    Store.clean(record.id)
    keep(Record.interrupted(record))
  end

  defp keep(record) do
    Tally.update(record)
    with {:error, error} <- Store.write(record), do: Logger.warning(error.message)
    record
  end

  # The end of a job stays in memory where the disk did not take it.
  defp forget(id) do
    Tally.session(id, nil)
    with {:ok, record} <- Store.read(id), true <- Record.ended?(record), do: Tally.forget(id)
    :ok
  end

  defp wait_for_end(state, id, from) do
    %{state | cancellers: Map.update(state.cancellers, id, [from], &[from | &1])}
  end

  defp cancel_waiting(id, state) do
    Store.clean(id)
    record = keep(Record.cancelled(Tally.record(id)))
    Tally.count_end(record)
    forget(id)
    tell(%{state | waiting: :queue.delete(id, state.waiting)}, record)
  end

  defp cancel_elsewhere(id) do
    with {:ok, record} <- get(id) do
      cond do
        Record.ended?(record) ->
          :ok

        # It was left by a queue that crashed, and could not be swept.
        record.owner == Owner.this() ->
          Store.clean(id)
          Store.write(Record.cancelled(record))

        true ->
          with :ok <- Store.request_cancel(id), do: :asked
      end
    end
  end

  ## Telling

  defp tell(state, record) do
    progress = Record.progress(record)

    state =
      for {ref, %{job: id} = subscriber} <- state.subscribers, id == record.id, reduce: state do
        state ->
          send(subscriber.pid, {ref, progress})
          put_in(state.subscribers[ref].last, progress)
      end

    if Record.ended?(record) do
      done = for {ref, %{job: id}} <- state.subscribers, id == record.id, do: ref
      Enum.reduce(done, state, &drop(&2, &1))
    else
      state
    end
  end

  defp drop(state, ref) do
    case pop_in(state.subscribers[ref]) do
      {nil, state} ->
        state

      {subscriber, state} ->
        Process.demonitor(subscriber.monitor, [:flush])
        state
    end
  end

  # The jobs of other BEAMs that somebody here follows.
  defp elsewhere(state) do
    for {_ref, %{job: id}} <- state.subscribers,
        not is_map_key(state.running, id) and not is_map_key(state.ending, id),
        not :queue.member(id, state.waiting),
        uniq: true,
        do: id
  end

  defp follow(id, state) do
    case Store.read(id) do
      {:ok, record} ->
        progress = Record.progress(record)
        heard? = Enum.all?(state.subscribers, fn {_, s} -> s.job != id or s.last == progress end)
        if heard?, do: state, else: tell(state, record)

      # It was deleted, which only what has ended can be.
      {:error, error} ->
        last = %Progress{job: id, state: :interrupted, error: error}

        for {ref, %{job: ^id} = subscriber} <- state.subscribers, reduce: state do
          state ->
            send(subscriber.pid, {ref, last})
            drop(state, ref)
        end
    end
  end
end
