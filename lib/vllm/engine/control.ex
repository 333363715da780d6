defmodule VLLM.Engine.Control do
  @moduledoc false
  # Knows how an engine is: answers those who wait for it to be ready, and ends
  # it with its owner. No request passes through it.
  #
  # It is the engine's significant child: when it ends in peace, because the
  # owner is gone, the supervisor takes the whole engine down.

  use GenServer

  alias VLLM.Bridge.Connection
  alias VLLM.Engine.{Config, Table}
  alias VLLM.Error

  @spec child_spec({Config.t(), Table.t()}) :: map()
  def child_spec(arg) do
    %{
      id: __MODULE__,
      start: {GenServer, :start_link, [__MODULE__, arg]},
      restart: :transient,
      significant: true
    }
  end

  @doc """
  Waits until the engine serves: until one worker is ready (`:any`), or each of
  them (`:all`). Ends with the error of a failed engine or at the deadline.

  `on_progress` is called in the waiting process with each step of loading.
  """
  @spec await(Table.t(), :any | :all, Connection.deadline(), (map() -> term())) ::
          :ok | {:error, Error.t()}
  def await(table, how_many, deadline, on_progress \\ fn _ -> :ok end) do
    case Table.control(table) do
      {:ok, control} ->
        ref = :erlang.monitor(:process, control, alias: :demonitor)
        send(control, {:await, ref, how_many})
        result = wait(ref, deadline, on_progress)
        Process.demonitor(ref, [:flush])
        flush(ref)
        result

      :error ->
        {:error, not_running()}
    end
  rescue
    # The table ended with its engine.
    ArgumentError -> {:error, not_running()}
  end

  defp wait(ref, deadline, on_progress) do
    receive do
      {^ref, {:progress, progress}} ->
        on_progress.(progress)
        wait(ref, deadline, on_progress)

      {^ref, result} ->
        result

      {:DOWN, ^ref, :process, _pid, _reason} ->
        {:error, not_running()}
    after
      Connection.remaining(deadline) ->
        {:error,
         Error.new(
           :timeout,
           "The deadline passed while the engine was starting. Wait for it with " <>
             "`VLLM.await_ready/2`, or give the call more `timeout:`."
         )}
    end
  end

  defp flush(ref) do
    receive do
      {^ref, _} -> flush(ref)
    after
      0 -> :ok
    end
  end

  defp not_running, do: Error.new(:not_running, "The engine was stopped.")

  @impl true
  def init({config, table}) do
    Table.put_control(table, self())
    if config.owner, do: Process.monitor(config.owner)
    {:ok, %{config: config, table: table, waiting: []}}
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

  def handle_info({:DOWN, _ref, :process, owner, _reason}, %{config: %{owner: owner}} = state) do
    {:stop, {:shutdown, :owner_down}, state}
  end

  defp answer(state) do
    statuses = Table.statuses(state.table)

    waiting =
      Enum.reject(state.waiting, fn {ref, how_many} ->
        case verdict(how_many, statuses, state.config.options.replicas) do
          :wait -> false
          result -> send(ref, {ref, result})
        end
      end)

    %{state | waiting: waiting}
  end

  defp verdict(how_many, statuses, replicas) do
    ready = Enum.count(statuses, &(&1 == :ready))
    failed = Enum.filter(statuses, &match?({:failed, _}, &1))

    cond do
      how_many == :any and ready > 0 -> :ok
      how_many == :all and ready == replicas -> :ok
      how_many == :all and failed != [] -> {:error, elem(hd(failed), 1)}
      length(failed) == replicas -> {:error, elem(hd(failed), 1)}
      true -> :wait
    end
  end
end
