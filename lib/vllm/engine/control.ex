defmodule VLLM.Engine.Control do
  @moduledoc false
  # Knows how an engine is: answers those who wait for it to be ready, changes
  # its replicas one operation at a time, and ends it with its owner. No request
  # passes through it.
  #
  # It is the engine's significant child: when it exits normally because the
  # owner is gone, the supervisor shuts the whole engine down. However the engine
  # is stopped, this process terminates first and lets requests in flight finish.

  use GenServer

  alias VLLM.Bridge.Deadline
  alias VLLM.Engine.{Table, Worker}
  alias VLLM.Error

  @spec child_spec(Table.t()) :: map()
  def child_spec(table) do
    %{
      id: __MODULE__,
      start: {GenServer, :start_link, [__MODULE__, table]},
      restart: :transient,
      significant: true,
      # stop_workers/2 has a time limit of its own.
      shutdown: :infinity
    }
  end

  @doc """
  Waits until the engine serves: until one worker is ready (`:any`), or each of
  them (`:all`). Ends with the error of a failed engine or at the deadline.

  `on_progress` is called in the waiting process with each step of loading.
  """
  @spec await(Table.t(), :any | :all, Deadline.t(), (map() -> term())) ::
          :ok | {:error, Error.t()}
  def await(table, how_many, deadline, on_progress \\ fn _ -> :ok end) do
    ask(table, fn ref -> {:await, ref, how_many} end, deadline, on_progress, fn ->
      Error.new(
        :timeout,
        "The deadline passed while the engine was starting. Wait for it with " <>
          "`VLLM.await_ready/2`, or give the call more `timeout:`.",
        %{"option" => "timeout"}
      )
    end)
  end

  @doc "What a call would find that comes now: a worker, a wait for one, or an error."
  @spec standing(Table.t()) :: :ok | :wait | {:error, Error.t()}
  def standing(table),
    do: verdict(:any, length(Table.workers(table)), Table.statuses(table))

  @doc """
  Runs one operation on the replicas, after those that were asked for before it. It goes on when
  the caller ends.
  """
  @spec operate(Table.t(), (() -> result)) :: result | {:error, Error.t()} when result: term()
  def operate(table, operation) do
    ask(table, fn ref -> {:operate, ref, operation} end, :infinity, fn _ -> :ok end, fn -> nil end)
  end

  defp ask(table, message, deadline, on_progress, late) do
    case not Table.stopping?(table) && Table.control(table) do
      false ->
        {:error, not_running()}

      {:ok, control} ->
        ref = :erlang.monitor(:process, control, alias: :demonitor)
        send(control, message.(ref))
        result = wait(ref, deadline, on_progress, late)
        Process.demonitor(ref, [:flush])
        flush(ref)

        if result == :again,
          do: again(table, message, deadline, on_progress, late),
          else: result

      :error ->
        again(table, message, deadline, on_progress, late)
    end
  rescue
    # The table ended with its engine.
    ArgumentError -> {:error, not_running()}
  end

  # It has not started yet, or was killed and starts anew.
  defp again(table, message, deadline, on_progress, late) do
    receive do
    after
      min(10, Deadline.remaining(deadline)) -> :ok
    end

    if Deadline.passed?(deadline),
      do: {:error, late.()},
      else: ask(table, message, deadline, on_progress, late)
  end

  defp wait(ref, deadline, on_progress, late) do
    receive do
      {^ref, {:progress, progress}} ->
        on_progress.(progress)
        wait(ref, deadline, on_progress, late)

      {^ref, result} ->
        result

      {:DOWN, ^ref, :process, _pid, reason} ->
        if stopped?(reason), do: {:error, not_running()}, else: :again
    after
      Deadline.remaining(deadline) -> {:error, late.()}
    end
  end

  defp stopped?({:shutdown, _}), do: true
  defp stopped?(reason), do: reason in [:normal, :shutdown]

  defp flush(ref) do
    receive do
      {^ref, _} -> flush(ref)
    after
      0 -> :ok
    end
  end

  @doc "The error of a call whose engine has ended since it was looked up."
  @spec not_running() :: Error.t()
  def not_running, do: Error.new(:not_running, "The engine was stopped.")

  @impl true
  def init(table) do
    # So that it can let requests finish when it is told to end.
    Process.flag(:trap_exit, true)
    Table.put_control(table, self())
    owner = Table.config(table).owner
    monitor = owner && Process.monitor(owner)
    {:ok, %{table: table, owner: monitor, waiting: [], operations: :queue.new(), running: nil}}
  end

  @impl true
  def handle_info({:await, ref, how_many}, state) do
    {:noreply, answer(%{state | waiting: [{ref, how_many} | state.waiting]})}
  end

  def handle_info(:status, state), do: {:noreply, answer(state)}

  def handle_info({:progress, _index, _progress} = message, state) do
    progress = Map.put(elem(message, 2), :worker, elem(message, 1))
    for {ref, _} <- state.waiting, do: send(ref, {ref, {:progress, progress}})
    {:noreply, state}
  end

  def handle_info({:operate, ref, operation}, state) do
    {:noreply, next_operation(update_in(state.operations, &:queue.in({ref, operation}, &1)))}
  end

  def handle_info({:DOWN, monitor, :process, _, reason}, %{running: {_, monitor, ref}} = state) do
    # A normal exit follows the message with the result.
    if reason != :normal do
      error = Error.new(:internal, "The operation failed: #{kind(reason)}.")
      send(ref, {ref, {:error, error}})
    end

    {:noreply, next_operation(%{state | running: nil})}
  end

  def handle_info({:DOWN, owner, :process, _pid, _reason}, %{owner: owner} = state) do
    {:stop, {:shutdown, :owner_down}, state}
  end

  # Operations are linked; their monitor reports the end.
  def handle_info({:EXIT, _pid, _reason}, state), do: {:noreply, state}

  # Only when the engine stops. After a crash this process is restarted.
  @impl true
  def terminate(reason, state) do
    if stopped?(reason) do
      Table.put_stopping(state.table)
      for ref <- end_operations(state), do: send(ref, {ref, {:error, not_running()}})
      for {ref, _} <- state.waiting, do: send(ref, {ref, {:error, not_running()}})
      stop_workers(state.table, Table.config(state.table).options.shutdown_timeout)
    end
  end

  # Each as soon as nothing is in flight, or after `timeout` ms; also those of an
  # operation that was cut short.
  defp stop_workers(table, timeout) do
    # Killing the programs takes some time as well.
    patience = timeout |> Deadline.new() |> Deadline.remaining(15_000)
    Worker.each(table, Table.slots(table), &Worker.drain(&1, timeout), patience)
  end

  defp next_operation(%{running: nil} = state) do
    case :queue.out(state.operations) do
      {{:value, {ref, operation}}, rest} ->
        # In a process of its own, because it takes long; linked, so that it ends with the engine.
        {pid, monitor} =
          :erlang.spawn_opt(fn -> send(ref, {ref, operation.()}) end, [:link, :monitor])

        %{state | operations: rest, running: {pid, monitor, ref}}

      {:empty, _} ->
        state
    end
  end

  defp next_operation(state), do: state

  # Before the replicas are stopped: an operation must neither mistake that for the
  # drain it waits for nor start a replica again. Returns the refs of its callers.
  defp end_operations(%{running: running, operations: operations}) do
    waiting = for {ref, _operation} <- :queue.to_list(operations), do: ref

    case running do
      nil ->
        waiting

      {pid, monitor, ref} ->
        Process.exit(pid, :kill)

        receive do
          {:DOWN, ^monitor, :process, _, _} -> [ref | waiting]
        end
    end
  end

  # Without the arguments in the stacktrace, which may contain secrets.
  defp kind({%module{}, _stacktrace}), do: inspect(module)
  defp kind({kind, _stacktrace}) when is_atom(kind), do: inspect(kind)
  defp kind(_reason), do: "it was ended"

  defp answer(state) do
    statuses = Table.statuses(state.table)

    # The ready ones are counted here and not by status: a dying worker leaves this list before its
    # callers hear of the death, and changes its status only afterwards.
    ready = length(Table.workers(state.table))

    waiting =
      Enum.reject(state.waiting, fn {ref, how_many} ->
        case verdict(how_many, ready, statuses) do
          :wait -> false
          result -> send(ref, {ref, result})
        end
      end)

    %{state | waiting: waiting}
  end

  defp verdict(how_many, ready, statuses) do
    failed = for {:failed, error} <- statuses, do: error
    gone = length(failed) + Enum.count(statuses, &(&1 == :drained))

    cond do
      how_many == :any and ready > 0 -> :ok
      how_many == :all and ready == length(statuses) -> :ok
      how_many == :all and failed != [] -> {:error, hd(failed)}
      gone < length(statuses) -> :wait
      failed != [] -> {:error, hd(failed)}
      true -> {:error, all_drained()}
    end
  end

  defp all_drained do
    Error.new(
      :not_running,
      "Every replica of the engine was drained (`VLLM.drain/3`). `VLLM.restart/3` starts them again."
    )
  end
end
